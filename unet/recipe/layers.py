"""The U-Net (Ronneberger, Fischer, Brox, 2015) in the published pet-segmentation form, and its dropout.

An encoder block is two 3x3 convolutions (he_normal, ReLU), 2x2 max pooling and dropout; a decoder block a 3x3
stride-2 transposed convolution, concatenation with the encoder's output, dropout and two convolutions. The last
1x1 convolution gives logits; whoever needs probabilities takes their softmax in float32.
"""

import contextlib
from dataclasses import dataclass

import keras
import tensorflow as tf

LAST = "channels_last"
SAME = {"padding": "same", "data_format": LAST}
"""Said in full: in somebody else's program Keras' own defaults may be others."""


def build_unet(
    image_size: int = 128, base_filters: int = 64, depth: int = 4, dropout: float = 0.3, num_classes: int = 3
) -> keras.Model:
    """A U-Net from images float (N, S, S, 3) in [0, 1] to logits float32 (N, S, S, num_classes).

    With the defaults it has 34,513,475 parameters. The compute dtype is that of Keras' current dtype policy; the
    weights and the logits are float32 under every policy. `image_size` must be a multiple of 2**depth
    (`unet.config` refuses others with a sentence).
    """
    layer_index = iter(range(2 * depth))

    def convolutions(x, filters):
        for _ in range(2):
            x = keras.layers.Conv2D(filters, 3, **SAME, activation="relu", kernel_initializer="he_normal")(x)
        return x

    inputs = x = keras.Input((image_size, image_size, 3), dtype="float32", name="image")
    skips = []
    for level in range(depth):
        x = convolutions(x, base_filters * 2**level)
        skips.append(x)
        x = keras.layers.MaxPooling2D(2, data_format=LAST)(x)
        x = KeyedDropout(dropout, next(layer_index))(x)
    x = convolutions(x, base_filters * 2**depth)
    for level in reversed(range(depth)):
        x = keras.layers.Conv2DTranspose(base_filters * 2**level, 3, strides=2, **SAME)(x)
        x = keras.layers.Concatenate(axis=-1)([x, skips[level]])
        x = KeyedDropout(dropout, next(layer_index))(x)
        x = convolutions(x, base_filters * 2**level)
    x = keras.layers.Conv2D(num_classes, 1, data_format=LAST)(x)
    logits = keras.layers.Activation("linear", dtype="float32", name="logits")(x)
    return keras.Model(inputs, logits, name="unet")


@dataclass(frozen=True)
class DropoutKey:
    """What the dropout of one forward pass depends on, and nothing else.

    Attributes:
        seed: the run's seed.
        step: int64 scalar tensor, the step being trained, from 1.
        position: int64 scalar tensor, where in the global batch the first sample of this forward pass stands.
        rate: float64 scalar tensor, the share to drop, so that one traced graph serves many; None: the layers' own.
    """

    seed: int
    step: tf.Tensor
    position: tf.Tensor
    rate: tf.Tensor | None = None


_active_key: list[DropoutKey] = []


@contextlib.contextmanager
def dropout_key(key: DropoutKey):
    """Give every `KeyedDropout` called inside (while a training step is traced) its key."""
    _active_key.append(key)
    try:
        yield
    finally:
        _active_key.pop()


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
        if not _active_key:
            raise RuntimeError("Training needs a key for dropout: call the model inside `dropout_key(...)`.")
        key = _active_key[-1]
        rate = tf.constant(self.rate, tf.float64) if key.rate is None else key.rate
        scale = tf.cast(tf.cast(1 / (1 - rate), tf.float32), inputs.dtype)
        return inputs * tf.cast(self._keep(inputs, key, rate), inputs.dtype) * scale

    def _keep(self, inputs, key: DropoutKey, rate):
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
