"""Versions of a registered model in MLflow, and which of them is the champion.

The val score decides, never the test score, which is only recorded. A version is a logged model of a run: one
that is continued and packaged again has another, and changes no version that others use.
"""

import contextlib
import math
from dataclasses import dataclass

from unet.config import RunSettings
from unet.errors import InputError, RunFailed, first_line
from unet.metric_names import SCORE, TEST_SCORE
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.terminal import Display
from unet.tracking.database import ready
from unet.tracking.library import load_mlflow
from unet.tracking.logged_models import CHECKPOINT, packaged_of
from unet.tracking.reach import default_uri

CHAMPION = "champion"


@dataclass(frozen=True)
class Version:
    """A version of a registered model, as its tags say.

    Attributes:
        model, number: `models:/MODEL/NUMBER`.
        val_mean_iou: of its weights on the validation split of its data; None if unknown.
        data_digest: of those data.
    """

    model: str
    number: str
    val_mean_iou: float | None
    data_digest: str

    @property
    def uri(self) -> str:
        return f"models:/{self.model}/{self.number}"

    @classmethod
    def of(cls, found) -> "Version":
        """From MLflow's own record, which another program may have made."""
        try:
            score = float(found.tags.get("val_mean_iou", ""))
        except ValueError:
            score = math.nan
        known = score if math.isfinite(score) else None
        return cls(found.name, str(found.version), known, found.tags.get("data_digest", ""))


def judge(new: Version, champion: Version | None) -> tuple[bool, str]:
    """Whether the new version becomes the champion, and a sentence that says why.

    Mean IoUs are compared only on the same validation data.
    """
    if champion is None:
        return True, f"{new.uri} is the {CHAMPION}: the first one."
    if champion.number == new.number:
        return True, f"{new.uri} is already the {CHAMPION}."
    same_data = new.data_digest and new.data_digest == champion.data_digest
    if new.val_mean_iou is None or champion.val_mean_iou is None or not same_data:
        unscored = " and ".join(version.uri for version in (new, champion) if version.val_mean_iou is None)
        why = f"it was validated on different data from {new.uri}, so their scores cannot be compared"
        why = f"there is no val score of {unscored}" if unscored else why
        return False, (
            f"{champion.uri} is still the {CHAMPION}: {why}. Score both on one validation split: python "
            f"jobs/evaluate.py --model {new.uri},{champion.uri} --data DATA --split val; if the new one is better, "
            f"give it the alias {CHAMPION} in MLflow."
        )
    scores = f"its val mean IoU is {new.val_mean_iou:.4f} against {champion.val_mean_iou:.4f} of {champion.uri}"
    if new.val_mean_iou > champion.val_mean_iou:
        return True, f"{new.uri} is now the {CHAMPION}: {scores}."
    return False, f"{new.uri} is not the {CHAMPION}: {scores}."


def register(tracking_uri: str, name: str, run_id: str, display: Display, checkpoint: str | None = None) -> str:
    """Register a run's packaged model as a version, unless it is one already; the champion if it is better.

    Args:
        tracking_uri: of the store that has the run.
        name: of the registered model, which is created if there is none.
        run_id: of the run in MLflow.
        display: shows the outcome.
        checkpoint: the one that the packaged model must be of; default: any.

    Returns:
        The URI of the version.

    Raises:
        InputError: the packaged model is of another checkpoint.
        RunFailed: MLflow has no such model, or does not accept it.
    """
    mlflow = load_mlflow()
    try:
        ready(tracking_uri)
        client = mlflow.MlflowClient(tracking_uri)
        version = _version(client, name, run_id, checkpoint)
        becomes, words = judge(version, _champion(client, name))
        if becomes:
            client.set_registered_model_alias(name, CHAMPION, version.number)
    except (InputError, RunFailed):
        raise
    except Exception as error:  # whatever the store's library raises
        reason = without_secrets(first_line(error))[:300]
        raise RunFailed(
            f"MLflow at {without_secrets(tracking_uri)} did not register the model of its run {run_id} as {name}: "
            f"{reason}. The same command tries again."
        ) from error
    display.say(f"Registered: {words}")
    return version.uri


def register_run(summary: dict, run: RunSettings, display: Display) -> None:
    """`--register` of a finished training, with its summary.

    Raises:
        RunFailed: MLflow lacks the model, or does not accept it.
    """
    if not summary.get("delivered", True):
        raise RunFailed(
            f"The model is not registered as {run.register}, since MLflow lacks it: when MLflow answers again, the "
            "same command with --run-name sends and registers it."
        )
    uri = run.tracking_uri or default_uri(Folder(run.storage_path))
    assert run.register is not None  # it is asked for
    register(uri, run.register, summary["mlflow_run_id"], display)


def _version(client, name: str, run_id: str, checkpoint: str | None) -> Version:
    """The version of a run's packaged model, found or created."""
    from mlflow.exceptions import MlflowException

    model = packaged_of(client, run_id)
    if model is None:
        raise RunFailed(
            f"The run {run_id} has no packaged model in MLflow. If it has ended, send it: "
            "python jobs/train.py --sync RUN_NAME"
        )
    run, packaged = model.tags["run_name"], model.tags[CHECKPOINT]
    if checkpoint not in (None, packaged):
        raise InputError(
            f"The packaged model of the run {run} is of its checkpoint {packaged}, not of {checkpoint}. Only the "
            f"packaged one can be registered: give --model {run}."
        )
    with contextlib.suppress(MlflowException):  # it is there already
        client.create_registered_model(name)
    for known in client.search_model_versions(f"name = '{name}'"):
        if known.run_id == run_id and known.tags.get("checkpoint") == packaged:
            return Version.of(known)
    scores = {metric.key: metric.value for metric in model.metrics or []}
    tags = {"run": run, "checkpoint": packaged, "data_digest": model.tags.get("data_digest")}
    # The test score is reported, never decisive.
    tags |= {"val_mean_iou": scores.get(SCORE), "test_mean_iou": scores.get(TEST_SCORE)}
    tags = {key: str(value) for key, value in tags.items() if value is not None}
    place = model.artifact_location
    return Version.of(client.create_model_version(name, place, run_id, tags=tags, model_id=model.model_id))


def _champion(client, name: str) -> Version | None:
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if champion is None else Version.of(client.get_model_version(name, champion))
