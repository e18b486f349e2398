"""How weights follow their gradient: the optimizer, what it remembers, and the rate of each step."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from unet.recipe.network import Shapes
from unet.settings import SettingsGroup

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

SLOTS = ("momentum", "velocity")
"""What Adam remembers of each weight, by Keras' names."""


class OptimizerSettings(SettingsGroup):
    """How the weights follow the gradient."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the Adam optimizer."""
    clip_norm: Annotated[float | None, Field(gt=0)] = None
    """Clip the gradient of the global batch to this norm. None: no clipping."""


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """The rate of a step, counted from 1 over the whole run, of a run that is to have so many steps.

    `steps` follows from `--epochs`, which may change when a run continues: a schedule that depends on it must say
    what becomes of the rate then.
    """
    return settings.learning_rate


def variable_shapes(trainable: Shapes) -> Shapes:
    """What the optimizer remembers of such weights: its count of steps, and `<weight>/<slot>`."""
    return {"iteration": ()} | {f"{name}/{slot}": shape for name, shape in trainable.items() for slot in SLOTS}


class Optimizer:
    """The optimizer of a model's weights.

    Its rate is no part of what it remembers: it comes with every step.
    """

    def __init__(self, weights: "list[keras.Variable]"):
        import keras

        self._keras = keras.optimizers.Adam()
        self._keras.build(weights)
        self._weights = weights

    def apply(self, gradients: "list[tf.Tensor]", rate: "tf.Tensor") -> None:
        """Update the weights, in their order."""
        self._keras.learning_rate.assign(rate)
        self._keras.apply(gradients, self._weights)

    def variables(self) -> "dict[str, keras.Variable]":
        """What it remembers, by the names of `variable_shapes`."""
        by_path = {variable.path: variable for variable in self._keras.variables}
        own = self._keras.name
        found = {"iteration": by_path[f"{own}/iteration"]}
        for weight in self._weights:
            flat = weight.path.replace("/", "_")
            found |= {f"{weight.path}/{slot}": by_path[f"{own}/{flat}_{slot}"] for slot in SLOTS}
        return found
