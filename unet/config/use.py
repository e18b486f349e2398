"""The settings of jobs that use a trained model."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unet.config.common import CommandSettings, StoreSettings
from unet.config.fields import FORMATS, DataSource, ExistingFolder, FolderOrUri, Format, PathOrUri, RegisteredName
from unet.settings import Device, SettingsGroup


class EvaluatePart(SettingsGroup):
    """What is scored on what."""

    model: str = ""
    """Name of a run (its best checkpoint), folder of a checkpoint, or MLflow URI; several, separated by commas, are
    compared in pairs."""
    data: DataSource | None = None
    """Data to score on, as for training. None: what the model was trained on."""
    split: Literal["train", "val", "test"] = "test"
    """Part of the data to score on."""
    output: FolderOrUri | None = None
    """Folder for metrics.json, per_image.parquet and report.html. None: evaluations/ in the run's folder."""
    num_workers: Annotated[int | None, Field(ge=1)] = None
    """Number of scoring processes, of one thread each. None: one per GPU of the cluster, or per CPU if it has none."""
    device: Device = "auto"
    """auto: a GPU for each process if the cluster has enough, else CPUs. gpu: refuse to start without enough GPUs. cpu:
    use no GPU."""
    band: Annotated[int, Field(ge=1, le=64)] = 3
    """Width of the band along borders that is scored separately: pixels to either side, at the network's size."""
    bootstrap: Annotated[int, Field(ge=0, le=1_000_000)] = 2000
    """Resamples of the images for the 95 % intervals: 1000 or more, or 0 for no intervals."""
    track: bool = True
    """Log the scores and the report to the model's MLflow run."""

    @field_validator("bootstrap")
    @classmethod
    def _enough(cls, value):
        if 0 < value < 1000:
            raise ValueError("too few resamples to place an interval's ends: give 1000 or more, or 0 for no intervals")
        return value


class EvaluateSettings(SettingsGroup):
    """Score trained models."""

    evaluate: EvaluatePart = EvaluatePart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    command: CommandSettings = CommandSettings()


class PredictPart(SettingsGroup):
    """What is segmented by what."""

    model: str = ""
    """Name or folder of a run (its best checkpoint), folder of a checkpoint, or MLflow URI."""
    input: PathOrUri = ""
    """A photo, a folder, a quoted pattern such as 'photos/**/*.jpg', or s3://bucket/prefix."""
    output: PathOrUri = ""
    """Folder for masks/, overlays/ and predictions.csv, local or s3://… The same command continues where it stopped."""
    as_dataset: PathOrUri = ""
    """In the place of --output: a folder that becomes a data set, with images/ (copies) and dataset.yaml beside the
    masks, to correct in a labelling tool and to train on."""
    least_confidence: Annotated[float, Field(ge=0, lt=1)] = 0
    """Of --as-dataset: pixels whose likeliest class is less probable belong to no class (255 in the masks)."""
    num_workers: Annotated[int | None, Field(ge=1)] = None
    """Number of predicting processes. None: one per two CPUs, or one per GPU."""
    device: Device = "auto"
    """auto: a GPU for each process if the cluster has enough, else CPUs. gpu: refuse to start without enough GPUs. cpu:
    use no GPU."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Photos in a batch of the network."""
    tile: bool = False
    """Also predict on overlapping tiles at twice the scale: for scenes whose objects are at most half as long as the
    photo. Takes ten times as long; photos smaller than twice the network's input are not tiled."""
    tta: bool = False
    """Average the predictions for the photo and its mirror image."""
    probabilities: bool = False
    """Also write probabilities/<stem>.npz: float16 (height, width, classes)."""
    overlays: bool = True
    """Also write overlays/<stem>.jpg."""

    @model_validator(mode="after")
    def _has_one_folder(self):
        if self.output and self.as_dataset:
            raise ValueError("--as-dataset names the folder itself: leave out --output")
        if self.least_confidence and not self.as_dataset:
            raise ValueError(f"--least-confidence {self.least_confidence:g} is for --as-dataset: give that, too")
        return self

    @property
    def folder(self) -> str:
        """Where everything is written."""
        return self.output or self.as_dataset


class PredictSettings(SettingsGroup):
    """Segment photos."""

    predict: PredictPart = PredictPart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    command: CommandSettings = CommandSettings()


class ExportPart(SettingsGroup):
    """What is handed on, and in which form."""

    model: str = ""
    """Name or folder of a run (its best checkpoint), folder of a checkpoint, or MLflow URI."""
    output: FolderOrUri | None = None
    """Folder for the exported files, local or s3://… None: export/ in the run's folder, or no files with --register."""
    formats: tuple[Format, ...] = FORMATS
    """Formats to write. Each takes float32 (N, S, S, 3) in [0, 1] and gives probabilities (N, S, S, C); the caller
    resizes photos. tflite_float16 is half as large as tflite, tflite_int8 a quarter."""
    images: ExistingFolder | None = None
    """Folder of photos to compare the formats on, and to measure the ranges of tflite_int8 on. None: the run's own
    photos of val, or drawn pets where they are gone."""
    threads: Annotated[int | None, Field(ge=1)] = None
    """Threads of each format while it is timed. None: one per CPU."""
    register: RegisteredName | None = None
    """Make the run's packaged model a version of this registered model; it becomes the champion if it scores better on
    val."""

    @field_validator("formats")
    @classmethod
    def _each_once(cls, value):
        if not value:
            raise ValueError("name at least one of saved_model, tflite, onnx, tflite_float16, tflite_int8")
        return tuple(dict.fromkeys(value))


class ExportSettings(SettingsGroup):
    """Export and register a trained model."""

    export: ExportPart = ExportPart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    command: CommandSettings = CommandSettings()
