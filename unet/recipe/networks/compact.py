"""A U-Net of residual blocks (He et al., 2016) with few multiply-adds, which begins and ends at half the image's size.

The image goes in as squares of two by two pixels (space to depth) and its logits come out so (Shi et al., 2016): most
multiply-adds of a U-Net are those at full size, and a decoder enlarges what it found at half of it almost without loss.
Widths grow twofold at most from level to level, and the decoder adds what the encoder found instead of concatenating
it (Chaurasia, Culurciello, 2017).

Dropout stands where no norm measures what it makes of a variance, but for the deepest level (Li et al., 2019).
"""

from collections.abc import Sequence

from unet.recipe.network import INPUT, ModelSettings, Network
from unet.recipe.networks import known
from unet.recipe.networks.parts import Parts

GROWTH = (1, 2, 3.5, 4.5, 5.5)
"""The width of each level by that of the first; deeper ones are as wide as the last."""
WHOLE = 8
"""Widths are multiples of it, as processors compute: 32, 64, 112, 144 and 176 channels for 32."""


def describe(settings: ModelSettings, classes: int) -> Network:
    """The network of these settings, with an output for each class."""
    parts, widths = Parts(settings), [_width(settings.base_filters, level) for level in range(settings.depth + 1)]
    skips = _encode(parts, settings, widths) if settings.encoder == "none" else known.features(parts, settings)
    x = _decode(parts, parts.dropout("bottleneck", skips[-1]), skips[:-1], widths)
    x = parts.dropout("head", x)
    x = parts.add("head", "convolution", x, channels=4 * classes, kernel_size=1)
    parts.add("pixels", "depth_to_space", x, channels=classes, stride=1)
    return parts.network


def _encode(parts: Parts, settings: ModelSettings, widths: Sequence[int]) -> list[str]:
    """The last layer of each level."""
    x = parts.add("squares", "space_to_depth", INPUT, channels=12, stride=2)
    x = parts.convolution("stem", "", x, widths[0])
    skips = []
    for level, width in enumerate(widths):
        block = f"encoder_{level + 1}" if level < settings.depth else "bottleneck"
        if level:
            x = parts.add(f"{block}_pool", "pooling", x, stride=2 ** (level + 1), pool_size=2)
        for number in range(settings.blocks if level >= settings.depth - 1 else 1):
            x = _residual(parts, f"{block}_{number + 1}", x, width)
        skips.append(x)
    return skips


def _decode(parts: Parts, before: str, skips: Sequence[str], widths: Sequence[int]) -> str:
    """From the deepest level up through `skips`, layers of which each has half the stride of the next."""
    for level, skip in reversed(list(enumerate(skips))):
        block, width, stride = f"decoder_{level + 1}", widths[level], parts[skip].stride
        if parts[skip].channels != width:
            skip = parts.convolution(block, "_skip", skip, width, size=1, relu=False)
        x = parts.convolution(block, "", before, width, size=1, relu=False)
        x = parts.add(f"{block}_up", "upsampling", x, stride=stride)
        x = parts.add(f"{block}_add", "addition", x, skip)
        before = _residual(parts, block, parts.add(f"{block}_relu", "relu", x), width)
    return before


def _residual(parts: Parts, block: str, before: str, channels: int) -> str:
    """Two 3x3 convolutions, added to their input: a 1x1 convolution of it where it has other channels."""
    x = parts.convolution(block, "_1", before, channels)
    x = parts.convolution(block, "_2", x, channels, relu=False)
    shortcut = before
    if parts[before].channels != channels:  # after the others, as Keras' files of weights count them
        shortcut = parts.convolution(block, "_shortcut", before, channels, size=1, relu=False)
    x = parts.add(f"{block}_residual", "addition", x, shortcut)
    return parts.add(f"{block}_out", "relu", x)


def _width(base: int, level: int) -> int:
    width = base * GROWTH[min(level, len(GROWTH) - 1)]
    whole = WHOLE if base >= WHOLE else 1
    return whole * int(width / whole + 0.5)
