"""The trained network that `--model` means, with its weights as plain arrays: a run's, a checkpoint's or MLflow's.

A job's driver needs no TensorFlow: a task of Ray reads the variables of an MLflow model, without running its graph.
"""

import errno
import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from unet.classes import Classes, ClassInfo
from unet.cluster.session import cause_of, in_task
from unet.config import (
    CONFIG,
    DataSettings,
    Resize,
    parse_yaml,
    read_config,
)
from unet.errors import Damaged, InputError, first_line
from unet.recipe.folding import folded, folded_weights
from unet.recipe.loss import LossSettings
from unet.recipe.network import ModelSettings, Network, Shapes
from unet.recipe.networks import describe
from unet.runs.checkpoint import STATE, Checkpoints
from unet.runs.run import MODEL, read_summary
from unet.secrets import lost, without_secrets
from unet.storage import Folder
from unet.tracking.logged_models import packaged_of

MLMODEL = "MLmodel"
VARIABLES = "variables/variables"
"""Where TensorFlow keeps the variables of a packaged model, in its own folder there."""


@dataclass(frozen=True, repr=False)  # the weights would fill a log
class TrainedModel:
    """A network with the weights of one checkpoint, its batch norms folded into its convolutions.

    Attributes:
        name: as given: a run's name, the folder of a run or a checkpoint, or an MLflow URI.
        network: its settings.
        image_size: side of its square input, in pixels.
        resize: how photos become that square.
        classes: what its outputs mean, in the order of their ids.
        weights: float32 arrays by name (`description.variables`).
        loss: what was minimised.
        data_digest: of the data it was trained on.
        val_mean_iou: of these weights on the training's validation split; None if they were not scored.
        run_name, checkpoint: where these weights come from.
        run: that run's folder; None for an MLflow model, whose run may be elsewhere.
        mlflow_run_id: of the run in MLflow, if it has one.
    """

    name: str
    network: ModelSettings
    image_size: int
    resize: Resize
    classes: Classes
    weights: dict[str, np.ndarray]
    data_digest: str
    val_mean_iou: float | None
    run_name: str
    checkpoint: str
    run: Folder | None = None
    mlflow_run_id: str | None = None
    loss: LossSettings = field(default_factory=LossSettings)

    @property
    def description(self) -> Network:
        return folded(describe(self.network, len(self.classes)))

    @property
    def class_names(self) -> list[str]:
        return [c.name for c in self.classes]

    @classmethod
    def find(cls, model: str, storage: Folder, tracking_uri: str | None = None) -> "TrainedModel":
        """The model that `--model` means; a run's name means its best checkpoint.

        `tracking_uri` resolves an MLflow URI (`runs:/…`, `models:/…`; default: the store under `storage`). Its
        variables are read by a task of Ray if Ray is connected, else by TensorFlow in this process.

        Raises:
            InputError: there is no such model, or it is damaged.
        """
        place = located(model, storage)
        if place is None:
            return cls._of_mlflow(model, storage, tracking_uri)
        run, checkpoint = place
        if checkpoint is None:
            return cls._of_package(model, run)
        try:
            return cls.of_checkpoint(run, checkpoint, model)
        except Damaged as error:
            checkpoints = Checkpoints(run)
            others = [name for name in checkpoints.whole() if name != checkpoint]
            hint = f"give --model {checkpoints.folder}/{others[-1]}" if others else "restore it from a copy"
            raise InputError(f"The checkpoint {error} of {run} cannot be used: {hint}.") from error

    @classmethod
    def of_checkpoint(cls, run: Folder, checkpoint: str, name: str | None = None) -> "TrainedModel":
        """The model of a checkpoint of the run in this folder. Raises Damaged."""
        checkpoints = Checkpoints(run)
        state = checkpoints.state(checkpoint)
        recipe, resize = state.recipe(), state.settings.get("resize")
        run_name = run.path.rstrip("/").rpartition("/")[2]
        is_best = checkpoint == state.best_checkpoint
        return cls(
            name=name or run_name,
            network=recipe.model,
            loss=recipe.loss,
            image_size=recipe.image_size,
            resize=DataSettings.model_validate({"resize": resize}).resize,
            classes=state.class_infos,
            weights=folded_weights(recipe.network, checkpoints.weights(checkpoint)),
            data_digest=state.data_digest,
            val_mean_iou=state.best_score if is_best else state.score,
            run_name=run_name,
            checkpoint=checkpoint,
            run=run,
            mlflow_run_id=read_summary(run).get("mlflow_run_id"),
        )

    @property
    def about(self) -> dict:
        """The metadata of a packaged model, for JSON and YAML."""
        return {
            "classes": self.class_names,
            "colours": [list(c.colour) for c in self.classes],
            "network": self.network.model_dump(),
            "loss": self.loss.model_dump(),
            "image_size": self.image_size,
            "resize": self.resize,
            "data_digest": self.data_digest,
            "val_mean_iou": self.val_mean_iou,
            "run_name": self.run_name,
            "checkpoint": self.checkpoint,
        }

    @classmethod
    def _of_mlflow(cls, uri: str, storage: Folder, tracking_uri: str | None) -> "TrainedModel":
        from unet.tracking.database import ready
        from unet.tracking.library import load_mlflow
        from unet.tracking.patience import patient
        from unet.tracking.reach import default_uri

        mlflow = load_mlflow()
        tracking_uri = tracking_uri or default_uri(storage)
        ready(tracking_uri)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                place, run_id = _resolved(uri, mlflow.MlflowClient(tracking_uri))
                with patient():
                    mlflow.artifacts.download_artifacts(place, dst_path=scratch, tracking_uri=tracking_uri)
            except Exception as error:  # whatever the store's library raises
                words = without_secrets(f"MLflow at {tracking_uri} has no model {uri}: {first_line(error)}")
                raise InputError(words) from error
            folder = next((path.parent for path in Path(scratch).rglob(MLMODEL)), Path(scratch))
            return replace(cls._of_package(uri, Folder(folder)), mlflow_run_id=run_id)

    @classmethod
    def _of_package(cls, name: str, folder: Folder) -> "TrainedModel":
        """The model in the folder of an MLflow model."""
        try:
            mlmodel = parse_yaml(folder.read_bytes(MLMODEL), f"{name}: {MLMODEL}")
            about, place = mlmodel["metadata"], str(mlmodel["flavors"]["tensorflow"]["saved_model_dir"])
            network = ModelSettings(**about["network"])
            classes = tuple(
                ClassInfo(str(c), (int(r), int(g), int(b)))
                for c, (r, g, b) in zip(about["classes"], about["colours"], strict=True)
            )
            data = DataSettings(image_size=about["image_size"], resize=about["resize"])
            texts = [str(about[key]) for key in ("data_digest", "run_name", "checkpoint")]
            score = about["val_mean_iou"] and float(about["val_mean_iou"])
            loss = LossSettings(**about["loss"])
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise InputError(
                f"{name} is not a model that this program packaged: give the name of its run, or package it again."
            ) from error
        shapes = folded(describe(network, len(classes))).variables
        weights = _read_variables(folder, f"{place}/{VARIABLES}", shapes, name)
        digest, run_name, checkpoint = texts
        return cls(
            name=name,
            network=network,
            image_size=data.image_size,
            resize=data.resize,
            classes=classes,
            weights=weights,
            data_digest=digest,
            val_mean_iou=score,
            run_name=run_name,
            checkpoint=checkpoint,
            loss=loss,
        )


def network_of(model: str, storage: Folder, tracking_uri: str | None = None) -> ModelSettings:
    """The network of the model that `--model` means; of a checkpoint without reading its weights.

    Raises:
        InputError: there is no such model.
    """
    run, checkpoint = located(model, storage) or (None, None)
    if run and checkpoint:
        try:
            return Checkpoints(run).state(checkpoint).recipe().model
        except Damaged as error:
            raise InputError(f"The checkpoint {error} of {run} cannot be used: give another model.") from error
    return TrainedModel.find(model, storage, tracking_uri).network


def located(model: str, storage: Folder) -> tuple[Folder, str | None] | None:
    """Where the model is that `--model` means, as far as can be known without MLflow.

    Returns:
        A run's folder and its checkpoint: the best one, or the one whose folder is given; a packaged model's folder
        and None; None for an MLflow URI.

    Raises:
        InputError: there is no such model.
    """
    if not model:
        raise InputError("Say which model: --model RUN_NAME, a checkpoint's folder, or an MLflow URI.")
    if re.match(r"(runs|models):/", model):
        return None
    path = Path(model)
    try:
        if Folder(model).exists(MLMODEL):
            return Folder(model), None
        if (path / STATE).is_file():
            path = path.resolve()
            return Folder(path.parent.parent), path.name
        for run in (storage / model, Folder(path.resolve())):
            if checkpoint := best_checkpoint(run):
                return run, checkpoint
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
    raise InputError(
        f"{model!r} is neither a run with a checkpoint under {storage}, nor the folder of a run or a checkpoint, nor "
        "an MLflow URI such as models:/NAME@champion."
    )


def best_checkpoint(run: Folder) -> str | None:
    """The checkpoint that a run's name means: its best, or its last until an epoch has a score; None without any."""
    latest = Checkpoints(run).latest()
    return latest and latest[1].chosen


def tracking_uri_of(run: Folder | None) -> str | None:
    """The tracking URI of a run, from its folder; None for the default store.

    Raises:
        InputError: its URI had a secret, which was not saved.
    """
    uri = read_config(run).get("tracking_uri") if run and run.exists(CONFIG) else None
    if lost(uri):
        raise InputError(f"The tracking URI of {run} had a secret, which was not saved: give --tracking-uri.")
    return uri


def _resolved(uri: str, client) -> tuple[str, str | None]:
    """Where the files of an MLflow model are, and the id of its run."""
    if match := re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri):
        name, number, alias = match.groups()
        version = client.get_model_version(name, number) if number else client.get_model_version_by_alias(name, alias)
        # MLflow's own reading of such a URI asks the registry of the environment, whatever store it is given.
        return client.get_model_version_download_uri(name, version.version), version.run_id
    if match := re.fullmatch(r"models:/(m-[0-9a-f]+)", uri):
        model = client.get_logged_model(match[1])
        return model.artifact_location, model.source_run_id
    match = re.match(r"runs:/([0-9a-f]+)/", uri)
    if match and uri.removesuffix("/") == f"{match[0]}{MODEL}" and (model := packaged_of(client, match[1])):
        return model.artifact_location, match[1]  # MLflow's own reading, again, asks the store of the environment
    return uri, match and match[1]


def _read_variables(folder: Folder, place: str, shapes: Shapes, name: str) -> dict[str, np.ndarray]:
    """The arrays of a packaged model, by name, from its files that begin with `place`.

    TensorFlow reads them.
    """
    kept = {file: folder.read_bytes(file) for file in folder.files() if file.startswith(place)}
    try:
        arrays = in_task(_variables, kept, list(shapes))
    except Exception as error:  # whatever TensorFlow makes of damaged bytes
        raise InputError(
            f"The variables of {name} cannot be read ({first_line(cause_of(error))}): package it again."
        ) from error
    if any(arrays[key].shape != shape or arrays[key].dtype != np.float32 for key, shape in shapes.items()):
        raise InputError(f"The variables of {name} do not match its network: package it again.")
    return arrays


def _variables(kept: dict[str, bytes], names: list[str]) -> dict[str, np.ndarray]:
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as scratch:
        for file, content in kept.items():
            (Path(scratch) / Path(file).name).write_bytes(content)
        reader = tf.train.load_checkpoint(f"{scratch}/{Path(VARIABLES).name}")
        escaped = {name: name.replace(".", "..").replace("/", ".S") for name in names}  # as TensorFlow does
        return {name: reader.get_tensor(f"weights/{key}/.ATTRIBUTES/VARIABLE_VALUE") for name, key in escaped.items()}
