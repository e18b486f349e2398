"""Normalisation after a convolution: over a batch, whose moving averages travel with the gradients, or over a sample.

Keras' own layers cost a third of a step in bfloat16 on processors, and know nothing of padding or of other workers.
Their weights and statistics are float32 under every policy.
"""

import keras
import tensorflow as tf

from unet.recipe.passes import current_pass, kept

GROUP = 8
"""Channels of a group, at most."""


class _Norm(keras.layers.Layer):
    """Normalised channels, scaled by gamma and moved by beta."""

    def __init__(self, epsilon: float, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, shape):
        self.gamma = self._channels("gamma", shape, "ones")
        self.beta = self._channels("beta", shape, "zeros")

    def _channels(self, name: str, shape, initializer: str, trainable: bool = True) -> keras.Variable:
        return self.add_weight(
            name=name, shape=shape[-1:], initializer=initializer, trainable=trainable, dtype="float32", autocast=False
        )

    def get_config(self):
        return super().get_config() | {"epsilon": self.epsilon}


class BatchNorm(_Norm):
    """Batch normalisation (Ioffe, Szegedy, 2015) over the samples of a micro-shard, in one fused operation.

    The moving averages are those of the means and variances of micro-shards, by their pixels: what training divides by
    is what is divided by afterwards. (A mean of squares would add the spread of the means, and lose digits.)

    Rows behind the last labelled sample, as the padding of a short batch is, count for nothing and come out as zeros.

    Where it is `fixed`, or part of what a pass does not train, it goes by its moving averages, which stay.
    """

    def __init__(self, momentum: float, epsilon: float, fixed: bool = False, **kwargs):
        super().__init__(epsilon, **kwargs)
        self.momentum, self.fixed = momentum, fixed

    def build(self, shape):
        super().build(shape)
        self.moving_mean = self._channels("moving_mean", shape, "zeros", trainable=False)
        self.moving_variance = self._channels("moving_variance", shape, "ones", trainable=False)

    def call(self, inputs, training=False):
        if not training or self.fixed or current_pass().is_fixed(self.name):
            mean, variance = tf.convert_to_tensor(self.moving_mean), tf.convert_to_tensor(self.moving_variance)
            return self._fused(inputs, mean=mean, variance=variance, is_training=False)[0]
        rows, total = self._rows(inputs), tf.shape(inputs)[0]
        some = tf.maximum(rows, 1)  # of padding alone, one row of it: finite, with gradients of zero
        # Neither copies anything where all rows are samples, nor do their gradients.
        own = tf.ensure_shape(tf.slice(inputs, [0, 0, 0, 0], [some, -1, -1, -1]), (None, *inputs.shape[1:]))
        normalised, mean, variance = self._fused(own)
        self._move(rows, tf.cast(some * inputs.shape[1] * inputs.shape[2], tf.float32), mean, variance)
        return tf.ensure_shape(tf.pad(normalised, [[0, total - some], [0, 0], [0, 0], [0, 0]]), inputs.shape)

    def _fused(self, inputs, **statistics):
        gamma, beta = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
        return tf.compat.v1.nn.fused_batch_norm(inputs, gamma, beta, epsilon=self.epsilon, **statistics)

    def _rows(self, inputs) -> tf.Tensor:
        """How many rows there are up to the last labelled sample: int32."""
        total, samples = tf.shape(inputs)[0], current_pass().samples
        if samples is None:
            return total
        return tf.reduce_max(tf.where(samples, tf.range(1, total + 1), 0))

    def _move(self, rows, pixels, mean, variance) -> None:
        """Let the moving averages follow those of `pixels`, or nothing where there are no rows."""
        biased = variance * (pixels - 1) / pixels  # the fused operation's is that of a sample
        weight = tf.where(rows > 0, pixels, 0.0)
        for variable, value in ((self.moving_mean, mean), (self.moving_variance, biased)):
            momentum = kept(self.momentum, current_pass().step)
            current_pass().move(variable, tf.stop_gradient(value) * weight, weight, momentum)

    def get_config(self):
        return super().get_config() | {"momentum": self.momentum, "fixed": self.fixed}


class GroupNorm(_Norm):
    """Group normalisation (Wu, He, 2018): over all pixels of up to eight channels of a sample.

    A group has the most channels up to `GROUP` that divide those of the layer.
    """

    def call(self, inputs):
        _, height, width, channels = inputs.shape
        pixels, size = height * width, next(n for n in range(GROUP, 0, -1) if channels % n == 0)
        flat = tf.reshape(tf.cast(inputs, tf.float32), [-1, pixels, channels])
        # As products, which take a third of the time of `tf.nn.moments`.
        each = tf.fill([1, pixels], 1 / pixels)
        mean, square = (self._of_groups(tf.matmul(each, values), size) for values in (flat, flat * flat))
        scale = tf.math.rsqrt(tf.maximum(square - mean * mean, 0.0) + self.epsilon) * self.gamma
        normalised = flat * scale + (self.beta - mean * scale)
        return tf.cast(tf.reshape(normalised, [-1, height, width, channels]), inputs.dtype)

    def _of_groups(self, values: tf.Tensor, size: int) -> tf.Tensor:
        """The mean of each group of channels in the place of each of them: float32 (N, 1, C)."""
        means = tf.reduce_mean(tf.reshape(values, [-1, 1, values.shape[-1] // size, size]), -1)
        return tf.repeat(means, size, -1)
