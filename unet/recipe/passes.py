"""What a training pass needs beside its inputs, and what its layers leave behind."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import keras
import tensorflow as tf

from unet.recipe.network import is_of_encoder


@dataclass
class TrainingPass:
    """What one forward pass of a training step depends on beside its images, and what its layers leave behind.

    Attributes:
        seed: the run's seed.
        step: int64 scalar tensor, the step being trained, from 1.
        position: int64 scalar tensor, where in the global batch the first sample of this pass stands.
        dropout: float64 scalar tensor, the share to drop, so that one traced graph serves many; None: the layers' own.
        samples: bool tensor (N,), which rows hold a sample: the padding of a short batch holds none. None: all. A
            micro-shard may be all padding, so a layer that divides by its samples' spread must stand a spread of 0.
        trains_encoder: whether what comes before the decoder learns.
        moved: the moving averages that the step is to bring up to date, by the name of their variable.
    """

    seed: int
    step: tf.Tensor
    position: tf.Tensor
    dropout: tf.Tensor | None = None
    samples: tf.Tensor | None = None
    trains_encoder: bool = True
    moved: dict[str, "MovingAverage"] = field(default_factory=dict)

    def is_fixed(self, layer: str) -> bool:
        """Whether a layer, by its name, is to be as it is in use."""
        return not self.trains_encoder and is_of_encoder(layer)

    def move(self, variable: keras.Variable, total: tf.Tensor, count: tf.Tensor, momentum: float | tf.Tensor) -> None:
        """Let a variable follow the mean `total / count` over all micro-shards and workers of the step.

        `total` has the shape of the variable, `count` is a scalar; both are sums over this pass. A layer that calls
        this normalises by the statistics of its own pass, which is a micro-shard, so that they do not depend on the
        number of workers; the sums travel with the gradients.
        """
        self.moved[variable.path] = MovingAverage(variable, total, count, momentum)


@dataclass(frozen=True)
class MovingAverage:
    """A variable that follows a mean: `momentum * variable + (1 - momentum) * total / count` after a step."""

    variable: keras.Variable
    total: tf.Tensor
    count: tf.Tensor
    momentum: float | tf.Tensor

    def move(self) -> None:
        mean = self.total / tf.maximum(self.count, 1.0)
        self.variable.assign(self.momentum * self.variable + (1 - self.momentum) * mean)


def kept(decay: float, number: tf.Tensor) -> tf.Tensor:
    """The share of itself that a moving average keeps at its update `number`, from 1: float32, `decay` at most.

    It rises with the updates, as in TensorFlow's own averages, so that what they began with is soon forgotten.
    """
    number = tf.cast(number, tf.float32)
    return tf.minimum(decay, (1 + number) / (10 + number))


_passes: list[TrainingPass] = []


@contextlib.contextmanager
def training_pass(current: TrainingPass) -> Iterator[TrainingPass]:
    """Give the layers called inside (while a training step is traced) their pass."""
    _passes.append(current)
    try:
        yield current
    finally:
        _passes.pop()


def current_pass() -> TrainingPass:
    """The pass that is being traced.

    Raises:
        RuntimeError: none is.
    """
    if not _passes:
        raise RuntimeError("A layer of this network trains in a pass only: call the model inside `training_pass(...)`.")
    return _passes[-1]
