"""What the descriptions of networks are put together from."""

from typing import Any

from unet.recipe.network import INPUT, Layer, ModelSettings, Network

MOMENTUM = 0.97
"""Of moving averages, after the first steps. A short run is scored before Keras' 0.99 has forgotten its beginning."""
EPSILON = 1e-3
"""What a norm adds to a variance."""
NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "batch": ("batch_norm", {"momentum": MOMENTUM, "epsilon": EPSILON}),
    "group": ("group_norm", {"epsilon": EPSILON}),
}
"""The kind and the options of the layer that `--norm` asks for."""


class Parts:
    """The layers of a network, in the order in which they are added. Every method gives the name of its last layer."""

    def __init__(self, settings: ModelSettings):
        self._settings, self._layers = settings, {INPUT: Layer(INPUT, "input", (), 3, 1)}
        self._dropouts = 0

    @property
    def network(self) -> Network:
        return Network(tuple(layer for layer in self._layers.values() if layer.name != INPUT))

    def __getitem__(self, name: str) -> Layer:
        return self._layers[name]

    def add(
        self,
        name: str,
        kind: str,
        *inputs: str,
        channels: int = 0,
        stride: float = 0,
        learns: bool = True,
        **options: Any,
    ) -> str:
        """A layer; channels and stride are those of its first input where they are not given."""
        first = self[inputs[0]]
        self._layers[name] = Layer(
            name, kind, inputs, channels or first.channels, stride or first.stride, options, learns
        )
        return name

    def end_with(self, name: str) -> None:
        """Take away the layers after this one."""
        names = list(self._layers)
        for later in names[names.index(name) + 1 :]:
            del self._layers[later]

    def convolution(self, block: str, part: str, before: str, channels: int, size: int = 3, relu: bool = True) -> str:
        """A convolution (He et al., 2015), the norm of the settings and ReLU: `<block>_conv<part>`, `_norm`, `_relu`.

        Without a norm the convolution has a bias and is followed by ReLU itself.
        """
        norm = self._settings.norm
        options: dict[str, Any] = {"kernel_size": size, "kernel_initializer": "he_normal"}
        if norm == "none":
            options |= {"activation": "relu"} if relu else {}
            return self.add(f"{block}_conv{part}", "convolution", before, channels=channels, **options)
        x = self.add(f"{block}_conv{part}", "convolution", before, channels=channels, use_bias=False, **options)
        kind, own = NORMS[norm]
        x = self.add(f"{block}_norm{part}", kind, x, **own)
        return self.add(f"{block}_relu{part}", "relu", x) if relu else x

    def dropout(self, block: str, before: str) -> str:
        """Dropout at the rate of the settings, with masks that no other layer of the network has."""
        self._dropouts += 1
        rate, index = self._settings.dropout, self._dropouts - 1
        return self.add(f"{block}_dropout", "dropout", before, rate=rate, layer_index=index)
