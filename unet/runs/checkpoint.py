"""Checkpoints: a run's own truth, whole or passed over, of plain formats that cannot run code.

`checkpoints/step_00000200/{model.weights.h5, optimizer.npz, state.json, COMMIT}`; `COMMIT` holds the size and sha256 of
the others. Whatever is read is compared with it first. Ray's own snapshot is not used.

Why: docs/decisions.md#a-checkpoint-carries-its-epochs
"""

import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from unet.config import CONFIG, TrainSettings
from unet.errors import Damaged, InputError, RunFailed, first_line
from unet.recipe.recipe import WEIGHTS as PREFIX
from unet.runs.arrays import arrays_file, read_arrays, read_weights, weights_file
from unet.runs.state import NAME, STATE, State, damaged, name_of, parsed, to_json
from unet.storage import MARKER, Folder

if TYPE_CHECKING:
    from unet.recipe.step import Learner

WEIGHTS, OPTIMIZER = "model.weights.h5", "optimizer.npz"
FILES = (WEIGHTS, OPTIMIZER, STATE)
STATE_BYTES = 2**27
"""No state is larger (a line of history has about 1 kB), so no more is read."""


_Files = dict[str, bytes | memoryview]


@dataclass(frozen=True)
class _Saved:
    """What is kept of a checkpoint in memory: what decides whether it is kept, and the bytes of its `FILES`."""

    score: float | None
    best_checkpoint: str | None
    sizes: list[int]


class Checkpoints:
    """The checkpoints of one run; `run` is its folder."""

    def __init__(self, run: Folder):
        self.run, self.folder = run, run / "checkpoints"
        self._saved: dict[str, _Saved] = {}
        self._read: dict[str, _Saved] = {}
        self._unsaved: dict[str, tuple[_Files, _Saved]] = {}

    def whole(self) -> list[str]:
        """The names of those with a marker and files of the right size, oldest first; digests are not compared."""
        return self._whole_of(self.folder.sizes())

    def _whole_of(self, sizes: Mapping[str, int]) -> list[str]:
        names = {file.partition("/")[0] for file in sizes}
        return [name for name in sorted(names) if re.fullmatch(NAME, name) and self._is_whole(name, sizes)]

    def _names(self) -> list[str]:
        return [name for name in self.folder.names() if re.fullmatch(NAME, name)]

    def _is_whole(self, name: str, sizes: Mapping[str, int]) -> bool:
        if f"{name}/{MARKER}" not in sizes:
            return False
        found = [sizes.get(f"{name}/{file}") for file in FILES]
        if name in self._saved:
            return found == self._saved[name].sizes
        try:
            known = self.folder.marker(name)
        except Damaged:
            return False
        return all(found) and found == [known.get(file, (0, ""))[0] for file in FILES]

    def latest(self) -> tuple[str, State] | None:
        """The last whole one whose state can be read. After `resume` that is the one to start from, or a newer one."""
        return next(self.readable(), None)

    def readable(self) -> Iterator[tuple[str, State]]:
        """The whole ones whose state can be read, newest first."""
        for name in reversed(self.whole()):
            try:
                yield name, self.state(name)
            except Damaged:
                continue

    def state(self, name: str) -> State:
        """Raises Damaged."""
        if (self.folder.size(f"{name}/{STATE}") or 0) > STATE_BYTES:
            raise damaged(name, STATE, f"more than {STATE_BYTES} bytes")
        return parsed(name, self.folder.read_committed(name, STATE))

    def arrays(self, name: str, state: State | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Everything that a step changes, by the names of `Recipe.variables`. Raises Damaged, InputError."""
        yield from _arrays(name, state or self.state(name), self._content(name))

    def weights(self, name: str) -> dict[str, np.ndarray]:
        """The weights that are scored, by the names of the network's. Raises Damaged, InputError."""
        state = self.state(name)
        scored = state.recipe().scored
        found = dict(_arrays(name, state, self._content(name), set(scored.values())))
        return {weight: found[variable] for weight, variable in scored.items()}

    def _content(self, name: str) -> Callable[[str], io.BytesIO]:
        return lambda file: io.BytesIO(self.folder.read_committed(name, file))

    def verify(self, name: str, settings: TrainSettings | None = None) -> State:
        """Read all of it, as a start from it would: its state.

        Raises:
            Damaged: it is not what was written, or a training with these settings has other variables.
            InputError: the code of then described other variables.
        """
        state = self.state(name)
        if settings and settings.recipe(len(state.classes)).variables != state.recipe().variables:
            raise damaged(name, STATE, "is of another network")
        for _ in self.arrays(name, state):
            pass
        return state

    def resume(self, settings: TrainSettings) -> tuple[tuple[str, State] | None, list[str]]:
        """The last one that verifies, to start from. Damaged ones after it do not count any more from here on.

        Returns:
            Its name and state, or None if none was ever written; and a sentence for each that was passed over.

        Raises:
            InputError: all are damaged.
        """
        found: tuple[str, State] | None = None
        damages: dict[str, str] = {}
        unfinished: dict[str, str] = {}
        self._finish_replacing()
        names = self._names()
        for name in reversed(names):
            try:
                found = (name, self.verify(name, settings))
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
        start = f"continuing from {found[0]}" if found else "starting from the beginning"
        passed = damages | unfinished
        sentences = [f"{passed[name]}: {start}" for name in sorted(passed, reverse=True)]
        return found, sentences + (self._repair_best(*found) if found else [])

    def _finish_replacing(self) -> None:
        """Where a kill fell between the two renamings that replace a checkpoint, both copies have other names."""
        copies: dict[str, list[str]] = {}
        for leftover in self.folder.names():
            if (torn := re.match(rf"\.tmp-({NAME})-", leftover)) and self.folder.committed(leftover):
                copies.setdefault(torn[1], []).append(leftover)
        for name, both in copies.items():
            if len(both) > 1 and not self.folder.exists(name):
                (self.folder / both[-1]).rename(self.folder / name)

    def _repair_best(self, name: str, state: State) -> list[str]:
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
        scored = [(-s.score, n) for n, s in self.readable() if s.score is not None and n <= name]
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
        self.folder.commit(name, files | {STATE: to_json(state)})
        return [f"{damage}: the best that is left is {best or 'still to come'}"]

    def _verifies(self, name: str) -> bool:
        try:
            self.verify(name)
        except Damaged:
            return False
        return True

    def save(self, learner: "Learner", state: State) -> str:
        """Write one, atomically; the same step is written over.

        One that could not be written before is written first if it is the best: those that follow need it.

        Raises:
            StorageFailed: it cannot be written, or the run's folder is gone. Nothing has changed then.
            RunFailed: nothing could continue from it, since the recipe describes other variables than its steps have.
        """
        name, files = self._made(learner, state)
        own = _Saved(state.score, state.best_checkpoint, [memoryview(files[file]).nbytes for file in FILES])
        best = {n: earlier for n, earlier in self._unsaved.items() if n == state.best_checkpoint}
        self._unsaved = best | {name: (files, own)}
        self.run.require(CONFIG)
        for each, (content, about) in list(self._unsaved.items()):
            self.folder.commit(each, content)
            self._saved[each] = about
            del self._unsaved[each]
        return name

    def _made(self, learner: "Learner", state: State) -> "tuple[str, _Files]":
        """A checkpoint's name and files. Raises RunFailed."""
        name, recipe, variables = name_of(state.step), state.recipe(), learner.variables()
        state.variables = {key: list(variable.shape) for key, variable in variables.items()}
        weights = {k.removeprefix(PREFIX): v.numpy() for k, v in variables.items() if k.startswith(PREFIX)}
        try:
            made = {WEIGHTS: weights_file(weights, recipe.network.keras_paths)}
            made[OPTIMIZER] = arrays_file({k: v.numpy() for k, v in variables.items() if not k.startswith(PREFIX)})
            # What a start from it will do.
            for _ in _arrays(name, parsed(name, to_json(state)), made.__getitem__):
                pass
        except (Damaged, InputError, KeyError) as error:
            raise RunFailed(
                f"Nothing could continue from checkpoint {name}, so it was not written: {str(error).rstrip('.')}."
            ) from error
        return name, {file: stream.getbuffer() for file, stream in made.items()} | {STATE: to_json(state)}

    def load(self, name: str, learner: "Learner") -> None:
        """Everything that a step changes into a learner. Raises Damaged, InputError."""
        state = self.state(name)
        if state.recipe().variables != learner.recipe.variables:
            raise damaged(name, STATE, "is of another network")
        learner.load(self.arrays(name, state))

    def prune(self, keep_best: int) -> None:
        """Keep the `keep_best` best by score and always the last that verifies; remove the rest, torn ones too."""
        sizes = self.folder.sizes()
        readable = {name: about for name in reversed(self._whole_of(sizes)) if (about := self._about(name, sizes))}
        last = next((name for name in readable if name in self._saved or self._verifies(name)), None)
        if last is None:
            return
        scored = sorted((-about.score, name) for name, about in readable.items() if about.score is not None)
        kept = {name for _, name in scored[:keep_best]} | {last, readable[last].best_checkpoint}
        for name in {file.partition("/")[0] for file in sizes} - kept:
            if name.startswith(("step_", ".tmp-step_")):
                self.folder.delete(name)
                self._saved.pop(name, None)

    def _about(self, name: str, sizes: Mapping[str, int]) -> "_Saved | None":
        """What is known of a whole one, which is read once; None if its state is damaged."""
        if name in self._saved:
            return self._saved[name]
        if name not in self._read:
            try:
                state = self.state(name)
            except Damaged:
                return None
            self._read[name] = _Saved(state.score, state.best_checkpoint, [sizes[f"{name}/{file}"] for file in FILES])
        return self._read[name]


def _arrays(
    name: str, state: State, content: Callable[[str], io.BytesIO], only: Collection[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """What the files of a checkpoint hold, compared with what the recipe of its state describes.

    Of `only` some variables the files that hold none of them are not read.

    Raises:
        Damaged: they hold something else.
        InputError: when it was written, other variables were described.
    """
    variables = state.recipe().variables
    then = {key: tuple(shape) for key, shape in state.variables.items()}
    for key in sorted(then.keys() | variables.keys()):
        if then.get(key) != variables.get(key):
            raise InputError(
                f"Checkpoint {name} has {key} as {then.get(key, 'absent')}, and this version of the code has it as "
                f"{variables.get(key, 'absent')}: continue with the version that wrote it, or give another --run-name."
            )
    weights = {key.removeprefix(PREFIX): shape for key, shape in variables.items() if key.startswith(PREFIX)}
    others = {key: shape for key, shape in variables.items() if not key.startswith(PREFIX)}
    for file, prefix, read, shapes in ((WEIGHTS, PREFIX, read_weights, weights), (OPTIMIZER, "", read_arrays, others)):
        if only is None or any(prefix + key in only for key in shapes):
            stream = content(file)
            try:
                yield from ((prefix + key, array) for key, array in read(stream, shapes))
            except Exception as error:  # whatever its damaged bytes lead HDF5 or zipfile to
                raise damaged(name, file, first_line(error)) from error
