"""Checkpoints: a run's own truth, whole or passed over, of plain formats that cannot run code.

`checkpoints/step_00000200/{model.weights.h5, optimizer.npz, state.json, COMMIT}`; `COMMIT` holds the size and sha256 of
the others. Whatever is read is compared with it first. Ray's own snapshot is not used.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields

import numpy as np
from pydantic import ValidationError
from pydantic_core import from_json

from unet.config import CONFIG, ModelSettings
from unet.errors import Damaged, InputError, first_line
from unet.runs.arrays import (
    Shapes,
    optimizer_shapes,
    read_arrays,
    read_weights,
    write_arrays,
    write_weights,
)
from unet.runs.state import _LATER, _STATE, NAME, State, name_of
from unet.storage import Folder

WEIGHTS, OPTIMIZER, STATE = FILES = ("model.weights.h5", "optimizer.npz", "state.json")
STATE_BYTES = 2**27
"""No state is larger (a line of history has about 1 kB), so no more is read."""


class Checkpoints:
    """The checkpoints of one run; `run` is its folder."""

    def __init__(self, run: Folder):
        self.run, self.folder = run, run / "checkpoints"
        self._saved: set[str] = set()

    def whole(self) -> list[str]:
        """The names of those with a marker and files of the right size, oldest first; digests are not compared."""
        return [name for name in self._names() if self._is_whole(name)]

    def _names(self) -> list[str]:
        return [name for name in self.folder.names() if re.fullmatch(NAME, name)]

    def _is_whole(self, name: str) -> bool:
        try:
            known = self.folder.marker(name)
        except Damaged:
            return False
        sizes = [self.folder.size(f"{name}/{file}") for file in FILES]
        return all(sizes) and (not known or sizes == [known.get(file, (0, ""))[0] for file in FILES])

    def latest(self) -> tuple[str, State] | None:
        """The last whole one whose state can be read. After `resume` that is the one to start from, or a newer one."""
        return next(self._readable(), None)

    def _readable(self) -> Iterator[tuple[str, State]]:
        """These, newest first."""
        for name in reversed(self.whole()):
            try:
                yield name, self.state(name)
            except Damaged:
                continue

    def state(self, name: str) -> State:
        """Raises Damaged."""
        if (self.folder.size(f"{name}/{STATE}") or 0) > STATE_BYTES:
            raise _damaged(name, STATE, f"more than {STATE_BYTES} bytes")
        content = self.folder.read_committed(name, STATE)
        try:
            state = _STATE.validate_json(content, strict=True)
            known = from_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its content"
            raise _damaged(name, STATE, f"{where}: {first['msg']}") from error
        if missing := [f.name for f in fields(State) if f.name not in known and f.name not in _LATER]:
            raise _damaged(name, STATE, f"lacks {missing[0]}")
        if name_of(state.step) != name:
            raise _damaged(name, STATE, f"is of step {state.step}")
        try:
            state.shapes()
        except InputError as error:
            raise _damaged(name, STATE, first_line(error)) from error
        return state

    def weights(self, name: str) -> list[np.ndarray]:
        """The arrays of the model's weights, in its order. Raises Damaged."""
        return list(self._weights(name, self.state(name)))

    def _weights(self, name: str, state: State) -> Iterator[np.ndarray]:
        content = self.folder.read_committed(name, WEIGHTS)
        try:
            yield from read_weights(content, state.shapes())
        except Exception as error:  # whatever its damaged bytes lead HDF5 to
            raise _damaged(name, WEIGHTS, first_line(error)) from error

    def _optimizer(self, name: str, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
        content = self.folder.read_committed(name, OPTIMIZER)
        try:
            yield from read_arrays(content, shapes)
        except Exception as error:  # whatever its damaged bytes lead zipfile to
            raise _damaged(name, OPTIMIZER, first_line(error)) from error

    def verify(self, name: str, network: ModelSettings | None = None) -> State:
        """Read all of it, as a start from it would: its state.

        Raises:
            Damaged: it is not what was written, or is of another network than this.
        """
        state = self.state(name)
        if network and any(state.settings.get(k) != getattr(network, k) for k in ("base_filters", "depth")):
            raise _damaged(name, STATE, "is of another network")
        for _ in self._weights(name, state):
            pass
        for _ in self._optimizer(name, optimizer_shapes(state.shapes())):
            pass
        return state

    def resume(self, network: ModelSettings) -> tuple[tuple[str, State] | None, list[str]]:
        """The last one that verifies, to start from. Damaged ones after it do not count any more from here on.

        Returns:
            Its name and state, or None if none was ever written; and a sentence for each that was passed over.

        Raises:
            InputError: all are damaged.
        """
        found, damages, unfinished = None, {}, {}
        self._finish_replacing()
        names = self._names()
        for name in reversed(names):
            try:
                found = (name, self.verify(name, network))
                break
            except Damaged as error:
                damages[name] = f"checkpoint {error}"
        if not self.folder.is_local:  # where a kill leaves the files of a first one without their marker
            unfinished |= {name: damages.pop(name) for name in list(damages) if not self.folder.committed(name)}
        if found is None and damages:
            raise InputError(
                f"No checkpoint in {self.folder} can be used: {'; '.join(damages.values())}. Bring back a copy of one, "
                "or remove that folder to train anew."
            )
        for name in damages:
            self.folder.revoke(name)
        for leftover in self.folder.names():
            if torn := re.match(rf"\.tmp-({NAME})-", leftover):
                self.folder.delete(leftover)
                if torn[1] not in names and (found is None or torn[1] > found[0]):
                    unfinished[torn[1]] = f"checkpoint {torn[1]} was not finished"
        start = f"going on from {found[0]}" if found else "starting at the beginning"
        passed = damages | unfinished
        sentences = [f"{passed[name]}: {start}" for name in sorted(passed, reverse=True)]
        return found, sentences + (self._mend_best(*found) if found else [])

    def _finish_replacing(self) -> None:
        """Where a kill fell between the two renamings that replace a checkpoint, both copies have other names."""
        copies: dict[str, list[str]] = {}
        for leftover in self.folder.names():
            if (torn := re.match(rf"\.tmp-({NAME})-", leftover)) and self.folder.committed(leftover):
                copies.setdefault(torn[1], []).append(leftover)
        for name, both in copies.items():
            if len(both) > 1 and not self.folder.exists(name):
                (self.folder / both[-1]).rename(self.folder / name)

    def _mend_best(self, name: str, state: State) -> list[str]:
        """Where the best one's weights are damaged, make the best that is left the best: a sentence that says so."""
        lost = state.best_checkpoint
        if lost in (None, name):
            return []
        try:
            self.weights(lost)
            return []
        except Damaged as error:
            damage = f"the best checkpoint {error}"
        self.folder.revoke(lost)
        scored = [(-s.score, n) for n, s in self._readable() if s.score is not None and n <= name]
        best = next((n for _, n in sorted(scored) if self._verifies(n)), None)
        if best is None:
            state.best_score = state.best_epoch = state.best_checkpoint = state.validation = None
            state.stale_epochs = 0
        else:
            own = self.state(best)
            state.best_score, state.best_epoch, state.best_checkpoint = own.score, own.epoch - 1, best
            state.stale_epochs = state.epoch - own.epoch
            # All scores of an epoch are kept with it only if it was the best so far.
            state.validation = own.validation if own.best_checkpoint == best else None
        files = {file: self.folder.read_committed(name, file) for file in (WEIGHTS, OPTIMIZER)}
        self.folder.commit(name, files | {STATE: _to_json(state)})
        return [f"{damage}: the best that is left is {best or 'still to come'}"]

    def _verifies(self, name: str) -> bool:
        try:
            self.verify(name)
        except Damaged:
            return False
        return True

    def save(self, learner, state: State) -> str:
        """Write one, atomically; the same step is written over.

        Raises:
            StorageFailed: it cannot be written, or the run's folder is gone. Nothing has changed then.
        """
        self.run.require(CONFIG)
        weights = zip(state.shapes(), learner.model.weights, strict=True)
        arrays = {path: variable.numpy() for path, variable in weights}
        slots = {name: variable.numpy() for name, variable in learner.optimizer_variables().items()}
        files = {
            WEIGHTS: lambda stream: write_weights(stream, arrays),
            OPTIMIZER: lambda stream: write_arrays(stream, slots),
            STATE: _to_json(state),
        }
        name = name_of(state.step)
        self.folder.commit(name, files)
        self._saved.add(name)
        return name

    def load_weights(self, name: str, model) -> None:
        """Raises Damaged."""
        arrays = self.weights(name)
        if [array.shape for array in arrays] != [tuple(variable.shape) for variable in model.weights]:
            raise _damaged(name, WEIGHTS, "is of another network")
        for variable, array in zip(model.weights, arrays, strict=True):
            variable.assign(array)

    def load(self, name: str, learner) -> None:
        """Weights, optimizer and loss scale into a learner. Raises Damaged."""
        self.load_weights(name, learner.model)
        variables = learner.optimizer_variables()
        shapes = {key: tuple(variable.shape) for key, variable in variables.items()}
        for key, array in self._optimizer(name, shapes):
            variables[key].assign(array)

    def prune(self, keep_best: int) -> None:
        """Keep the `keep_best` best by score and always the last that verifies; remove the rest, torn ones too."""
        readable = dict(self._readable())
        last = next((name for name in readable if name in self._saved or self._verifies(name)), None)
        if last is None:
            return
        scored = sorted((-state.score, name) for name, state in readable.items() if state.score is not None)
        kept = {name for _, name in scored[:keep_best]} | {last, readable[last].best_checkpoint}
        for name in self.folder.names():
            if name.startswith(("step_", ".tmp-step_")) and name not in kept:
                self.folder.delete(name)


def _to_json(state: State) -> bytes:
    return json.dumps(asdict(state)).encode()


def _damaged(name: str, file: str, what: str) -> Damaged:
    return Damaged(f"{name} is damaged ({file}: {what})")
