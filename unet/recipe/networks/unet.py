"""The U-Net (Ronneberger, Fischer, Brox, 2015) in the published pet-segmentation form.

An encoder block is two 3x3 convolutions (he_normal, ReLU), 2x2 max pooling and dropout; a decoder block a 3x3 stride-2
transposed convolution, concatenation with the encoder's output, dropout and two convolutions. A last 1x1 convolution
gives logits. A norm stands between a 3x3 convolution and its ReLU.
"""

from unet.recipe.network import INPUT, ModelSettings, Network
from unet.recipe.networks.parts import Parts


def describe(settings: ModelSettings, classes: int) -> Network:
    """The network of these settings, with an output for each class."""
    parts, widths = Parts(settings), [settings.base_filters * 2**level for level in range(settings.depth + 1)]

    def convolutions(block: str, before: str, channels: int) -> str:
        for part in ("_1", "_2"):
            before = parts.convolution(block, part, before, channels)
        return before

    x, skips = INPUT, []
    for level, width in enumerate(widths[:-1]):
        block = f"encoder_{level + 1}"
        x = convolutions(block, x, width)
        skips.append(x)
        x = parts.add(f"{block}_pool", "pooling", x, stride=2 ** (level + 1), pool_size=2)
        x = parts.dropout(block, x)
    x = convolutions("bottleneck", x, widths[-1])
    for level, width in reversed(list(enumerate(widths[:-1]))):
        block, place = f"decoder_{level + 1}", {"channels": width, "stride": 2**level}
        x = parts.add(f"{block}_up", "transposed_convolution", x, **place, kernel_size=3, strides=2)
        x = parts.add(f"{block}_concat", "concatenation", x, skips[level], channels=2 * width)
        x = parts.dropout(block, x)
        x = convolutions(block, x, width)
    parts.add("head", "convolution", x, channels=classes, kernel_size=1)
    return parts.network
