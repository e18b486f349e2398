"""What every job has: where things are kept, and the command itself."""

import os
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from unet.config.fields import FolderOrUri
from unet.secrets import without_secrets
from unet.settings import SettingsGroup


class StoreSettings(SettingsGroup):
    """Where runs and prepared data are kept."""

    storage_path: FolderOrUri = Field(default_factory=lambda: os.environ.get("UNET_STORAGE_PATH") or "~/unet-runs")
    """Folder of runs and prepared data, local or s3://…; UNET_STORAGE_PATH sets another default."""
    tracking_uri: str | None = None
    """MLflow server or store; MLFLOW_TRACKING_URI is not read. None: SQLite under the storage path."""

    @field_validator("tracking_uri")
    @classmethod
    def _password_is_encoded(cls, value):
        # Else a part of it is taken for the host, and said so in many places.
        if value and value.startswith("http") and without_secrets(value) != value and "@" not in urlsplit(value).netloc:
            raise ValueError("write # ? / in a password as %23 %3F %2F")
        return value


class CommandSettings(SettingsGroup):
    """The command itself."""

    config: str | None = None
    """YAML file of settings, local or s3://…, named like the flags, with underscores. A flag overrides the file."""
    debug: bool = False
    """Show tracebacks and the messages of Ray and TensorFlow."""
