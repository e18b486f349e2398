"""What is read, and how it is prepared."""

from typing import Annotated

from pydantic import Field, model_validator

from unet.config.common import CommandSettings, StoreSettings
from unet.config.fields import ByteSize, DataSource, FolderOrUri, ImageSize, LocalFolder, Resize
from unet.settings import SettingsGroup


class DataSettings(SettingsGroup):
    """The data that are read."""

    data: DataSource = "synthetic"
    """A prepared folder, or a source that is prepared on first use and kept under the storage path: a folder with the
    official archives (packed or extracted), a folder with images/, masks/ and dataset.yaml, oxford_iiit_pet (through
    TensorFlow Datasets), or synthetic (pets drawn by the program)."""
    image_size: ImageSize = 128
    """Side of the network's square input in pixels; a multiple of the network's stride: 2**depth, and twice that for
    the compact network."""
    resize: Resize = "stretch"
    """How photos become square: stretch distorts them, letterbox keeps their shape and pads with ignored pixels."""
    limit_train: Annotated[int | None, Field(ge=1)] = None
    """Use only this many training samples, the first in canonical order. None: all."""
    memory_budget: ByteSize | None = None
    """Keep data up to this size (such as 8GB) in memory, and stream larger data. None: a quarter of the node's
    memory."""


class PreparePart(SettingsGroup):
    """What is prepared, and how."""

    source: DataSource = "synthetic"
    """A folder with the official archives (packed or extracted), a folder with images/, masks/ and dataset.yaml,
    oxford_iiit_pet (through TensorFlow Datasets), synthetic, or synthetic:N for N drawn pets."""
    source_dir: LocalFolder | None = None
    """Folder that already holds the two archives of oxford_iiit_pet; nothing is downloaded then."""
    output: FolderOrUri | None = None
    """Folder to write, local or s3://… None: where a training on this source looks for it."""
    image_size: ImageSize = 128
    """Side of the square pictures in pixels."""
    resize: Resize = "stretch"
    """How photos become square: stretch distorts them, letterbox keeps their shape and pads with ignored pixels."""
    original_masks: bool = False
    """Also keep the masks at the photos' original size."""
    shards: Annotated[int, Field(ge=1)] = 4
    """Most files per split."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of trainval that becomes val, chosen by a hash of the name."""
    strict: bool = False
    """Stop when a sample cannot be used, instead of leaving it out."""
    verify: FolderOrUri | None = None
    """Prepare nothing; read every byte of this prepared folder again and name what has changed."""

    @model_validator(mode="after")
    def _source_dir_fits(self):
        if self.source_dir and self.source != "oxford_iiit_pet":
            raise ValueError("--source-dir goes with --source oxford_iiit_pet; give other archives as --source")
        return self


class PrepareSettings(SettingsGroup):
    """Turn raw pictures into shards."""

    prepare: PreparePart = PreparePart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    command: CommandSettings = CommandSettings()
