"""What is read, and how it is prepared."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unet.config.common import CommandSettings, StoreSettings
from unet.settings import SettingsGroup, absolute, parse_bytes

SOURCES = ("synthetic", "oxford_iiit_pet")

Resize = Literal["stretch", "letterbox"]


def is_source_name(source: str) -> bool:
    """Whether this names a source (such as synthetic:5000) and is no path."""
    return source.partition(":")[0] in SOURCES


class DataSettings(SettingsGroup):
    """What is read."""

    data: str = "synthetic"
    """A prepared folder, a folder with the official archives (packed or extracted), one with images/, masks/ and
    dataset.yaml, `oxford_iiit_pet` (through TensorFlow Datasets), or `synthetic`: pets drawn by the program. What is
    not prepared yet is prepared on first use and kept under the storage path."""
    image_size: Annotated[int, Field(ge=16, le=2048)] = 128
    """Side of the network's square input, in pixels; a multiple of 2**depth."""
    resize: Resize = "stretch"
    """Stretch photos to the square, or letterbox: keep their shape and fill up with ignored pixels."""
    limit_train: Annotated[int | None, Field(ge=1)] = None
    """Use only the first so many training samples of the canonical order."""
    memory_budget: str | None = None
    """Data up to this size (such as 8GB) are kept in memory, larger ones streamed. Default: a quarter of the
    node's memory."""

    @field_validator("data")
    @classmethod
    def _found_from_anywhere(cls, value):
        # A run continues from other folders, and a submitted job's own folder is temporary.
        is_path = "://" not in value and not is_source_name(value) and absolute(value).exists()
        return str(absolute(value)) if is_path else value

    @field_validator("memory_budget")
    @classmethod
    def _is_size(cls, value):
        if value is not None:
            parse_bytes(value)
        return value


class PreparePart(SettingsGroup):
    """What is prepared, and how."""

    source: str = "synthetic"
    """A folder with the official archives (packed or extracted), a folder with images/, masks/ and dataset.yaml,
    `oxford_iiit_pet` (through TensorFlow Datasets), `synthetic`, or `synthetic:N` for N drawn pets."""
    source_dir: Path | None = None
    """Where the two archives of `oxford_iiit_pet` lie already: nothing is downloaded then."""
    output: str | None = None
    """The folder to make; may be s3://… Default: where a training with this source looks for it."""
    image_size: Annotated[int, Field(ge=16, le=2048)] = 128
    """Side of the square pictures, in pixels."""
    resize: Resize = "stretch"
    """Stretch photos to the square, or letterbox: keep their shape and fill up with ignored pixels."""
    original_masks: bool = False
    """Keep the masks at the photos' own size too."""
    shards: Annotated[int, Field(ge=1)] = 4
    """Files of a split, at most."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of trainval that becomes val, by hash of name."""
    strict: bool = False
    """Refuse where a sample cannot be used, instead of leaving it out."""
    verify: str | None = None
    """Prepare nothing: read every byte of this prepared folder again and name what has changed."""

    @field_validator("source", "output", "verify")
    @classmethod
    def _from_home(cls, value):
        is_path = value is not None and "://" not in value and not is_source_name(value)
        return str(absolute(value)) if is_path else value

    @field_validator("source_dir")
    @classmethod
    def _dir_from_home(cls, value):
        return value and absolute(value)

    @model_validator(mode="after")
    def _source_dir_fits(self):
        if self.source_dir and self.source != "oxford_iiit_pet":
            raise ValueError("--source-dir goes with --source oxford_iiit_pet; give other archives as --source")
        return self


class PrepareSettings(SettingsGroup):
    """Turn raw pets into shards."""

    prepare: PreparePart = PreparePart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    command: CommandSettings = CommandSettings()
