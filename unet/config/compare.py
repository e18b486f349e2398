"""The settings of a comparison. `unet.config` leaves them out: they need tyro, which no worker should load."""

from typing import Annotated, Literal

from pydantic import Field
from tyro.conf import Positional, arg

from unet.config.common import CommandSettings, StoreSettings
from unet.config.fields import FolderOrUri
from unet.settings import SettingsGroup


class ComparePart(SettingsGroup):
    """What is compared."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]")] = ()
    """Names of two to twelve runs (a sweep's trial is SWEEP/TRIAL), or of a sweep, whose best trials are compared."""
    split: Literal["train", "val", "test"] = "val"
    """Part of the data on whose images the runs are compared in pairs."""
    output: FolderOrUri | None = None
    """Folder for comparison.html. None: comparisons/ under the storage path."""
    track: bool = True
    """Log the page to the MLflow run of each run, or to that of the sweep."""


class CompareSettings(SettingsGroup):
    """Compare runs."""

    compare: ComparePart = ComparePart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    command: CommandSettings = CommandSettings()
