"""The settings of an examination. `unet.config` leaves them out: they need tyro, which no worker should load."""

from typing import Annotated

from pydantic import Field
from tyro.conf import arg

from unet.config.common import CommandSettings, StoreSettings
from unet.config.fields import DataSource
from unet.settings import SettingsGroup


class DoctorPart(SettingsGroup):
    """What is examined beside the machines."""

    data: DataSource | None = None
    """Data as for training: whether every node finds the same there. None: no data."""
    as_json: Annotated[bool, arg(name="json")] = False
    """Print the findings, and what was measured on each node, as JSON."""


class DoctorSettings(SettingsGroup):
    """Examine a cluster."""

    doctor: DoctorPart = DoctorPart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    command: CommandSettings = CommandSettings()
