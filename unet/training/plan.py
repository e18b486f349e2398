"""How long a run is to be: by its epochs, or by a clock that counts its training over all starts.

By the clock, rank 0 estimates how many steps there will be, and tells the others; the learning rate goes by that number
and the run ends with it. So no worker reads a clock of its own, and a run that is continued goes on with the recorded
number until it is estimated anew.
"""

import math
from dataclasses import dataclass

from unet.config import TrainSettings
from unet.recipe.optimizer import learning_rate
from unet.recipe.schedule import Horizon
from unet.runs.state import State

MEASURED_STEPS = 20
"""An estimate takes the mean of at least so many steps, if there have been so many."""
ESTIMATES = 20
"""How often the number of steps is estimated at most, beside the ends of epochs: every twentieth of the minutes."""
THAWED = 2.0
"""How many times as long as a frozen step others are taken to be, until there were some."""
FINISH_SECONDS = 8.0
"""What else follows the last epoch: the best weights are read, the model is packaged, pictures are drawn."""
GUESSED_EPOCHS, GUESSED_STEPS = 10, 500
"""How long a run is taken to be at least before anything was measured: its first steps need a rate."""


def planned_steps(settings: TrainSettings, state: State, epoch_steps: int) -> int | None:
    """How many steps a run is to have that stands so; None while nobody can say.

    `state` still has the settings of its last start: where --minutes have changed since, so has the number.
    """
    minutes, before = settings.length.minutes, state.settings.get("minutes")
    if minutes is None:
        assert settings.epochs is not None  # only the clock goes without
        return epoch_steps * settings.epochs
    if state.planned_steps is None or before is None:
        return None
    return state.planned_steps if minutes == before else round(state.planned_steps * minutes / before)


def capped(settings: TrainSettings, planned: int, epoch_steps: int) -> int:
    """So many steps, but no more than those of the epochs that the settings allow."""
    return planned if settings.epochs is None else min(planned, settings.epochs * epoch_steps)


def has_ended(settings: TrainSettings, state: State, planned: int | None) -> bool:
    """Whether the last epoch is behind, the time is over, or patience has run out."""
    patience = settings.training.patience
    if patience is not None and state.stale_epochs >= patience:
        return True
    if settings.epochs is not None and state.epoch > settings.epochs:
        return True
    if settings.length.minutes is None or state.epoch_step or not state.step:
        return False
    return planned is not None and state.step >= planned


def horizon(settings: TrainSettings, planned: int | None, epoch_steps: int) -> Horizon:
    """What the learning rate goes by."""
    steps = planned or max(GUESSED_EPOCHS * epoch_steps, GUESSED_STEPS)
    return Horizon(capped(settings, steps, epoch_steps), epoch_steps)


def change_of_rate(settings: TrainSettings, state: State, planned: int | None, epoch_steps: int) -> str | None:
    """What becomes of the rate where a run goes on with another length, in a sentence; None where nothing does."""
    if planned is None or state.planned_steps is None:
        return None
    step, optimizer = state.step + 1, settings.optimizer
    old = learning_rate(optimizer, step, Horizon(state.planned_steps, epoch_steps))
    new = learning_rate(optimizer, step, horizon(settings, planned, epoch_steps))
    if old == new:
        return None
    if state.step >= state.planned_steps:
        begin = f"The run had ended with a learning rate of {old:.2g}; it goes on at {new:.2g}"
    else:
        begin = f"The learning rate goes on at {new:.2g} instead of {old:.2g}"
    return f"{begin}, as in a run of {settings.length_in_words}."


def steps_that_fit(seconds: float, step: float, epoch_end: float, epoch_steps: int, done: int) -> int:
    """How many more steps fit into so many seconds.

    Args:
        seconds: that are left.
        step: seconds of a step.
        epoch_end: seconds of an epoch's validation and checkpoint, which follow a last part of an epoch as well.
        epoch_steps: steps in an epoch.
        done: steps of the epoch under way that are done.
    """
    to_epoch_end = (epoch_steps - done) * step + epoch_end

    def part(seconds: float, is_begun: bool = False) -> int:
        """Steps of an epoch that is cut: one that is shorter than its validation would change little."""
        training = seconds - epoch_end
        return max(0, math.floor(training / step)) if is_begun or training > epoch_end else 0

    if seconds < to_epoch_end:
        return part(seconds, done > 0)
    epochs, seconds = divmod(seconds - to_epoch_end, epoch_steps * step + epoch_end)
    return epoch_steps - done + int(epochs) * epoch_steps + part(seconds)


@dataclass
class Pace:
    """How fast a run is, as rank 0 measures it.

    Attributes:
        seconds: of the clock, in all.
        epoch_steps: steps in an epoch.
        val_batches, test_batches: of the splits, for a worker; no test batches where none is scored.
        frozen: how many steps of the run leave what comes before the decoder as it is, which costs them less.
        step: seconds of a step of the kind under way, without the first, which traces the graph; None until there was
            another.
        val_batch: seconds of a batch of validation; None until there was one.
        saving: seconds of a checkpoint.
    """

    seconds: float
    epoch_steps: int
    val_batches: int
    test_batches: int
    frozen: float = 0
    step: float | None = None
    val_batch: float | None = None
    saving: float = 0.0
    _steps: int = 0
    _stepping: float = 0.0
    _estimated_at: float = -math.inf
    _was_frozen: bool = False

    def stepped(self, seconds: float, is_frozen: bool = False) -> None:
        if self._was_frozen and not is_frozen:  # what was measured was of other steps
            self.step, self._steps, self._stepping, self._estimated_at = None, 0, 0.0, -math.inf
        self._was_frozen = is_frozen
        self._steps, self._stepping = self._steps + 1, self._stepping + seconds

    def validated(self, seconds: float) -> None:
        self.val_batch = seconds / max(1, self.val_batches)

    def is_due(self, elapsed: float) -> bool:
        """Whether to estimate after the step that comes now: for the first time, again, or because it is the last."""
        enough = self._steps >= MEASURED_STEPS and elapsed - self._estimated_at >= self.seconds / ESTIMATES
        return enough or self._left(elapsed) - self._epoch_end() <= (self.step or 0.0)

    def planned(self, state: State, elapsed: float) -> int | None:
        """How many steps the run is to have in all, so many seconds after its beginning.

        What was planned before, or None, where this start has measured nothing.
        """
        if self._steps >= MEASURED_STEPS or (self._steps and self.step is None):
            measured = self._stepping / self._steps
            # Half of it is what was known before: a machine that others use goes up and down.
            self.step = measured if self.step is None else (self.step + measured) / 2
            self._steps, self._stepping, self._estimated_at = 0, 0.0, elapsed
        left = self._left(elapsed)
        if self.step is None:
            return state.planned_steps if left > 0 else state.step
        if (still := self.frozen - state.step) > 0 and math.isfinite(still):
            thawed = left - still * self.step - math.ceil(still / self.epoch_steps) * self._epoch_end()
            if thawed > 0:
                later = steps_that_fit(thawed, THAWED * self.step, self._epoch_end(), self.epoch_steps, 0)
                return round(self.frozen) + later
        return state.step + steps_that_fit(left, self.step, self._epoch_end(), self.epoch_steps, state.epoch_step)

    def _left(self, elapsed: float) -> float:
        """Seconds for training and validation."""
        finish = FINISH_SECONDS + self.test_batches * self._scored() if self.test_batches else 0.0
        return self.seconds - elapsed - finish

    def _epoch_end(self) -> float:
        return self.val_batches * self._scored() + self.saving

    def _scored(self) -> float:
        """Seconds of a scored batch; before the first, half of a step."""
        return self.val_batch if self.val_batch is not None else (self.step or 0.0) / 2
