"""Encoders that are known from ImageNet, as data: the layers of their publications, with Keras' names and numbers.

Each begins with the scaling of pixels that its weights were trained with. Its batch norms keep the means and variances
of ImageNet; their gamma and beta learn like all else. The classifier behind the last features is left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from unet.recipe.network import INPUT, ModelSettings
from unet.recipe.networks.parts import Parts

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of red, green and blue in [0, 1]."""
CAFFE_MEAN = (123.68, 116.779, 103.939)
"""Of red, green and blue in [0, 255]."""


def features(parts: Parts, settings: ModelSettings) -> list[str]:
    """Add an encoder's layers; the last of each size from half the image's on, one more than `settings.depth`."""
    layers = _Layers(parts, settings.depth + 1, settings.encoder_scale, settings.frozen_stages)
    image = layers.add("enlarged", "upsampling", INPUT, times=0.5) if settings.encoder_scale == 2 else INPUT
    return ENCODERS[settings.encoder](layers, image)


class _End(Exception):
    """What comes now is smaller than asked for."""


@dataclass
class _Layers:
    """Layers of an encoder, whose names get a prefix. Every method gives the name of its last layer.

    Attributes:
        depth: how often it may halve the image's sides.
        scale: how many times the image is enlarged for it.
        frozen: how many of its stages never learn.
        epsilon: of its batch norms.
        use_bias: whether convolutions before a norm have a bias.
    """

    parts: Parts
    depth: int
    scale: int
    frozen: int
    epsilon: float = 1e-3
    use_bias: bool = False

    def add(self, name: str, kind: str, *inputs: str, times: float = 1, **options: Any) -> str:
        """A layer whose output is so many times smaller than its first input."""
        stride = self.parts[inputs[0]].stride * times
        if stride > 2**self.depth:
            raise _End
        learns = stride * self.scale > 2**self.frozen
        return self.parts.add(f"encoder_{name}", kind, *inputs, stride=stride, learns=learns, **options)

    def convolution(self, name: str, before: str, channels: int, norm: str, activation: str = "", **how: Any) -> str:
        """A convolution, its norm and its activation; `how` has `size` and `strides`, 1 without."""
        options, times = self._options(**how)
        x = self.add(name, "convolution", before, times=times, channels=channels, use_bias=self.use_bias, **options)
        return self._normed(norm, x, activation)

    def depthwise(self, name: str, before: str, norm: str, activation: str, **how: Any) -> str:
        """A depthwise convolution, its norm and its activation."""
        options, times = self._options(**how)
        x = self.add(name, "depthwise_convolution", before, times=times, use_bias=self.use_bias, **options)
        return self._normed(norm, x, activation)

    def squeezed(self, name: str, before: str, channels: int, names: tuple[str, str], kinds: tuple[str, str]) -> str:
        """Squeeze and excitation (Hu et al., 2018) through so many channels, by the names of its two convolutions."""
        (first, second), (inner, outer) = names, kinds
        x = self.add(f"{name}_mean", "mean", before)
        x = self.add(first, "convolution", x, channels=channels, kernel_size=1)
        x = self.add(f"{first}_{inner}", inner, x)
        x = self.add(second, "convolution", x, channels=self.parts[before].channels, kernel_size=1)
        x = self.add(f"{second}_{outer}", outer, x)
        return self.add(f"{name}_scale", "multiplication", before, x)

    def _normed(self, name: str, before: str, activation: str) -> str:
        x = self.add(name, "batch_norm", before, momentum=0.99, epsilon=self.epsilon, fixed=True)
        return self.add(f"{name}_{activation}", activation, x) if activation else x

    @staticmethod
    def _options(size: int = 1, strides: int = 1, **more: Any) -> tuple[dict[str, Any], int]:
        return {"kernel_size": size} | ({"strides": strides} if strides > 1 else {}) | more, strides

    def sizes(self, blocks: Iterator[str]) -> list[str]:
        """The last layer of each size, of blocks that are added until one is too small."""
        last: dict[float, str] = {}
        try:
            for name in blocks:
                last[self.parts[name].stride] = name
        except _End:
            self.parts.end_with(last[2**self.depth])
        return [last[2**level] for level in range(1, self.depth + 1)]


def _efficientnet_lite0(layers: _Layers, image: str) -> list[str]:
    """EfficientNet-Lite0 (Liu, 2020): inverted residual blocks (Sandler et al., 2018) with ReLU6."""
    # Kernel, strides, expansion, output channels, repeats.
    stages = (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )

    def blocks() -> Iterator[str]:
        x = layers.add("scaled", "rescaling", image, scale=255 / 128, offset=-127 / 128)
        x = layers.convolution("stem", x, 32, "stem_norm", "relu6", size=3, strides=2)
        yield x
        number = 0
        for size, strides, expansion, channels, repeats in stages:
            for repeat in range(repeats):
                x = block(f"block{number}", x, channels, expansion, size, 1 if repeat else strides)
                yield x
                number += 1

    def block(name: str, before: str, channels: int, expansion: int, size: int, strides: int) -> str:
        x, width = before, layers.parts[before].channels
        if expansion > 1:
            x = layers.convolution(f"{name}_expand", x, expansion * width, f"{name}_expand_norm", "relu6")
        x = layers.depthwise(f"{name}_depthwise", x, f"{name}_depthwise_norm", "relu6", size=size, strides=strides)
        x = layers.convolution(f"{name}_project", x, channels, f"{name}_project_norm")
        return layers.add(f"{name}_add", "addition", x, before) if (strides, width) == (1, channels) else x

    return layers.sizes(blocks())


def _mobilenetv3_large(layers: _Layers, image: str) -> list[str]:
    """MobileNetV3-Large (Howard et al., 2019)."""
    # Kernel, strides, expansion, output channels, squeeze, activation.
    stages = (
        (3, 1, 1, 16, False, "relu"),
        (3, 2, 4, 24, False, "relu"),
        (3, 1, 3, 24, False, "relu"),
        (5, 2, 3, 40, True, "relu"),
        (5, 1, 3, 40, True, "relu"),
        (5, 1, 3, 40, True, "relu"),
        (3, 2, 6, 80, False, "hard_silu"),
        (3, 1, 2.5, 80, False, "hard_silu"),
        (3, 1, 2.3, 80, False, "hard_silu"),
        (3, 1, 2.3, 80, False, "hard_silu"),
        (3, 1, 6, 112, True, "hard_silu"),
        (3, 1, 6, 112, True, "hard_silu"),
        (5, 2, 6, 160, True, "hard_silu"),
        (5, 1, 6, 160, True, "hard_silu"),
        (5, 1, 6, 160, True, "hard_silu"),
    )

    def blocks() -> Iterator[str]:
        x = layers.add("scaled", "rescaling", image, scale=2.0, offset=-1.0)
        x = layers.convolution("conv", x, 16, "conv_bn", "hard_silu", size=3, strides=2)
        yield x
        for number, stage in enumerate(stages):
            x = block(f"expanded_conv_{number}" if number else "expanded_conv", x, *stage)
            yield x

    def block(
        name: str,
        before: str,
        size: int,
        strides: int,
        expansion: float,
        channels: int,
        is_squeezed: bool,
        activation: str,
    ) -> str:
        x, width = before, layers.parts[before].channels
        inner = _eighths(width * expansion)
        if name != "expanded_conv":
            x = layers.convolution(f"{name}_expand", x, inner, f"{name}_expand_bn", activation)
        x = layers.depthwise(f"{name}_depthwise", x, f"{name}_depthwise_bn", activation, size=size, strides=strides)
        if is_squeezed:
            names = (f"{name}_squeeze_excite_conv", f"{name}_squeeze_excite_conv_1")
            x = layers.squeezed(f"{name}_squeeze_excite", x, _eighths(inner / 4), names, ("relu", "hard_sigmoid"))
        x = layers.convolution(f"{name}_project", x, channels, f"{name}_project_bn")
        return layers.add(f"{name}_add", "addition", before, x) if (strides, width) == (1, channels) else x

    return layers.sizes(blocks())


def _efficientnetv2_b0(layers: _Layers, image: str) -> list[str]:
    """EfficientNetV2-B0 (Tan, Le, 2021), without its stochastic depth."""
    # Kernel, strides, expansion, output channels, repeats, whether the first convolutions are fused.
    stages = (
        (3, 1, 1, 16, 1, True),
        (3, 2, 4, 32, 2, True),
        (3, 2, 4, 48, 2, True),
        (3, 2, 4, 96, 3, False),
        (3, 1, 6, 112, 5, False),
        (3, 2, 6, 192, 8, False),
    )

    def blocks() -> Iterator[str]:
        x = layers.add("scaled", "rescaling", image, **_normalising())
        x = layers.convolution("stem_conv", x, 32, "stem_bn", "silu", size=3, strides=2)
        yield x
        for stage, (size, strides, expansion, channels, repeats, is_fused) in enumerate(stages, 1):
            for repeat in range(repeats):
                block = fused if is_fused else plain
                name = f"block{stage}{chr(ord('a') + repeat)}_"
                x = block(name, x, channels, expansion, size, 1 if repeat else strides)
                yield x

    def fused(name: str, before: str, channels: int, expansion: int, size: int, strides: int) -> str:
        width = layers.parts[before].channels
        if expansion == 1:
            x = layers.convolution(
                f"{name}project_conv", before, channels, f"{name}project_bn", "silu", size=size, strides=strides
            )
        else:
            how = {"size": size, "strides": strides}
            x = layers.convolution(f"{name}expand_conv", before, expansion * width, f"{name}expand_bn", "silu", **how)
            x = layers.convolution(f"{name}project_conv", x, channels, f"{name}project_bn")
        return layers.add(f"{name}add", "addition", x, before) if (strides, width) == (1, channels) else x

    def plain(name: str, before: str, channels: int, expansion: int, size: int, strides: int) -> str:
        width = layers.parts[before].channels
        x = layers.convolution(f"{name}expand_conv", before, expansion * width, f"{name}expand_bn", "silu")
        x = layers.depthwise(f"{name}dwconv2", x, f"{name}bn", "silu", size=size, strides=strides)
        x = layers.squeezed(
            f"{name}se", x, max(1, width // 4), (f"{name}se_reduce", f"{name}se_expand"), ("silu", "sigmoid")
        )
        x = layers.convolution(f"{name}project_conv", x, channels, f"{name}project_bn")
        return layers.add(f"{name}add", "addition", x, before) if (strides, width) == (1, channels) else x

    return layers.sizes(blocks())


def _resnet50(layers: _Layers, image: str) -> list[str]:
    """ResNet-50 (He et al., 2016), with biases before its norms, as in Keras."""
    layers = replace(layers, epsilon=1.001e-5, use_bias=True)

    def blocks() -> Iterator[str]:
        x = layers.add("scaled", "rescaling", image, scale=255.0, offset=tuple(-mean for mean in CAFFE_MEAN))
        x = layers.add("conv1_pad", "padding", x, padding=3)
        x = layers.convolution("conv1_conv", x, 64, "conv1_bn", "relu", size=7, strides=2, padding="valid")
        yield x
        x = layers.add("pool1_pad", "padding", x, padding=1)
        x = layers.add("pool1_pool", "pooling", x, times=2, pool_size=3, strides=2)
        for stage, (width, repeats) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 2):
            for repeat in range(1, repeats + 1):
                strides = 2 if repeat == 1 and stage > 2 else 1
                x = block(f"conv{stage}_block{repeat}", x, width, strides, repeat == 1)
                yield x

    def block(name: str, before: str, width: int, strides: int, is_first: bool) -> str:
        x = before
        if is_first:
            before = layers.convolution(f"{name}_0_conv", x, 4 * width, f"{name}_0_bn", strides=strides)
        x = layers.convolution(f"{name}_1_conv", x, width, f"{name}_1_bn", "relu", strides=strides)
        x = layers.convolution(f"{name}_2_conv", x, width, f"{name}_2_bn", "relu", size=3)
        x = layers.convolution(f"{name}_3_conv", x, 4 * width, f"{name}_3_bn")
        return layers.add(f"{name}_out", "relu", layers.add(f"{name}_add", "addition", before, x))

    return layers.sizes(blocks())


ENCODERS: dict[str, Callable[[_Layers, str], list[str]]] = {
    "efficientnet-lite0": _efficientnet_lite0,
    "mobilenetv3-large": _mobilenetv3_large,
    "efficientnetv2-b0": _efficientnetv2_b0,
    "resnet50": _resnet50,
}
"""By name, as `--encoder` gives it: from the layers so far, and the one to begin with, whose sides each halves five
times."""


def _normalising() -> dict[str, Any]:
    """Gives pixels in [0, 1] a mean of 0 and a deviation of 1 over ImageNet."""
    offset = tuple(-mean / deviation for mean, deviation in zip(MEAN, DEVIATION, strict=True))
    return {"scale": tuple(1 / deviation for deviation in DEVIATION), "offset": offset}


def _eighths(width: float) -> int:
    """The nearest multiple of eight that is not smaller by more than a tenth."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * width else nearest
