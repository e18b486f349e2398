"""What somebody might add to the recipe: a second term of the loss, and a layer with statistics of its own."""

import keras
import tensorflow as tf

from unet.recipe import layers, network, recipe, terms
from unet.recipe.network import INPUT, Kind, Layer, Network
from unet.recipe.passes import current_pass

MOMENTUM = 0.75
CENTRED = Network(
    (
        Layer("conv", "convolution", (INPUT,), 4, 1, {"kernel_size": 3, "kernel_initializer": "he_normal"}),
        Layer("centre", "centring", ("conv",), 4, 1),
        Layer("norm", "batch_norm", ("centre",), 4, 1, {"momentum": MOMENTUM, "epsilon": 1e-3}),
        Layer("head", "convolution", ("norm",), 3, 1, {"kernel_size": 1}),
    )
)
"""One convolution, a centring of its output, a batch norm, and the head."""


class ToyOverlap:
    """One minus the share of probability that falls on the true class of a pixel, by the ratio of two global sums.

    Both depend on the logits, so its gradient over a batch is no mean of those over parts of it.
    """

    size, is_mean = 2, False

    def __init__(self, settings, classes):
        pass

    def sums(self, pixels):
        import tensorflow as tf

        probabilities = tf.nn.softmax(pixels.logits)
        true = tf.gather(probabilities, pixels.labels, batch_dims=3)
        valid = tf.cast(pixels.valid, tf.float32)
        return [pixels.add(true * valid), pixels.add(tf.reduce_sum(probabilities**2, -1) * valid)]

    def mean(self, sums, ops):
        return 1 - sums[0] / (sums[1] + 1), 1.0


class Centring(keras.layers.Layer):
    """Takes the mean of its micro-shard's samples away by channel, and of the moving mean where nothing is trained."""

    def build(self, shape):
        self.mean = self.add_weight(name="moving_mean", shape=shape[-1:], initializer="zeros", trainable=False)

    def call(self, inputs, training=False):
        if not training:
            return inputs - tf.cast(self.mean, inputs.dtype)
        there = tf.cast(current_pass().samples, tf.float32)
        total = tf.einsum("nhwc,n->c", tf.cast(inputs, tf.float32), there)
        count = tf.reduce_sum(there) * inputs.shape[1] * inputs.shape[2]
        current_pass().move(self.mean, total, count, MOMENTUM)
        return inputs - tf.cast(total / tf.maximum(count, 1.0), inputs.dtype)


def add_term(patch) -> None:
    """Let `--loss` know the overlap as `toy`; `patch` is pytest's monkeypatch."""
    patch.setitem(terms.TERMS, "toy", ToyOverlap)


def add_layer(patch) -> None:
    """Let the network of every recipe be `CENTRED`."""
    kind = Kind("centring", lambda layer, channels: {"moving_mean": (channels,)}, statistics=("moving_mean",))
    patch.setitem(network.KINDS, "centring", kind)
    patch.setitem(layers.BUILDERS, "centring", lambda layer: Centring(name=layer.name))
    patch.setattr(recipe, "describe", lambda settings, classes: Network(CENTRED.layers))
