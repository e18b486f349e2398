"""Keras models of described networks.

Whoever needs probabilities takes the softmax of a network's logits in float32.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from unet.recipe.network import INPUT, Layer, ModelSettings, Network
from unet.recipe.networks import describe
from unet.recipe.norms import BatchNorm, GroupNorm
from unet.recipe.passes import TrainingPass, current_pass

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
        built = BUILDERS[layer.kind](layer)
        built.trainable = layer.learns
        outputs[layer.name] = built(before if len(before) > 1 else before[0])
    logits = keras.layers.Activation("linear", dtype="float32", name="logits")(outputs[network.layers[-1].name])
    return keras.Model(inputs, logits, name="unet")


ACTIVATIONS = ("relu", "relu6", "silu", "hard_silu", "sigmoid", "hard_sigmoid")
"""Kinds that Keras has functions for, by the same names."""
BUILDERS: dict[str, Callable[[Layer], keras.layers.Layer]] = {
    "convolution": lambda layer: keras.layers.Conv2D(layer.channels, name=layer.name, **{**SAME, **layer.options}),
    "depthwise_convolution": lambda layer: DepthwiseConvolution(name=layer.name, **SAME, **layer.options),
    "transposed_convolution": lambda layer: keras.layers.Conv2DTranspose(
        layer.channels, name=layer.name, **SAME, **layer.options
    ),
    "rescaling": lambda layer: keras.layers.Rescaling(name=layer.name, **layer.options),
    "padding": lambda layer: keras.layers.ZeroPadding2D(name=layer.name, **LAST, **layer.options),
    "pooling": lambda layer: keras.layers.MaxPooling2D(name=layer.name, **LAST, **layer.options),
    "dropout": lambda layer: KeyedDropout(name=layer.name, **layer.options),
    "concatenation": lambda layer: keras.layers.Concatenate(axis=-1, name=layer.name),
    "addition": lambda layer: keras.layers.Add(name=layer.name),
    "multiplication": lambda layer: keras.layers.Multiply(name=layer.name),
    "mean": lambda layer: keras.layers.GlobalAveragePooling2D(keepdims=True, name=layer.name, **LAST),
    **dict.fromkeys(ACTIVATIONS, lambda layer: keras.layers.Activation(layer.kind, name=layer.name)),
    "batch_norm": lambda layer: BatchNorm(name=layer.name, **layer.options),
    "group_norm": lambda layer: GroupNorm(name=layer.name, **layer.options),
    "upsampling": lambda layer: keras.layers.UpSampling2D(
        2, interpolation="bilinear", name=layer.name, **LAST, **layer.options
    ),
    "space_to_depth": lambda layer: SpaceToDepth(name=layer.name),
    "depth_to_space": lambda layer: DepthToSpace(name=layer.name),
}
"""The Keras layer of each kind in `unet.recipe.network.KINDS`."""


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


class DepthwiseConvolution(keras.layers.DepthwiseConv2D):
    """Keras' own, with gradients that are computed in float32 where it computes in bfloat16.

    TensorFlow's gradients in bfloat16 take three to fifteen times as long on processors, for strides of two and kernels
    of five by five, and round every partial sum.
    """

    def call(self, inputs):
        if inputs.dtype != "bfloat16":
            return super().call(inputs)
        kernel, how = tf.convert_to_tensor(self.kernel), {"padding": "SAME", "strides": [1, *self.strides, 1]}

        @tf.custom_gradient
        def convolved(pixels, kernel):
            def gradients(slope):
                slope, wide = tf.cast(slope, tf.float32), tf.cast(kernel, tf.float32)
                by_pixels = tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
                    input_sizes=tf.shape(pixels), filter=wide, out_backprop=slope, **how
                )
                by_kernel = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
                    input=tf.cast(pixels, tf.float32), filter_sizes=kernel.shape, out_backprop=slope, **how
                )
                return tf.cast(by_pixels, pixels.dtype), tf.cast(by_kernel, kernel.dtype)

            return tf.raw_ops.DepthwiseConv2dNative(input=pixels, filter=kernel, **how), gradients

        found = convolved(inputs, tf.cast(kernel, inputs.dtype))
        return found + tf.cast(self.bias, inputs.dtype) if self.use_bias else found


class SpaceToDepth(keras.layers.Layer):
    """The pixels of each square of two by two as channels of one pixel: (N, H, W, C) to (N, H / 2, W / 2, 4 C)."""

    def call(self, inputs):
        return tf.nn.space_to_depth(inputs, 2)


class DepthToSpace(keras.layers.Layer):
    """The reverse of `SpaceToDepth` (Shi et al., 2016): (N, H, W, 4 C) to (N, 2 H, 2 W, C)."""

    def call(self, inputs):
        return tf.nn.depth_to_space(inputs, 2)
