"""The settings of a training run."""

import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from unet.config.common import CommandSettings, StoreSettings
from unet.config.data import DataSettings
from unet.config.fields import FORMATS, Format, RegisteredName, known_from_anywhere
from unet.config.recipes import MINUTES, REFERENCE, recipe_name
from unet.recipe.augment import AugmentSettings
from unet.recipe.loss import LossSettings
from unet.recipe.network import ModelSettings
from unet.recipe.networks import describe
from unet.recipe.optimizer import OptimizerSettings
from unet.recipe.recipe import Recipe, TrainingSettings
from unet.recipe.start import StartSettings
from unet.settings import Device, SettingsGroup, parse_interval

FENCING_TOKEN = ".fencing-token"
"""File with the token that lets the current group of workers write into a run's folder."""


DEFAULT_EPOCHS = 10


class LengthSettings(SettingsGroup):
    """How long it takes."""

    minutes: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Train as long as that, from the start of the workers to the model's package, --epochs at most; a run that is
    continued goes on with the time it had left. The schedule ends with it, by the measured speed, so the numbers
    depend on that. None: until --epochs."""


class ComputeSettings(SettingsGroup):
    """What the training runs on."""

    num_workers: int | str = 1
    """Number of training processes; each takes an equal share of every batch. A range such as 1:4 is elastic: start
    with what is free, go on without workers that are lost, add workers when there is room."""
    threads: Annotated[int | None, Field(ge=1)] = None
    """TensorFlow threads per worker. None: as many as it really has cores."""
    device: Device = "auto"
    """auto: a GPU for each worker if the cluster has enough, else CPUs. gpu: refuse to start without enough GPUs. cpu:
    use no GPU."""
    deterministic: bool = False
    """Use only TensorFlow operations that repeat bit for bit. It slows GPUs down; CPUs repeat without it."""
    max_failures: Annotated[int, Field(ge=0)] = 5
    """Restart lost workers at most this many times in a row without a new checkpoint."""
    step_timeout: str = "10m"
    """Restart the workers when no training step and no scoring batch has ended for this long; 10m is ten minutes."""

    @field_validator("num_workers")
    @classmethod
    def _is_range(cls, value):
        match = re.fullmatch(r"(\d+)(?::(\d+))?", str(value))
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise ValueError(f"--num-workers {value} is not a number of workers: write 2, or 1:2 for one to two")
        return int(value) if least == most else str(value)

    @field_validator("step_timeout")
    @classmethod
    def _is_minutes(cls, value):
        if parse_interval(value)[0] != "seconds":
            raise ValueError(f"--step-timeout {value} is not a duration: write 10m for ten minutes")
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


class RunSettings(StoreSettings):
    """The run, and where its results go."""

    run_name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)] = None
    """Name of the run; with the same settings, an existing name continues that run. None: the current time."""
    resume: str | None = None
    """Continue this run with the settings it was started with."""
    reproduce: str | None = None
    """Train this run again under a new name, RUN-again, and compare its numbers epoch by epoch. A run's name, its id in
    MLflow, or runs:/ID."""
    sync: str | None = None
    """Train nothing; send MLflow what it lacks of this run, which has ended."""
    checkpoint_every: str | None = "10m"
    """Also save within an epoch: 200 means every 200 steps, 10m every ten minutes, None never. The end of each epoch is
    always saved."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """How many of the best checkpoints to keep; the latest is always kept."""
    experiment: str = "unet-pets"
    """Name of the MLflow experiment."""
    register: RegisteredName | None = None
    """Register the model in MLflow under this name; it becomes the champion if it scores better on val."""
    report: bool = False
    """At the end also score the test split (of data without one: val) as jobs/evaluate.py does, with a page of scores,
    worst images and likely label errors: report.html in evaluations/ in the run's folder."""
    export: tuple[Format, ...] | None = None
    """At the end also write the network in these formats into export/ in the run's folder, as jobs/export.py does;
    --export alone: as saved_model, tflite and onnx."""

    tensorboard: bool = False
    """Write metrics and pictures for TensorBoard, too, into tensorboard/ in the run's folder."""

    @field_validator("run_name")
    @classmethod
    def _is_free(cls, value):
        if value in ("data", "comparisons", "mlartifacts", "mlflow.db"):
            raise ValueError(f"--run-name {value} is a name that the storage path needs itself: choose another")
        return value

    @field_validator("checkpoint_every")
    @classmethod
    def _is_interval(cls, value):
        if value is not None:
            parse_interval(value)
        return value

    @field_validator("export")
    @classmethod
    def _usual_if_none_is_named(cls, value):
        return value if value is None else tuple(dict.fromkeys(value)) or FORMATS

    @model_validator(mode="after")
    def _syncs_only(self):
        if self.sync and (self.resume or self.run_name):
            raise ValueError("--sync names the run itself: leave out --resume and --run-name")
        return self

    @model_validator(mode="after")
    def _remote_needs_server(self):
        if "://" in self.storage_path and not self.tracking_uri:
            raise ValueError(
                "--storage-path in an object store needs --tracking-uri: the default, SQLite, needs a local disk"
            )
        if "://" in self.storage_path and self.tensorboard:
            raise ValueError(
                "--tensorboard needs a --storage-path on a disk, since its files grow, and objects cannot: leave it out"
            )
        return self


class TrainCommandSettings(CommandSettings):
    """The command itself."""

    recipe: Annotated[str, AfterValidator(recipe_name)] = REFERENCE
    """A recipe in recipes/, or a YAML file of such settings: network, loss, optimizer, schedule, augmentation and so
    on. A flag, and a line of --config, override it."""


class TrainSettings(SettingsGroup):
    """Train a U-Net on several workers and track it in MLflow."""

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    loss: LossSettings = LossSettings()
    augment: AugmentSettings = AugmentSettings()
    start: StartSettings = StartSettings()
    length: LengthSettings = LengthSettings()
    compute: ComputeSettings = Field(default_factory=ComputeSettings)
    run: RunSettings = Field(default_factory=RunSettings)
    command: TrainCommandSettings = TrainCommandSettings()

    @field_validator("start")
    @classmethod
    def _is_found_from_anywhere(cls, start):
        found = {name: known_from_anywhere(value) for name, value in start.model_dump(exclude_none=True).items()}
        return start.model_copy(update=found)

    @model_validator(mode="after")
    def _fits_together(self):
        check_image_size(self.data.image_size, self.model)
        compute, shards, batch = self.compute, self.training.grad_shards, self.training.batch_size
        if compute.most_workers > batch:
            raise ValueError(
                f"--num-workers {compute.num_workers} is more than --batch-size {batch}: some workers would be idle"
            )
        ends = (compute.least_workers, compute.most_workers)
        if shards > 1 and (any(shards % workers for workers in ends) or batch % shards):
            raise ValueError(
                f"--grad-shards {shards} must be a multiple of --num-workers {compute.num_workers} and divide "
                f"--batch-size {batch}"
            )
        if self.epochs and self.optimizer.warmup_epochs >= self.epochs:
            raise ValueError(
                f"--warmup {self.optimizer.warmup} leaves nothing of {self.epochs} epochs to train at the full rate: "
                "give less"
            )
        return self

    def recipe(self, classes: int) -> Recipe:
        """What of these settings a training step depends on, for a number of classes."""
        return Recipe(
            image_size=self.data.image_size,
            classes=classes,
            model=self.model,
            training=self.training,
            optimizer=self.optimizer,
            loss=self.loss,
            augment=self.augment,
            start=self.start,
        )

    @property
    def epochs(self) -> int | None:
        """How many epochs there are at most; None: as many as the minutes allow."""
        return self.training.epochs or (DEFAULT_EPOCHS if self.length.minutes is None else None)

    @property
    def length_in_words(self) -> str:
        minutes, epochs = self.length.minutes, self.epochs
        if minutes is None:
            return f"{epochs} epochs"
        return f"{minutes:g} minutes" + (f", at most {epochs} epochs" if epochs else "")

    def with_precision(self, precision: str) -> Self:
        """The same in another precision."""
        training = self.training.model_copy(update={"precision": precision})
        return self.model_copy(update={"training": training})

    def with_class_weights(self, weights: str | None) -> Self:
        """The same with other class weights."""
        return self.model_copy(update={"loss": self.loss.model_copy(update={"class_weights": weights})})

    @property
    def worker_counts(self) -> list[int]:
        """The allowed numbers of workers, in growing order: with gradient shards only those that divide them."""
        shards = self.training.grad_shards
        allowed = range(self.compute.least_workers, self.compute.most_workers + 1)
        return [workers for workers in allowed if shards == 1 or shards % workers == 0]


NOT_OF_A_SWEEP = (MINUTES, "report", "export")
"""Settings of a training that a sweep does not take over from its file: its minutes are the sweep's."""

MAY_CHANGE = frozenset(
    (
        *("data", "memory_budget", "epochs", "minutes", "patience", "num_workers", "threads", "checkpoint_every"),
        *("max_failures", "step_timeout", "device", "deterministic"),
        *("on_nan", "precision", "keep_checkpoints", "storage_path", "tracking_uri", "run_name", "resume", "sync"),
        *("reproduce", "register", "report", "export", "tensorboard", "recipe", "config", "debug"),
    )
)
"""Settings that may change when a run continues; its data are compared by their digest."""
OF_THIS_PLACE = ("storage_path", "tracking_uri", "run_name", "resume", "config", "debug")
"""Settings that say where something is, not how a network learns: best_config.yaml leaves them out, so that it trains
anywhere."""


def check_image_size(image_size: int, model: ModelSettings) -> None:
    """Refuse a side that the network's stride does not divide.

    Raises:
        ValueError: with the nearest sizes that fit.
    """
    multiple = describe(model, 1).stride
    if image_size % multiple:
        below = image_size // multiple * multiple
        fits = " and ".join(str(s) for s in (below, below + multiple) if s)
        raise ValueError(
            f"--image-size {image_size} is not a multiple of {multiple} (the stride of --network {model.network} at "
            f"--depth {model.depth}): the nearest are {fits}"
        )
