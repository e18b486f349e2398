"""Where a run stands, beside its weights: the `state.json` of a checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from unet.classes import Classes, ClassInfo
from unet.errors import Damaged, InputError, first_line
from unet.recipe.recipe import Recipe

STATE = "state.json"

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
        seconds: since the run began, over all its starts and up to this checkpoint: of training and what goes with it.
        planned_steps: how many steps it is to have; None until that can be estimated (--minutes).
        learning_rate: of the last step.
        skipped_steps: steps passed over for numbers that were not finite.
        loss_sums: sums of the loss' terms over the finite steps of the epoch under way; empty before the first.
        taken_over: whose weights a trial of a sweep took over last, as run/checkpoint.
        history: the lines of `metrics.jsonl` so far.
        seed, data_digest, settings: what the run is.
        classes: what the network's outputs mean, as [name, [red, green, blue]].
        window: chunks of a window of the order of its samples (`unet.data.order`).
        variables: the shapes of all that its steps change, as they were when it was written.
        equality: what bit-equal continuation depends on (workers, threads, precision, device, versions, …).
    """

    seed: Count
    data_digest: str
    settings: dict
    equality: dict
    classes: list[tuple[str, tuple[int, int, int]]]
    window: Annotated[int, Field(ge=1)]
    epoch: Annotated[int, Field(ge=1)] = 1
    epoch_step: Count = 0
    step: Count = 0
    score: float | None = None
    best_score: float | None = None
    best_epoch: int | None = None
    best_checkpoint: Name | None = None
    stale_epochs: Count = 0
    seconds: Annotated[float, Field(ge=0)] = 0.0
    planned_steps: Count | None = None
    learning_rate: float | None = None
    skipped_steps: Count = 0
    loss_sums: list[float] = field(default_factory=list)
    validation: dict | None = None
    taken_over: str | None = None
    history: list[dict] = field(default_factory=list)
    variables: dict[str, list[int]] = field(default_factory=dict)

    @property
    def chosen(self) -> str:
        """The checkpoint that the run's name means: its best; this one, its last, while no epoch has a score."""
        return self.best_checkpoint or name_of(self.step)

    @property
    def class_infos(self) -> Classes:
        return tuple(ClassInfo(name, colour) for name, colour in self.classes)

    def add_losses(self, sums: Sequence[float]) -> None:
        """Count the sums of a finite step to the epoch under way."""
        self.loss_sums = [a + b for a, b in zip(self.loss_sums, sums, strict=True)] if self.loss_sums else list(sums)

    def recipe(self) -> Recipe:
        """What its steps depend on.

        Raises:
            InputError: the settings are not those of a training.
        """
        return Recipe.of(self.settings, len(self.classes))


_STATE = TypeAdapter(State)


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def parsed(name: str, content: bytes) -> State:
    """The state of a checkpoint. Raises Damaged."""
    try:
        state = _STATE.validate_json(content, strict=True)
        known = from_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise damaged(name, STATE, f"{where}: {first['msg']}") from error
    if missing := [f.name for f in fields(State) if f.name not in known]:
        raise damaged(name, STATE, f"lacks {missing[0]}")
    if name_of(state.step) != name:
        raise damaged(name, STATE, f"is of step {state.step}")
    try:
        state.recipe()
    except InputError as error:
        raise damaged(name, STATE, first_line(error)) from error
    return state


def to_json(state: State) -> bytes:
    return json.dumps(asdict(state)).encode()


def damaged(name: str, file: str, what: str) -> Damaged:
    """Of a file of the checkpoint of that name."""
    return Damaged(f"{name} is damaged ({file}: {what})")
