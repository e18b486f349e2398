"""Everything that a training step depends on, and what follows from it without TensorFlow."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from unet.recipe import averaging, optimizer
from unet.recipe.augment import AugmentSettings
from unet.recipe.loss import AUTO_WEIGHTS, LossSettings
from unet.recipe.network import ModelSettings, Network, Shapes
from unet.recipe.networks import describe
from unet.recipe.optimizer import OptimizerSettings
from unet.recipe.start import StartSettings
from unet.settings import SettingsGroup

AUTO = "auto"
"""The precision that is chosen when the run begins, by what its machines have."""
Precision = Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"]
WEIGHTS = "weights/"
"""What the names of the network's own weights begin with, among all that a step changes."""


class TrainingSettings(SettingsGroup):
    """How the network learns."""

    epochs: Annotated[int | None, Field(ge=1)] = None
    """Passes over the training samples. None: 10, or as many as --minutes allow."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Samples in a global batch, which is divided among the workers."""
    precision: Precision = "auto"
    """Precision of the training step. auto: bfloat16 if every worker's processor or GPU computes it fast, float16 if
    every GPU computes that, else float32. Scores are always computed in float32."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is not finite: stop the run, or skip the step."""
    patience: Annotated[int | None, Field(ge=1)] = None
    """Stop after this many epochs without a better val mean IoU. None: never."""
    grad_shards: Annotated[int, Field(ge=1)] = 1
    """Split each batch into this many equal parts and sum their gradients in a fixed order. With 2 parts and one
    thread per worker, one worker and two give the same numbers."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initial weights, sample order, augmentation and dropout."""


PARTS: dict[str, type[SettingsGroup]] = {
    "model": ModelSettings,
    "training": TrainingSettings,
    "optimizer": OptimizerSettings,
    "loss": LossSettings,
    "augment": AugmentSettings,
    "start": StartSettings,
}
"""The groups of settings of a recipe."""


class Recipe(SettingsGroup):
    """What a training step depends on, and nothing else: a `Learner` gets no other settings.

    Attributes:
        image_size: side of the network's square input, in pixels.
        classes: the network's outputs, 1 to 255.
    """

    image_size: Annotated[int, Field(ge=1)]
    classes: Annotated[int, Field(ge=1, le=255)]
    model: ModelSettings
    training: TrainingSettings
    optimizer: OptimizerSettings
    loss: LossSettings
    augment: AugmentSettings
    start: StartSettings = StartSettings()

    @model_validator(mode="after")
    def _has_a_weight_for_each_class(self):
        if self.loss.class_weights != AUTO_WEIGHTS:
            self.loss.weights(self.classes)
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any], classes: int) -> "Recipe":
        """From flat settings, as a run saves them, of which it takes its own.

        Raises:
            InputError: a value does not fit.
        """
        parts = {name: {key: values[key] for key in part.model_fields if key in values} for name, part in PARTS.items()}
        return cls.model_validate({"image_size": values.get("image_size"), "classes": classes, **parts})

    @cached_property
    def network(self) -> Network:
        return describe(self.model, self.classes)

    @cached_property
    def variables(self) -> Shapes:
        """The shape of everything that a step changes, by name: weights, optimizer, averages, loss scale.

        `Learner.variables` holds the variables themselves. Saving, loading, synchronising, restarting and packaging go
        by these names and know no others.
        """
        weights = {f"{WEIGHTS}{name}": shape for name, shape in self.network.variables.items()}
        slots = optimizer.variable_shapes(self.optimizer, self.network.trainable)
        found = weights | {f"optimizer/{name}": shape for name, shape in slots.items()}
        found |= averaging.variable_shapes(self.network.variables) if self.averages else {}
        return found | {"loss_scale": (), "good_steps": ()}

    @property
    def averages(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self.optimizer.ema_decay > 0

    @cached_property
    def scored(self) -> dict[str, str]:
        """The variable that is scored, packaged and predicted with in the place of each weight, by their names.

        The weight itself, or its moving average.
        """
        prefix = averaging.AVERAGE if self.averages else WEIGHTS
        return {name: f"{prefix}{name}" for name in self.network.variables}

    @property
    def scores_its_weights(self) -> bool:
        return not self.averages

    @property
    def checkpoint_bytes(self) -> int:
        """What its variables take in a file."""
        return 4 * sum(map(math.prod, self.variables.values()))


GIVEN_TO_EACH_STEP: dict[str, set[str]] = {
    "optimizer": {"learning_rate", "schedule", "warmup"},
    "model": {"dropout"},
    "augment": {"augment", "mix", "augment_except_last"},
}
"""Settings that a traced step does not hold, since they come with its arguments."""


def traced_key(recipe: Recipe) -> str:
    """Equal for recipes that one traced step and its initial weights serve.

    All settings count but those of `GIVEN_TO_EACH_STEP`: one that is new costs a trace, and never a number.
    """
    # Where nothing is dropped the graph has no dropout at all; nor has it what neither varies nor mixes.
    parts = [number > 0 for number in (recipe.model.dropout, recipe.augment.augment, recipe.augment.mix)]
    return f"{recipe.model_dump_json(exclude=GIVEN_TO_EACH_STEP)} {parts}"
