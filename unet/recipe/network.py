"""The network as data: its settings, which layers there may be, and what follows from them without building them.

`unet.recipe.networks` describes the networks, `unet.recipe.layers` builds the Keras model of a description. A driver,
which has no TensorFlow, takes from it the names and shapes of the weights and the number of parameters.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from unet.settings import SettingsGroup

Shapes = dict[str, tuple[int, ...]]
"""Of variables, by name."""
INPUT = "image"
ENCODER_DEPTH = 5
"""How often an encoder that is known from ImageNet halves the sides of what it sees."""
ENCODER_LAYERS = ("stem", "encoder_", "bottleneck")
"""What the names of layers begin with that come before the decoder: `--freeze` and `--encoder-rate` are about them."""


def is_of_encoder(name: str) -> bool:
    """Whether a layer, or a variable, belongs to what comes before the decoder."""
    return name.startswith(ENCODER_LAYERS)


class ModelSettings(SettingsGroup):
    """The network."""

    network: Literal["unet", "compact"] = "unet"
    """unet: the U-Net of 2015. compact: one of residual blocks and few multiply-adds, which begins and ends at half
    the picture's size."""
    encoder: Literal["none", "efficientnet-lite0", "mobilenetv3-large", "efficientnetv2-b0", "resnet50"] = "none"
    """Of the compact network: an encoder that is known from ImageNet, in the place of its own. --encoder-weights says
    where its weights come from."""
    encoder_scale: Literal[1, 2] = 1
    """2: --encoder sees the picture enlarged to twice its size, since it knows pictures of 224 pixels: better masks of
    small pictures, at two to three times the cost. --depth is 3 at most then."""
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 0
    """So many stages of --encoder, of which each has half the size of the one before, never learn: that saves the
    backward pass of the largest."""
    base_filters: Annotated[int, Field(ge=1, le=1024)] = 64
    """Filters of the first block. In the unet each level below doubles them; in the compact network they grow to
    5.5 times as many. Those of the decoder, where --encoder gives the others."""
    depth: Annotated[int, Field(ge=1, le=7)] = 4
    """Number of pooling steps, each of which halves the picture's sides. With --encoder 4 at most."""
    blocks: Annotated[int, Field(ge=1, le=16)] = 1
    """Residual blocks at each of the two deepest levels of the compact network. The unet has none."""
    norm: Literal["none", "batch", "group"] = "none"
    """Normalisation after each convolution. batch: over a worker's part of the batch (with --grad-shards, over each
    part of that); exports have it in their convolutions. group: over eight channels of a sample. none: biases."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of activations dropped: in the unet after each pooling and each concatenation, in the compact network after
    its deepest level and before its last convolution. 0: nothing."""

    @property
    def title(self) -> str:
        """What a run's overview calls it."""
        kind = {"unet": "U-Net", "compact": "compact U-Net"}[self.network]
        parts = [f"{self.norm} norm"] if self.norm != "none" else []
        scaled = f" at {self.encoder_scale} times the size" if self.encoder_scale > 1 else ""
        parts += [f"encoder {self.encoder}{scaled}"] if self.encoder != "none" else []
        return f"{kind} with {' and '.join(parts)}" if parts else kind

    @model_validator(mode="after")
    def _has_its_encoder(self):
        if self.encoder != "none" and self.network != "compact":
            raise ValueError(f"--encoder {self.encoder} is for the compact network: give --network compact with it")
        for name, usual in (("encoder_scale", 1), ("frozen_stages", 0)):
            if self.encoder == "none" and (value := getattr(self, name)) != usual:
                raise ValueError(f"--{name.replace('_', '-')} {value} is for an --encoder: name it, too")
        most = ENCODER_DEPTH - self.encoder_scale  # the decoder begins at half the picture's size
        if self.encoder != "none" and self.depth > most:
            scaled = f" with --encoder-scale {self.encoder_scale}" if self.encoder_scale > 1 else ""
            raise ValueError(
                f"--depth {self.depth} is more than an --encoder of ImageNet has{scaled}: give {most} or less"
            )
        stages = self.depth + self.encoder_scale
        if self.frozen_stages >= stages:
            raise ValueError(
                f"--frozen-stages {self.frozen_stages} are all {stages} of --encoder with --depth {self.depth}: give "
                "fewer, or --freeze encoder"
            )
        return self


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: of the layer, and the first part of its variables' names.
        kind: one of `KINDS`, and of the builders in `unet.recipe.layers`.
        inputs: the layers whose outputs it takes.
        channels: of its output.
        stride: how many pixels of the image a pixel of its output stands for, along a side; 0.5 where it is enlarged.
        options: what else its builder takes, by Keras' own names.
        learns: whether a gradient changes its variables.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    channels: int
    stride: float
    options: Mapping[str, Any] = field(default_factory=dict)
    learns: bool = True


@dataclass(frozen=True)
class Kind:
    """What the layers of one kind have in common.

    Attributes:
        keras: the name under which Keras' weight files list their layers.
        shapes: the variables of a layer, in Keras' order, from the layer and the channels of its input.
        statistics: those of its variables that no gradient changes.
        in_place: whether its output takes the memory of its input.
    """

    keras: str
    shapes: Callable[[Layer, int], Shapes] = lambda layer, channels: {}
    statistics: tuple[str, ...] = ()
    in_place: bool = False


def _convolution(layer: Layer, channels: int) -> Shapes:
    side = layer.options["kernel_size"]
    kernel: Shapes = {"kernel": (side, side, channels, layer.channels)}
    return kernel | ({"bias": (layer.channels,)} if layer.options.get("use_bias", True) else {})


def _depthwise_convolution(layer: Layer, channels: int) -> Shapes:
    side = layer.options["kernel_size"]
    kernel: Shapes = {"kernel": (side, side, channels, 1)}
    return kernel | ({"bias": (channels,)} if layer.options.get("use_bias", True) else {})


def _transposed_convolution(layer: Layer, channels: int) -> Shapes:
    side = layer.options["kernel_size"]
    return {"kernel": (side, side, layer.channels, channels), "bias": (layer.channels,)}


def _scale(layer: Layer, channels: int) -> Shapes:
    return {"gamma": (channels,), "beta": (channels,)}


def _scale_and_statistics(layer: Layer, channels: int) -> Shapes:
    return _scale(layer, channels) | {name: (channels,) for name in STATISTICS}


STATISTICS = ("moving_mean", "moving_variance")
KINDS = {
    "convolution": Kind("conv2d", _convolution),
    "depthwise_convolution": Kind("depthwise_conv2d", _depthwise_convolution),
    "transposed_convolution": Kind("conv2d_transpose", _transposed_convolution),
    "rescaling": Kind("rescaling"),
    "padding": Kind("zero_padding2d"),
    "pooling": Kind("max_pooling2d"),
    "dropout": Kind("keyed_dropout"),
    "concatenation": Kind("concatenate"),
    "addition": Kind("add"),
    "multiplication": Kind("multiply"),
    "mean": Kind("global_average_pooling2d"),
    "relu": Kind("activation", in_place=True),
    "relu6": Kind("activation", in_place=True),
    "silu": Kind("activation"),
    "hard_silu": Kind("activation"),
    "sigmoid": Kind("activation", in_place=True),
    "hard_sigmoid": Kind("activation"),
    "batch_norm": Kind("batch_norm", _scale_and_statistics, STATISTICS),
    "group_norm": Kind("group_norm", _scale),
    "upsampling": Kind("up_sampling2d"),
    "space_to_depth": Kind("space_to_depth"),
    "depth_to_space": Kind("depth_to_space"),
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
        fixed = {
            f"{layer.name}/{key}"
            for layer in self.layers
            for key in (KINDS[layer.kind].statistics if layer.learns else self._by_layer[layer.name])
        }
        return {name: shape for name, shape in self.variables.items() if name not in fixed}

    @cached_property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(map(math.prod, self.variables.values()))

    @cached_property
    def stride(self) -> int:
        """What a side of the image must be a multiple of."""
        return math.ceil(max(layer.stride for layer in self.layers))

    @cached_property
    def activations(self) -> float:
        """How many numbers its layers keep for an image until the backward pass, by pixel of that image.

        Those that never learn come before all others and keep nothing: one's input and output are there at a time.
        """
        made = [(layer, layer.channels / layer.stride**2) for layer in self.layers if not KINDS[layer.kind].in_place]
        return sum(size for layer, size in made if layer.learns) + 2 * max(
            (size for layer, size in made if not layer.learns), default=0.0
        )

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
