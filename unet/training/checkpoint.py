"""Checkpoints: a run's own truth, whole or absent, of plain formats that cannot run code.

`checkpoints/step_00000200/{model.weights.h5, optimizer.npz, state.json, COMMIT}`. Ray's own snapshot is not used.
"""

import io
import json
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from unet.classes import PETS, Classes, ClassInfo
from unet.storage import Folder

WEIGHTS, OPTIMIZER, STATE = "model.weights.h5", "optimizer.npz", "state.json"


@dataclass
class State:
    """Where a run stands, beside its weights.

    Attributes:
        epoch: the epoch in which the next step lies, from 1.
        epoch_step: how many steps of that epoch are done.
        step: steps done in all.
        score: val mean IoU of these weights if they stand at an epoch's end, else None.
        best_score, best_epoch, best_checkpoint: the best epoch so far by val mean IoU.
        validation: the scores of the best epoch.
        stale_epochs: epochs since the best one.
        skipped_steps: steps passed over for numbers that were not finite.
        loss_sum, pixels: training sums of the epoch under way.
        taken_over: whose weights a trial of a sweep took over last, as run/checkpoint.
        history: the lines of `metrics.jsonl` so far.
        seed, data_digest, settings: what the run is.
        classes: what the network's outputs mean, as [name, [red, green, blue]]; at first they were always the pets'.
        equality: what bit-equal continuation depends on (workers, threads, precision, versions, processor).
    """

    seed: int
    data_digest: str
    settings: dict
    equality: dict
    epoch: int = 1
    epoch_step: int = 0
    step: int = 0
    score: float | None = None
    best_score: float | None = None
    best_epoch: int | None = None
    best_checkpoint: str | None = None
    stale_epochs: int = 0
    skipped_steps: int = 0
    loss_sum: float = 0.0
    pixels: float = 0.0
    validation: dict | None = None
    taken_over: str | None = None
    history: list[dict] = field(default_factory=list)
    classes: list = field(default_factory=lambda: list(PETS.classes))

    @property
    def class_infos(self) -> Classes:
        return tuple(ClassInfo(name, tuple(colour)) for name, colour in self.classes)


def name_of(step: int) -> str:
    return f"step_{step:08d}"


class Checkpoints:
    """The checkpoints of one run; `run` is its folder."""

    def __init__(self, run: Folder):
        self.folder = run / "checkpoints"

    def whole(self) -> list[str]:
        """The names of the whole ones, oldest first."""
        names = [n for n in self.folder.names() if n.startswith("step_") and self.folder.committed(n)]
        return [n for n in names if all(self.folder.exists(f"{n}/{file}") for file in (WEIGHTS, OPTIMIZER, STATE))]

    def state(self, name: str) -> State:
        content = json.loads(self.folder.read_text(f"{name}/{STATE}"))
        return State(**{f.name: content[f.name] for f in fields(State) if f.name in content})

    def readable(self) -> list[tuple[str, State]]:
        """The whole ones whose state can be read, oldest first: a damaged one is passed over."""
        found = []
        for name in self.whole():
            try:
                found.append((name, self.state(name)))
            except (ValueError, OSError, TypeError):
                continue
        return found

    def latest(self) -> tuple[str, State] | None:
        """The last of these."""
        return next(reversed(self.readable()), None)

    def save(self, learner, state: State) -> str:
        """Write one, atomically; the same step is written over."""
        arrays = io.BytesIO()
        np.savez(arrays, **{name: v.numpy() for name, v in learner.optimizer_variables().items()})
        with tempfile.TemporaryDirectory() as scratch:
            weights = Path(scratch) / WEIGHTS
            learner.model.save_weights(weights)
            files = {
                WEIGHTS: weights.read_bytes(),
                OPTIMIZER: arrays.getvalue(),
                STATE: json.dumps(asdict(state)).encode(),
            }
        name = name_of(state.step)
        self.folder.commit(name, files)
        return name

    def load_weights(self, name: str, model) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / WEIGHTS
            path.write_bytes(self.folder.read_bytes(f"{name}/{WEIGHTS}"))
            model.load_weights(path)

    def load(self, name: str, learner) -> None:
        """Weights, optimizer and loss scale into a learner."""
        self.load_weights(name, learner.model)
        with np.load(io.BytesIO(self.folder.read_bytes(f"{name}/{OPTIMIZER}")), allow_pickle=False) as arrays:
            for key, variable in learner.optimizer_variables().items():
                variable.assign(arrays[key])

    def prune(self, keep_best: int) -> None:
        """Keep the `keep_best` best by score and always the last; remove the rest, torn ones too."""
        readable = self.readable()
        scored = sorted((-state.score, name) for name, state in readable if state.score is not None)
        kept = {name for _, name in scored[:keep_best]} | {name for name, _ in readable[-1:]}
        for name in self.folder.names():
            if name.startswith(("step_", ".tmp-step_")) and name not in kept:
                self.folder.delete(name)
