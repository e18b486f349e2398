"""The network as data: which layers there are, and what follows from that without building them.

The U-Net (Ronneberger, Fischer, Brox, 2015) in the published pet-segmentation form. An encoder block is two 3x3
convolutions (he_normal, ReLU), 2x2 max pooling and dropout; a decoder block a 3x3 stride-2 transposed convolution,
concatenation with the encoder's output, dropout and two convolutions. A last 1x1 convolution gives logits.

`unet.recipe.layers` builds the Keras model of a description. A driver, which has no TensorFlow, takes from it the
names and shapes of the weights and the number of parameters.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from unet.settings import SettingsGroup

Shapes = dict[str, tuple[int, ...]]
"""Of variables, by name."""
INPUT = "image"


class ModelSettings(SettingsGroup):
    """The U-Net."""

    base_filters: Annotated[int, Field(ge=1, le=1024)] = 64
    """Filters of the first block; each level below doubles them."""
    depth: Annotated[int, Field(ge=1, le=7)] = 4
    """Number of pooling steps, each of which halves the picture's sides."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of activations dropped after each pooling and each concatenation."""


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: of the layer, and the first part of its variables' names.
        kind: one of `KINDS`, and of the builders in `unet.recipe.layers`.
        inputs: the layers whose outputs it takes.
        channels: of its output.
        stride: how many pixels of the image a pixel of its output stands for, along a side.
        options: what else its builder takes, by Keras' own names.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    channels: int
    stride: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """What the layers of one kind have in common.

    Attributes:
        keras: the name under which Keras' weight files list their layers.
        shapes: the variables of a layer, in Keras' order, from the layer and the channels of its input.
        statistics: those of its variables that no gradient changes.
    """

    keras: str
    shapes: Callable[[Layer, int], Shapes] = lambda layer, channels: {}
    statistics: tuple[str, ...] = ()


def _convolution(layer: Layer, channels: int) -> Shapes:
    side = layer.options["kernel_size"]
    return {"kernel": (side, side, channels, layer.channels), "bias": (layer.channels,)}


def _transposed_convolution(layer: Layer, channels: int) -> Shapes:
    side = layer.options["kernel_size"]
    return {"kernel": (side, side, layer.channels, channels), "bias": (layer.channels,)}


KINDS = {
    "convolution": Kind("conv2d", _convolution),
    "transposed_convolution": Kind("conv2d_transpose", _transposed_convolution),
    "pooling": Kind("max_pooling2d"),
    "dropout": Kind("keyed_dropout"),
    "concatenation": Kind("concatenate"),
}


@dataclass(frozen=True)
class Network:
    """A network from an image of three channels to the logits of its last layer, in the order of building."""

    layers: tuple[Layer, ...]

    @cached_property
    def variables(self) -> Shapes:
        """The shapes of all weights, `<layer>/<variable>`."""
        return {f"{name}/{key}": shape for name, found in self._by_layer.items() for key, shape in found.items()}

    @cached_property
    def trainable(self) -> Shapes:
        """Those that a gradient changes."""
        fixed = {f"{layer.name}/{key}" for layer in self.layers for key in KINDS[layer.kind].statistics}
        return {name: shape for name, shape in self.variables.items() if name not in fixed}

    @cached_property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(map(math.prod, self.variables.values()))

    @cached_property
    def stride(self) -> int:
        """What a side of the image must be a multiple of."""
        return max(layer.stride for layer in self.layers)

    @cached_property
    def activations(self) -> float:
        """How many numbers all its layers give for an image, by pixel of that image."""
        return sum(layer.channels / layer.stride**2 for layer in self.layers)

    @cached_property
    def keras_paths(self) -> dict[str, str]:
        """Where Keras' own weight files (`.weights.h5`) have each variable."""
        paths: dict[str, str] = {}
        count = Counter[str]()
        for layer in self.layers:
            kind = KINDS[layer.kind].keras
            place = f"layers/{kind}_{count[kind]}" if count[kind] else f"layers/{kind}"
            count[kind] += 1
            paths |= {f"{layer.name}/{key}": f"{place}/vars/{i}" for i, key in enumerate(self._by_layer[layer.name])}
        return paths

    @cached_property
    def _by_layer(self) -> dict[str, Shapes]:
        channels = {INPUT: 3} | {layer.name: layer.channels for layer in self.layers}
        return {
            layer.name: KINDS[layer.kind].shapes(layer, sum(channels[name] for name in layer.inputs))
            for layer in self.layers
        }


def describe(settings: ModelSettings, classes: int) -> Network:
    """The U-Net of these settings with an output for each class."""
    layers: list[Layer] = []
    dropouts = 0

    def add(name: str, kind: str, inputs: str | tuple[str, ...], channels: int, stride: int, **options) -> str:
        layers.append(Layer(name, kind, (inputs,) if isinstance(inputs, str) else inputs, channels, stride, options))
        return name

    def convolutions(block: str, before: str, channels: int, stride: int) -> str:
        for i in (1, 2):
            he = {"kernel_size": 3, "activation": "relu", "kernel_initializer": "he_normal"}
            before = add(f"{block}_conv_{i}", "convolution", before, channels, stride, **he)
        return before

    def dropout(block: str, before: str, channels: int, stride: int) -> str:
        nonlocal dropouts
        dropouts += 1
        key = {"rate": settings.dropout, "layer_index": dropouts - 1}
        return add(f"{block}_dropout", "dropout", before, channels, stride, **key)

    x, skips = INPUT, []
    widths = [settings.base_filters * 2**level for level in range(settings.depth + 1)]
    for level, width in enumerate(widths[:-1]):
        block, stride = f"encoder_{level + 1}", 2**level
        x = convolutions(block, x, width, stride)
        skips.append(x)
        x = add(f"{block}_pool", "pooling", x, width, 2 * stride, pool_size=2)
        x = dropout(block, x, width, 2 * stride)
    x = convolutions("bottleneck", x, widths[-1], 2**settings.depth)
    for level, width in reversed(list(enumerate(widths[:-1]))):
        block, stride = f"decoder_{level + 1}", 2**level
        x = add(f"{block}_up", "transposed_convolution", x, width, stride, kernel_size=3, strides=2)
        x = add(f"{block}_concat", "concatenation", (x, skips[level]), 2 * width, stride)
        x = dropout(block, x, 2 * width, stride)
        x = convolutions(block, x, width, stride)
    add("head", "convolution", x, classes, 1, kernel_size=1)
    return Network(tuple(layers))
