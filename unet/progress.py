"""How far a training is, as its workers report it and its terminal shows it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Live:
    """The state of the current step, for the progress line.

    Attributes:
        epoch, step: from 1; `step` within the epoch.
        steps: in the epoch.
        phase: "train", "val" or "test".
        loss: mean per pixel over the epoch so far.
        images_per_second, data_wait_fraction: over the epoch so far.
        seconds_per_step: for the time left.
        elapsed: seconds of the run, where --minutes end it.
    """

    epoch: int
    step: int
    steps: int
    phase: str
    loss: float | None = None
    images_per_second: float | None = None
    data_wait_fraction: float | None = None
    seconds_per_step: float | None = None
    elapsed: float | None = None


@dataclass
class Clock:
    """Where the time of an epoch's training goes. Validation has no part in it."""

    images: int = 0
    waiting: float = 0.0
    stepping: float = 0.0
    steps: int = 0

    def add(self, images: int, waiting: float, stepping: float) -> None:
        self.steps, self.images = self.steps + 1, self.images + images
        self.waiting, self.stepping = self.waiting + waiting, self.stepping + stepping

    @property
    def images_per_second(self) -> float | None:
        return self.images / (self.waiting + self.stepping) if self.images else None

    @property
    def data_wait_fraction(self) -> float | None:
        return self.waiting / (self.waiting + self.stepping) if self.images else None
