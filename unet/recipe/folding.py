"""Batch norms folded into the convolutions before them, for networks that are trained no more.

Behind training, a batch norm multiplies and adds by channel what a convolution gives, so a convolution with another
kernel and a bias gives the same (Jacob et al., 2018, section 3.2). The numbers differ by float32 rounding.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from unet.recipe.network import Layer, Network

Weights = Mapping[str, np.ndarray]
CONVOLUTIONS = ("convolution", "depthwise_convolution")


def folded(network: Network) -> Network:
    """The network without the batch norms that follow a convolution; the others stay."""
    pairs = _pairs(network)
    convolutions = {norm: convolution for convolution, norm in pairs.items()}
    layers = []
    for layer in network.layers:
        if layer.name in convolutions:
            continue
        inputs = tuple(convolutions.get(name, name) for name in layer.inputs)
        options = {**layer.options, "use_bias": True} if layer.name in pairs else layer.options
        layers.append(replace(layer, inputs=inputs, options=options))
    return Network(tuple(layers))


def folded_weights(network: Network, weights: Weights) -> dict[str, np.ndarray]:
    """The weights of `folded(network)` from those of the network: float32 arrays by name (`Network.variables`)."""
    norms = {layer.name: layer for layer in network.layers}
    pairs = _pairs(network)
    found = {name: weights[name] for name in folded(network).variables if name in weights}
    for convolution, norm in pairs.items():
        gamma, beta, mean, variance = (
            weights[f"{norm}/{key}"].astype(np.float64) for key in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / np.sqrt(variance + norms[norm].options["epsilon"])
        bias = weights.get(f"{convolution}/bias", np.zeros(len(mean)))
        kernel = weights[f"{convolution}/kernel"]  # of a depthwise one the channels stand before the last axis
        scales = scale if kernel.shape[-1] == len(scale) else scale[:, None]
        found[f"{convolution}/kernel"] = (kernel * scales).astype(np.float32)
        found[f"{convolution}/bias"] = (beta + (bias - mean) * scale).astype(np.float32)
    return {name: found[name] for name in folded(network).variables}


def _pairs(network: Network) -> dict[str, str]:
    """The batch norms that fold, by their convolutions, whose output nothing else takes."""
    by_name = {layer.name: layer for layer in network.layers}
    takers = Counter(name for layer in network.layers for name in layer.inputs)
    norms = (layer for layer in network.layers if layer.kind == "batch_norm")
    return {
        layer.inputs[0]: layer.name
        for layer in norms
        if takers[layer.inputs[0]] == 1 and _is_linear_convolution(by_name.get(layer.inputs[0]))
    }


def _is_linear_convolution(layer: Layer | None) -> bool:
    return layer is not None and layer.kind in CONVOLUTIONS and "activation" not in layer.options
