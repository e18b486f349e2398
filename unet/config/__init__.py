"""The settings of every job: a class for each part, a module for each kind of job."""

from unet.config.common import StoreSettings
from unet.config.data import DataSettings, PrepareSettings
from unet.config.fields import SOURCES, Resize, is_source_name
from unet.config.files import CONFIG, folder_of, load_yaml, moved_with, parse_yaml, read_config, read_named
from unet.config.recipes import (
    BEGINNINGS,
    LENGTHS,
    MINUTES,
    NETWORK,
    RECIPE_SETTINGS,
    RECIPES,
    REFERENCE,
    is_complete,
    recipe_name,
    usual_recipe,
    with_recipe,
)
from unet.config.training import (
    DEFAULT_EPOCHS,
    FENCING_TOKEN,
    MAY_CHANGE,
    NOT_OF_A_SWEEP,
    OF_THIS_PLACE,
    RunSettings,
    TrainSettings,
)
from unet.config.tuning import SEARCHABLE, SWEEP_MAY_CHANGE, SweepSettings, TuneSettings
from unet.config.use import EvaluateSettings, ExportSettings, PredictSettings
from unet.settings import Device, SettingsGroup, defaults, flat, parse_bytes, parse_interval, unflat

__all__ = [
    "BEGINNINGS",
    "CONFIG",
    "DEFAULT_EPOCHS",
    "FENCING_TOKEN",
    "LENGTHS",
    "MAY_CHANGE",
    "MINUTES",
    "NETWORK",
    "NOT_OF_A_SWEEP",
    "OF_THIS_PLACE",
    "RECIPES",
    "RECIPE_SETTINGS",
    "REFERENCE",
    "SEARCHABLE",
    "SOURCES",
    "SWEEP_MAY_CHANGE",
    "DataSettings",
    "Device",
    "EvaluateSettings",
    "ExportSettings",
    "PredictSettings",
    "PrepareSettings",
    "Resize",
    "RunSettings",
    "SettingsGroup",
    "StoreSettings",
    "SweepSettings",
    "TrainSettings",
    "TuneSettings",
    "defaults",
    "flat",
    "folder_of",
    "is_complete",
    "is_source_name",
    "load_yaml",
    "moved_with",
    "parse_bytes",
    "parse_interval",
    "parse_yaml",
    "read_config",
    "read_named",
    "recipe_name",
    "unflat",
    "usual_recipe",
    "with_recipe",
]
