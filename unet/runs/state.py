"""Where a run stands, beside its weights: the `state.json` of a checkpoint."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, TypeAdapter

from unet.classes import PETS, Classes, ClassInfo
from unet.config import ModelSettings
from unet.data.order import FIRST_WINDOW
from unet.runs.arrays import Shapes, weight_shapes

NAME = r"step_\d{8,}"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
Count = Annotated[int, Field(ge=0)]


@dataclass
class State:
    """Where a run stands, beside its weights.

    Attributes:
        epoch: the epoch in which the next step lies, from 1.
        epoch_step: how many steps of that epoch are done.
        step: steps done in all.
        score: val mean IoU of these weights if they stand at an epoch's end, else None.
        best_score, best_epoch, best_checkpoint: the best epoch so far by val mean IoU.
        validation: the scores of the best epoch; of the last one while none has a mean IoU.
        stale_epochs: epochs with a score since the best one.
        skipped_steps: steps passed over for numbers that were not finite.
        loss_sum, pixels: training sums of the epoch under way.
        taken_over: whose weights a trial of a sweep took over last, as run/checkpoint.
        history: the lines of `metrics.jsonl` so far.
        seed, data_digest, settings: what the run is.
        classes: what the network's outputs mean, as [name, [red, green, blue]]; at first they were always the pets'.
        window: chunks of a window of the order of its samples (`unet.data.order`).
        equality: what bit-equal continuation depends on (workers, threads, precision, device, versions, …).
    """

    seed: Count
    data_digest: str
    settings: dict
    equality: dict
    epoch: Annotated[int, Field(ge=1)] = 1
    epoch_step: Count = 0
    step: Count = 0
    score: float | None = None
    best_score: float | None = None
    best_epoch: int | None = None
    best_checkpoint: Name | None = None
    stale_epochs: Count = 0
    skipped_steps: Count = 0
    loss_sum: float = 0.0
    pixels: float = 0.0
    validation: dict | None = None
    taken_over: str | None = None
    history: list[dict] = field(default_factory=list)
    classes: list[tuple[str, tuple[int, int, int]]] = field(default_factory=lambda: list(PETS.classes))
    window: Annotated[int, Field(ge=1)] = FIRST_WINDOW

    @property
    def chosen(self) -> str:
        """The checkpoint that the run's name means: its best; this one, its last, while no epoch has a score."""
        return self.best_checkpoint or name_of(self.step)

    @property
    def class_infos(self) -> Classes:
        return tuple(ClassInfo(name, tuple(colour)) for name, colour in self.classes)

    def shapes(self) -> Shapes:
        """The weights of its network, by path.

        Raises:
            InputError: the settings name none.
        """
        network = ModelSettings(**{key: self.settings.get(key) for key in ("base_filters", "depth")})
        return weight_shapes(network.base_filters, network.depth, len(self.classes))


_STATE = TypeAdapter(State)


_LATER = {"taken_over", "classes", "window"}
"""What the states of older runs lack."""


def name_of(step: int) -> str:
    return f"step_{step:08d}"
