"""The exponential moving average of a network's weights, which is scored and packaged in their place.

Polyak and Juditsky (1992) for the idea; the decay rises with the steps, as in TensorFlow's own, so that the first
weights are soon forgotten.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unet.recipe.network import Shapes

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

AVERAGE = "average/"
"""What the names of averages begin with, among all that a step changes."""


def variable_shapes(weights: Shapes) -> Shapes:
    """The averages of these weights."""
    return {f"{AVERAGE}{name}": shape for name, shape in weights.items()}


class Average:
    """Follows weights, and what else a network holds: the moving averages of its norms too."""

    def __init__(self, weights: "Sequence[keras.Variable]", decay: float):
        import tensorflow as tf

        self._weights, self._decay = weights, decay
        self._averages = [tf.Variable(tf.convert_to_tensor(weight), trainable=False) for weight in weights]

    def follow(self, updates: "tf.Tensor") -> None:
        """After the update that is number `updates`, from 1."""
        import tensorflow as tf

        from unet.recipe.passes import kept

        way = 1 - kept(self._decay, updates)
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.assign_add(way * (tf.convert_to_tensor(weight) - average))

    def variables(self) -> "dict[str, tf.Variable]":
        """By the names of `variable_shapes`."""
        return {f"{AVERAGE}{w.path}": average for w, average in zip(self._weights, self._averages, strict=True)}
