"""What a run is: typed, validated settings, one class per part, flat on the command line and in files.

A field's docstring is its help text. `flat` and `unflat` turn the parts into one dictionary of names with
underscores, as `--config FILE` and a run's `config.yaml` hold them, and back.
"""

import difflib
import os
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from unet.errors import InputError
from unet.secrets import without_secrets
from unet.storage import Folder

TICKET = ".ticket"
"""What the workers under way may write into a run's folder by."""
CONFIG = "config.yaml"
"""What the folder of a run or sweep holds as long as it is there: its flat settings."""

Precision = Literal["float32", "mixed_bfloat16", "mixed_float16"]


Resize = Literal["stretch", "letterbox"]

SOURCES = ("synthetic", "oxford_iiit_pet")


def is_source_name(source: str) -> bool:
    """Whether this names a source (such as synthetic:5000) and is no path."""
    return source.partition(":")[0] in SOURCES


class Part(BaseModel):
    """A group of settings: unknown names are refused, and nothing changes after the door."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def __init__(self, **values):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(sentence(error)) from error


class DataSettings(Part):
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
        is_path = "://" not in value and not is_source_name(value) and Path(value).expanduser().exists()
        return str(Path(value).expanduser().absolute()) if is_path else value

    @field_validator("memory_budget")
    @classmethod
    def _is_size(cls, value):
        if value is not None:
            parse_bytes(value)
        return value


class ModelSettings(Part):
    """The U-Net."""

    base_filters: Annotated[int, Field(ge=1, le=1024)] = 64
    """Filters of the first block; each level below doubles them."""
    depth: Annotated[int, Field(ge=1, le=7)] = 4
    """Number of poolings."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of activations dropped after each pooling and concatenation."""


class TrainingSettings(Part):
    """How it learns."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training samples."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """The global batch, divided among the workers."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Of Adam."""
    precision: Precision = "float32"
    """Of the training step; scores are always taken in float32."""
    clip_norm: Annotated[float | None, Field(gt=0)] = None
    """Clip the summed gradient to this global norm."""
    on_nan: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: stop the run, or pass over the step."""
    patience: Annotated[int | None, Field(ge=1)] = None
    """Stop after so many epochs without a better val mean IoU. Default: never."""
    grad_shards: Annotated[int, Field(ge=1)] = 1
    """Sum the gradient of so many equal parts of the batch in a fixed order: with 2 and one thread a worker, one
    worker and two give the same numbers."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of initial weights, order, flips and dropout."""


class ComputeSettings(Part):
    """What it runs on."""

    num_workers: int | str = 1
    """Training processes; each takes an equal share of every batch. 1:4 is elastic: begin with what is free, give up
    workers that are lost, take more when there is room."""
    threads: Annotated[int | None, Field(ge=1)] = None
    """TensorFlow threads a worker. Default: the cores it really has."""
    max_failures: Annotated[int, Field(ge=0)] = 5
    """Start lost workers again at most so often in a row without a new checkpoint."""
    step_timeout: str = "10m"
    """Start the workers again when no step or batch of scoring has ended for so long; 10m is minutes."""

    @field_validator("num_workers")
    @classmethod
    def _is_range(cls, value):
        match = re.fullmatch(r"(\d+)(?::(\d+))?", str(value))
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise ValueError(f"--num-workers {value} is no number of workers: give 2, or 1:2 for one to two")
        return int(value) if least == most else str(value)

    @field_validator("step_timeout")
    @classmethod
    def _is_minutes(cls, value):
        if parse_interval(value)[0] != "seconds":
            raise ValueError(f"--step-timeout {value} is no time: 10m means ten minutes")
        return value

    @property
    def least_workers(self) -> int:
        return int(str(self.num_workers).split(":")[0])

    @property
    def most_workers(self) -> int:
        return int(str(self.num_workers).split(":")[-1])

    @property
    def is_elastic(self) -> bool:
        return self.least_workers < self.most_workers


class StoreSettings(Part):
    """Where runs and prepared data are."""

    storage_path: str = Field(default_factory=lambda: os.environ.get("UNET_STORAGE_PATH", "~/unet-runs"))
    """Folder of runs and prepared data (UNET_STORAGE_PATH, else ~/unet-runs); may be s3://…"""
    tracking_uri: str | None = None
    """MLflow server or store. Default: sqlite under the storage path."""

    @field_validator("storage_path")
    @classmethod
    def _absolute(cls, value):
        # Absolute, because a submitted job runs in a temporary copy of the working directory.
        return value if "://" in value else str(Path(value).expanduser().absolute())

    @field_validator("tracking_uri")
    @classmethod
    def _password_is_encoded(cls, value):
        # Else a part of it is taken for the host, and said so in many places.
        if value and value.startswith("http") and without_secrets(value) != value and "@" not in urlsplit(value).netloc:
            raise ValueError("write # ? / in a password as %23 %3F %2F")
        return value


class RunSettings(StoreSettings):
    """Where it goes."""

    run_name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)] = None
    """Default: the time. The same name with the same settings continues the run."""
    resume: str | None = None
    """Continue this run, with the settings it was started with."""
    sync: str | None = None
    """Train nothing: send what MLflow lacks of this run, which has ended."""
    checkpoint_every: str | None = "10m"
    """Save inside an epoch too: 200 is steps, 10m minutes, None never. Each epoch's end is saved in any case."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """How many of the best checkpoints stay; the last one always does."""
    experiment: str = "unet-pets"
    """MLflow experiment."""

    @field_validator("run_name")
    @classmethod
    def _is_free(cls, value):
        if value in ("data", "mlartifacts", "mlflow.db"):
            raise ValueError(f"--run-name {value} is a name that the storage path keeps for itself")
        return value

    @field_validator("checkpoint_every")
    @classmethod
    def _is_interval(cls, value):
        if value is not None:
            parse_interval(value)
        return value

    @model_validator(mode="after")
    def _syncs_only(self):
        if self.sync and (self.resume or self.run_name):
            raise ValueError("--sync names the run itself: leave out --resume and --run-name")
        return self

    @model_validator(mode="after")
    def _remote_needs_server(self):
        if "://" in self.storage_path and not self.tracking_uri:
            raise ValueError("--storage-path in an object store needs --tracking-uri: sqlite cannot live there")
        return self


class DoorSettings(Part):
    """This command."""

    config: Path | None = None
    """YAML file of settings, named as the flags with underscores. A flag beats the file."""
    debug: bool = False
    """Show tracebacks and the messages of Ray and TensorFlow."""


class TrainSettings(Part):
    """Train a U-Net on several workers and track it in MLflow."""

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    compute: ComputeSettings = Field(default_factory=ComputeSettings)
    run: RunSettings = Field(default_factory=RunSettings)
    door: DoorSettings = DoorSettings()

    @model_validator(mode="after")
    def _fits_together(self):
        check_image_size(self.data.image_size, self.model.depth)
        compute, shards, batch = self.compute, self.training.grad_shards, self.training.batch_size
        if compute.most_workers > batch:
            raise ValueError(
                f"--num-workers {compute.num_workers} is more than --batch-size {batch}: some would have no sample"
            )
        ends = (compute.least_workers, compute.most_workers)
        if shards > 1 and (any(shards % workers for workers in ends) or batch % shards):
            raise ValueError(
                f"--grad-shards {shards} must be a multiple of --num-workers {compute.num_workers} and divide "
                f"--batch-size {batch}"
            )
        return self

    @property
    def worker_counts(self) -> list[int]:
        """How many workers there may be, in growing order: with micro-shards only numbers that divide them."""
        shards = self.training.grad_shards
        allowed = range(self.compute.least_workers, self.compute.most_workers + 1)
        return [workers for workers in allowed if shards == 1 or shards % workers == 0]


class PreparePart(Part):
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
        return str(Path(value).expanduser().absolute()) if is_path else value

    @field_validator("source_dir")
    @classmethod
    def _dir_from_home(cls, value):
        return value and value.expanduser().absolute()

    @model_validator(mode="after")
    def _source_dir_fits(self):
        if self.source_dir and self.source != "oxford_iiit_pet":
            raise ValueError("--source-dir goes with --source oxford_iiit_pet; give other archives as --source")
        return self


class PrepareSettings(Part):
    """Turn raw pets into shards."""

    prepare: PreparePart = PreparePart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    door: DoorSettings = DoorSettings()


class EvaluatePart(Part):
    """What is scored on what."""

    model: str = ""
    """A run's name (its best checkpoint), or a checkpoint's folder."""
    data: str = "synthetic"
    """As for training."""
    split: Literal["train", "val", "test"] = "test"
    """Which samples."""
    output: str | None = None
    """Also write metrics.json into this folder."""


class EvaluateSettings(Part):
    """Score a trained model."""

    evaluate: EvaluatePart = EvaluatePart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    door: DoorSettings = DoorSettings()


# The flag is --register; that every Pydantic model has an unrelated method of this name does no harm.
warnings.filterwarnings("ignore", message='Field name "register" in "SweepSettings" shadows')


class SweepSettings(Part):
    """The search."""

    space: str = "default"
    """A space of tune_spaces/ by name, or a YAML file."""
    num_samples: Annotated[int | None, Field(ge=1)] = None
    """How many trials. Default: 10; with --minutes as many as fit; with --search grid all combinations."""
    minutes: Annotated[float | None, Field(gt=0)] = None
    """Stop so long after the first trial of this start began; trials under way keep their scores so far."""
    search: Literal["random", "grid", "tpe"] = "random"
    """Draw at random, try every combination, or learn from the scores so far (Optuna's TPE)."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """Stop bad trials early (asha), let bad ones take over the weights and nearby settings of good ones (pbt), or
    train each to its end."""
    grace_epochs: Annotated[int, Field(ge=1)] = 1
    """asha stops no trial before; pbt compares the trials every so many epochs."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    """asha lets the best 1/F go on at the epochs GRACE, GRACE*F, GRACE*F*F, …"""
    register: Annotated[str | None, Field(pattern=r"^[^/:]+$")] = None
    """Register the best trial's model in MLflow under this name."""
    extend: Annotated[int | None, Field(ge=1)] = None
    """Add so many trials to a sweep that is finished."""

    @field_validator("space")
    @classmethod
    def _found_from_anywhere(cls, value):
        return str(Path(value).expanduser().absolute()) if value.endswith((".yaml", ".yml")) else value


class TuneSettings(TrainSettings):
    """A training's settings and the search over some of them."""

    sweep: SweepSettings = SweepSettings()

    @model_validator(mode="after")
    def _search_fits(self):
        sweep = self.sweep
        if self.run.sync:
            raise ValueError("--sync is for `jobs/train.py`; --resume sends what MLflow lacks of a sweep")
        if sweep.search == "grid" and (sweep.num_samples or sweep.extend):
            raise ValueError("--search grid tries every combination: leave out --num-samples and --extend")
        if self.compute.is_elastic:
            raise ValueError(f"--num-workers {self.compute.num_workers}: the trials of a sweep need one number")
        if sweep.scheduler == "pbt" and self.compute.most_workers > 1:
            raise ValueError(
                "--scheduler pbt hands weights from trial to trial, which works for trials of one worker only: give "
                "--num-workers 1, or --scheduler asha"
            )
        if sweep.scheduler == "pbt" and sweep.search != "random":
            raise ValueError(
                f"--scheduler pbt changes settings in flight, so --search {sweep.search} could not learn from or "
                "cover them: leave out --search"
            )
        return self


MAY_CHANGE = frozenset(
    (
        *("data", "memory_budget", "epochs", "patience", "num_workers", "threads", "checkpoint_every"),
        *("max_failures", "step_timeout"),
        *("on_nan", "keep_checkpoints", "storage_path", "tracking_uri", "run_name", "resume", "sync"),
        *("config", "debug"),
    )
)
"""Settings that may change when a run continues (its data are compared by their digest)."""
SWEEP_MAY_CHANGE = MAY_CHANGE - {"epochs", "patience", "num_workers", "on_nan"} | {"minutes", "register", "extend"}
"""The same of a sweep, whose trials must stay comparable."""
SEARCHABLE = frozenset(ModelSettings.model_fields) | frozenset(TrainingSettings.model_fields) - {
    *("epochs", "patience", "on_nan"),
}
"""Settings that a space may draw: what changes the model or how it learns, not how long or on what."""


def check_image_size(image_size: int, depth: int) -> None:
    """Refuse a side that `depth` poolings do not divide.

    Raises:
        ValueError: with the nearest sizes that fit.
    """
    multiple = 2**depth
    if image_size % multiple:
        below = image_size // multiple * multiple
        fits = " and ".join(str(s) for s in (below, below + multiple) if s)
        raise ValueError(f"--image-size {image_size} is not a multiple of {multiple} (2**depth): nearest are {fits}")


def parse_bytes(text: str) -> int:
    """'8GB', '500 MB', '2GiB' or plain bytes as a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size: write it like 8GB or 500MB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def parse_interval(text: str) -> tuple[Literal["steps", "seconds"], float]:
    """'200' as ("steps", 200), '10m' as ("seconds", 600)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)m|(\d+)", text)
    if not match or not float(match[1] or match[2]):
        raise ValueError(f"{text!r} is not an interval: 200 means steps, 10m minutes")
    return ("seconds", float(match[1]) * 60) if match[1] else ("steps", int(match[2]))


Settings = TypeVar("Settings", bound=BaseModel)


def flat(settings: BaseModel) -> dict[str, Any]:
    """All settings in one dictionary, ready for YAML."""
    return {name: value for part in settings.model_dump(mode="json").values() for name, value in part.items()}


def unflat(cls: type[Settings], values: dict[str, Any], source: str = "the settings") -> Settings:
    """Settings from a flat dictionary.

    Raises:
        InputError: an unknown name (with the nearest known) or a value that does not fit.
    """
    parts = {part: set(field.annotation.model_fields) for part, field in cls.model_fields.items()}
    nested: dict[str, dict] = {part: {} for part in parts}
    for name, value in values.items():
        part = next((part for part, names in parts.items() if name in names), None)
        if part is None:
            near = difflib.get_close_matches(str(name), set().union(*parts.values()), n=1)
            raise InputError(f"{source}: unknown setting {name!r}" + (f"; did you mean {near[0]}?" if near else "."))
        nested[part][name] = value
    try:
        return cls(**nested)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def load_yaml(path: Path) -> dict[str, Any]:
    """The flat settings of a file.

    Raises:
        InputError: the file is missing or not a mapping of names to values.
    """
    try:
        values = parse_yaml(path.read_bytes(), f"--config {path}")
    except OSError as error:
        raise InputError(f"Cannot read --config {path}: {error.strerror}.") from error
    if not isinstance(values or {}, dict):
        raise InputError(f"--config {path} must hold `name: value` lines.")
    return values or {}


def parse_yaml(content: bytes | str, what: str) -> Any:
    """YAML of plain values; a tag that would make an object of them is refused.

    Raises:
        InputError: it is not that.
    """
    try:
        return yaml.safe_load(content)
    except Exception as error:  # beside its own, PyYAML lets out whatever the values of odd tags lead to
        raise InputError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error


def read_config(folder: Folder) -> dict[str, Any]:
    """The flat settings that the folder of a run or sweep keeps.

    Raises:
        InputError: they are damaged.
    """
    values = parse_yaml(folder.read_bytes(CONFIG), f"{folder}/{CONFIG}")
    if not isinstance(values, dict):
        raise InputError(f"{folder}/{CONFIG} does not hold `name: value` lines: bring back a copy of it.")
    return values


def sentence(error: ValidationError) -> str:
    """A validation error in one sentence that names the flag."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["loc"] and not message.startswith("--"):
        flag = "--" + str(first["loc"][-1]).replace("_", "-")
        value = first.get("input")
        message = f"{flag} {value}: {message[0].lower()}{message[1:]}" if not isinstance(value, dict) else message
    return message + "."
