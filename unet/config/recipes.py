"""Recipes: files of settings that say how a network learns, each of which a flag overrides."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from unet.config.files import absolute, parse_yaml, read_named
from unet.errors import InputError
from unet.recipe.network import ModelSettings
from unet.recipe.recipe import PARTS
from unet.recipe.start import StartSettings

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
REFERENCE, BEST, PRETRAINED, FINETUNE = "reference", "best", "pretrained", "finetune"
"""The published notebook's, which the defaults of all settings are; and those of a job that names none."""
MINUTES = "minutes"
BEGINNINGS = ("init_from", "encoder")
"""What a training may begin with, by which a job that names no recipe chooses one."""
LENGTHS = ("epochs", MINUTES)
"""How long a run takes: where one is given, a recipe's other does not count."""
NETWORK = frozenset(ModelSettings.model_fields) - {"dropout", "frozen_stages"}
"""Of an earlier model, those of a training that begins with it."""
RECIPE_SETTINGS = frozenset(name for part in PARTS.values() for name in part.model_fields) | {MINUTES}
RECIPE_SETTINGS -= StartSettings.model_fields.keys()
"""What a recipe may set: how a network learns, not what it begins with."""


def recipe_name(value: str) -> str:
    """The name of a recipe, or the absolute path of a file."""
    return str(absolute(value)) if value.endswith((".yaml", ".yml")) else value


def usual_recipe(values: dict[str, Any]) -> str:
    """The recipe of a job that names none, by what its flat settings begin with."""
    if values.get("init_from"):
        return FINETUNE
    return PRETRAINED if values.get("encoder", "none") != "none" else BEST


def is_complete(values: dict[str, Any]) -> bool:
    """Whether flat settings say all that a recipe can, as those that a run or sweep saves.

    They need no recipe, whose file may have changed since.
    """
    return values.keys() >= RECIPE_SETTINGS - {MINUTES}


def with_recipe(name: str, values: dict[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """Flat settings, and under them those of a recipe.

    Args:
        name: of the recipe, or its file.
        values: flat settings.
        without: settings of the recipe that do not count.

    Raises:
        InputError: there is no such recipe, or it sets something else.
    """
    source = f"The recipe {name}"
    found = parse_yaml(read_named("recipe", name, RECIPES), source) or {}
    if not isinstance(found, dict):
        raise InputError(f"{source} must hold `name: value` lines.")
    if others := sorted(found.keys() - RECIPE_SETTINGS):
        raise InputError(
            f"{source} cannot set {', '.join(map(str, others))}: it can set {', '.join(sorted(RECIPE_SETTINGS))}."
        )
    return {key: value for key, value in found.items() if key not in without} | values
