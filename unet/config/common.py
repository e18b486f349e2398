"""What every job has: where things are, and the door itself."""

import os
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from unet.secrets import without_secrets
from unet.settings import SettingsGroup, absolute
from unet.storage import Folder

RegisteredName = Annotated[str | None, Field(pattern=r"^[\w.@-][\w .@-]*$")]
"""Of a model in MLflow's registry: it stands in URIs and in queries."""


class StoreSettings(SettingsGroup):
    """Where runs and prepared data are."""

    storage_path: str = Field(default_factory=lambda: os.environ.get("UNET_STORAGE_PATH") or "~/unet-runs")
    """Folder of runs and prepared data (UNET_STORAGE_PATH, else ~/unet-runs); may be s3://…"""
    tracking_uri: str | None = None
    """MLflow server or store, whatever MLFLOW_TRACKING_URI is. Default: sqlite under the storage path."""

    @field_validator("storage_path")
    @classmethod
    def _absolute(cls, value):
        # Absolute, because a submitted job runs in a temporary copy of the working directory.
        if not value.strip():
            raise ValueError("--storage-path is empty: name a folder, or leave it out for ~/unet-runs")
        if "://" in value:
            return Folder(value).uri if value.startswith("file:") else value
        return str(absolute(value))

    @field_validator("tracking_uri")
    @classmethod
    def _password_is_encoded(cls, value):
        # Else a part of it is taken for the host, and said so in many places.
        if value and value.startswith("http") and without_secrets(value) != value and "@" not in urlsplit(value).netloc:
            raise ValueError("write # ? / in a password as %23 %3F %2F")
        return value


class CommandSettings(SettingsGroup):
    """This command."""

    config: Path | None = None
    """YAML file of settings, named as the flags with underscores. A flag beats the file."""
    debug: bool = False
    """Show tracebacks and the messages of Ray and TensorFlow."""
