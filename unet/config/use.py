"""What is done with a trained model."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from unet.config.common import CommandSettings, RegisteredName, StoreSettings
from unet.settings import Device, SettingsGroup, absolute


class EvaluatePart(SettingsGroup):
    """What is scored on what."""

    model: str = ""
    """A run's name (its best checkpoint), a checkpoint's folder, or an MLflow URI; several, separated by commas, are
    compared in pairs."""
    data: str | None = None
    """As for training. Default: what the model was trained on."""
    split: Literal["train", "val", "test"] = "test"
    """Which samples."""
    output: str | None = None
    """Folder of metrics.json, per_image.parquet and report.html. Default: evaluations/ in the run's folder."""
    num_workers: Annotated[int | None, Field(ge=1)] = None
    """Processes that score, of one thread each. Default: as many as the cluster has GPUs, or CPUs where it has none."""
    device: Device = "auto"
    """auto: a GPU for each process where the cluster has so many, else CPUs; gpu refuses where it has not; cpu takes no
    GPU."""
    band: Annotated[int, Field(ge=1, le=64)] = 3
    """Width in pixels, at the network's size and to either side, of the band around borders that is scored apart."""
    bootstrap: Annotated[int, Field(ge=0, le=1_000_000)] = 2000
    """Resamples of the images for the 95 % intervals, 1000 or more; 0: no intervals."""
    track: bool = True
    """Log scores and report to the model's MLflow run."""

    @field_validator("bootstrap")
    @classmethod
    def _enough(cls, value):
        if 0 < value < 1000:
            raise ValueError("so few resamples do not tell where an interval ends; give 1000 or more, or 0 for none")
        return value

    @field_validator("output")
    @classmethod
    def _absolute(cls, value):
        return str(absolute(value)) if value and "://" not in value else value


class EvaluateSettings(SettingsGroup):
    """Score trained models."""

    evaluate: EvaluatePart = EvaluatePart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    command: CommandSettings = CommandSettings()


class PredictPart(SettingsGroup):
    """What is segmented by what."""

    model: str = ""
    """A run's name or folder (its best checkpoint), a checkpoint's folder, or an MLflow URI."""
    input: str = ""
    """A photo, a folder, a quoted pattern such as 'photos/**/*.jpg', or s3://bucket/prefix."""
    output: str = ""
    """Folder of masks/, overlays/ and predictions.csv; may be s3://… The same command goes on where it was."""
    num_workers: Annotated[int | None, Field(ge=1)] = None
    """Processes that predict. Default: one for two CPUs, or for each GPU."""
    device: Device = "auto"
    """auto: a GPU for each process where the cluster has so many, else CPUs; gpu refuses where it has not; cpu takes no
    GPU."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Photos that the network takes at a time."""
    tile: bool = False
    """Also look at overlapping tiles, at twice the scale: for scenes of small objects, half a photo long or less. Takes
    ten times as long; photos smaller than twice the network are not cut."""
    tta: bool = False
    """Average the prediction with that of the mirrored photo."""
    probabilities: bool = False
    """Also write probabilities/<stem>.npz: float16 (height, width, classes)."""
    overlays: bool = True
    """Also write overlays/<stem>.jpg."""

    @field_validator("input", "output")
    @classmethod
    def _absolute(cls, value):
        value = value.removeprefix("file://")
        return str(absolute(value)) if value and "://" not in value else value


class PredictSettings(SettingsGroup):
    """Segment photos."""

    predict: PredictPart = PredictPart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    command: CommandSettings = CommandSettings()


class ExportPart(SettingsGroup):
    """What is handed on, and in which form."""

    model: str = ""
    """A run's name or folder (its best checkpoint), a checkpoint's folder, or an MLflow URI."""
    output: str | None = None
    """Folder for the exported files; may be s3://… Default: export/ in the run's folder; with --register none."""
    formats: tuple[Literal["saved_model", "tflite", "onnx"], ...] = ("saved_model", "tflite", "onnx")
    """Which: float32 (N, S, S, 3) in [0, 1] in, probabilities (N, S, S, C) out; resizing is the caller's."""
    images: Path | None = None
    """Folder of photos to compare the formats on. Default: drawn pets."""
    threads: Annotated[int | None, Field(ge=1)] = None
    """Of each format as it is timed. Default: one for each CPU."""
    register: RegisteredName = None
    """Make the run's packaged model a version of this registered model; it becomes the champion if it is better on
    val."""

    @field_validator("output")
    @classmethod
    def _absolute(cls, value):
        return str(absolute(value)) if value and "://" not in value else value

    @field_validator("formats")
    @classmethod
    def _each_once(cls, value):
        if not value:
            raise ValueError("name at least one of saved_model, tflite, onnx")
        return tuple(dict.fromkeys(value))

    @field_validator("images")
    @classmethod
    def _is_a_folder(cls, value):
        if value is not None and not value.is_dir():
            raise ValueError("there is no such folder")
        return value


class ExportSettings(SettingsGroup):
    """Export and register a trained model."""

    export: ExportPart = ExportPart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    command: CommandSettings = CommandSettings()
