"""The networks that `--network` names, each described as data in a module of its own."""

from collections.abc import Callable

from unet.recipe.network import ModelSettings, Network
from unet.recipe.networks import compact, unet

NETWORKS: dict[str, Callable[[ModelSettings, int], Network]] = {"unet": unet.describe, "compact": compact.describe}
"""By name: gives the description for settings and a number of classes."""


def describe(settings: ModelSettings, classes: int) -> Network:
    """The network of these settings with an output for each class."""
    return NETWORKS[settings.network](settings, classes)
