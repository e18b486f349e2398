"""Keras models of described networks, and what a training pass needs beside its inputs.

Whoever needs probabilities takes the softmax of a network's logits in float32.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import keras
import tensorflow as tf

from unet.recipe.network import INPUT, Layer, ModelSettings, Network, describe

LAST = {"data_format": "channels_last"}
SAME = {"padding": "same"} | LAST
"""Said in full: in somebody else's program Keras' own defaults may be others."""


def build_unet(
    image_size: int = 128, base_filters: int = 64, depth: int = 4, dropout: float = 0.3, num_classes: int = 3
) -> keras.Model:
    """A U-Net as `build` makes it; with the defaults it has 34,513,475 parameters."""
    settings = ModelSettings(base_filters=base_filters, depth=depth, dropout=dropout)
    return build(describe(settings, num_classes), image_size)


def build(network: Network, image_size: int) -> keras.Model:
    """A model from images float (N, S, S, 3) in [0, 1] to logits float32 (N, S, S, C).

    The compute dtype is that of Keras' current dtype policy; weights and logits are float32 under every policy. Its
    variables have the names (`path`) of the description. `image_size` must be a multiple of `network.stride`
    (`unet.config` refuses others with a sentence).
    """
    inputs = keras.Input((image_size, image_size, 3), dtype="float32", name=INPUT)
    outputs = {INPUT: inputs}
    for layer in network.layers:
        before = [outputs[name] for name in layer.inputs]
        outputs[layer.name] = BUILDERS[layer.kind](layer)(before if len(before) > 1 else before[0])
    logits = keras.layers.Activation("linear", dtype="float32", name="logits")(outputs[network.layers[-1].name])
    return keras.Model(inputs, logits, name="unet")


BUILDERS: dict[str, Callable[[Layer], keras.layers.Layer]] = {
    "convolution": lambda layer: keras.layers.Conv2D(layer.channels, name=layer.name, **SAME, **layer.options),
    "transposed_convolution": lambda layer: keras.layers.Conv2DTranspose(
        layer.channels, name=layer.name, **SAME, **layer.options
    ),
    "pooling": lambda layer: keras.layers.MaxPooling2D(name=layer.name, **LAST, **layer.options),
    "dropout": lambda layer: KeyedDropout(name=layer.name, **layer.options),
    "concatenation": lambda layer: keras.layers.Concatenate(axis=-1, name=layer.name),
}
"""The Keras layer of each kind in `unet.recipe.network.KINDS`."""


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
        moved: the moving averages that the step is to bring up to date, by the name of their variable.
    """

    seed: int
    step: tf.Tensor
    position: tf.Tensor
    dropout: tf.Tensor | None = None
    samples: tf.Tensor | None = None
    moved: dict[str, "MovingAverage"] = field(default_factory=dict)

    def move(self, variable: keras.Variable, total: tf.Tensor, count: tf.Tensor, momentum: float) -> None:
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
    momentum: float

    def move(self) -> None:
        mean = self.total / tf.maximum(self.count, 1.0)
        self.variable.assign(self.momentum * self.variable + (1 - self.momentum) * mean)


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


class KeyedDropout(keras.layers.Layer):
    """Dropout whose mask is a pure function of (seed, step, position in the global batch, layer).

    Neither a resume nor the number of workers changes it, which Keras' own layer cannot promise: its seed
    generator is not saved with the weights, and all workers would draw the same masks. Philox counts blocks of
    four 32-bit words, so the masks of a slice of the batch are the stream entered at the slice's own count, and
    a worker draws no more than it needs. Sixteen bits decide about an element (the rate is rounded to 1/65536),
    which halves the cost of the usual 32.
    """

    def __init__(self, rate: float, layer_index: int, **kwargs):
        super().__init__(**kwargs)
        self.rate, self.layer_index = rate, layer_index

    def call(self, inputs, training=False):
        if not training or self.rate == 0:
            return inputs
        key = current_pass()
        rate = tf.constant(self.rate, tf.float64) if key.dropout is None else key.dropout
        scale = tf.cast(tf.cast(1 / (1 - rate), tf.float32), inputs.dtype)
        return inputs * tf.cast(self._keep(inputs, key, rate), inputs.dtype) * scale

    def _keep(self, inputs: tf.Tensor, key: TrainingPass, rate: tf.Tensor) -> tf.Tensor:
        """A bool tensor of the inputs' shape: which elements stay."""
        shape = tf.shape(inputs, out_type=tf.int64)
        elements = inputs.shape[1] * inputs.shape[2] * inputs.shape[3]
        blocks = -(-elements // 8)  # a Philox block is 4 words of 32 bits: 8 decisions of 16 bits
        words = tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=tf.stack([shape[0], blocks * 4]),
            key=tf.constant([key.seed * 65536 + self.layer_index], tf.uint64),
            counter=tf.cast(tf.stack([key.position * blocks, key.step]), tf.uint64),
            alg=1,  # Philox
            dtype=tf.uint32,
        )
        bits = tf.reshape(tf.bitcast(words, tf.uint16), [shape[0], blocks * 8])[:, :elements]
        return tf.reshape(bits, shape) >= tf.cast(tf.round(rate * 65536), tf.uint16)

    def get_config(self):
        return super().get_config() | {"rate": self.rate, "layer_index": self.layer_index}
