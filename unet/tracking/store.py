"""An MLflow store: its experiment, and the runs of it, found by their id or by a key of their own."""

from pathlib import Path

from unet.errors import InputError, first_line
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.tracking.database import ARTIFACTS, ready
from unet.tracking.library import load_mlflow
from unet.tracking.reach import default_uri, is_database

KEY = "unet.run_key"
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
"""MLflow's error codes that another attempt would get again."""
MISUSES = (*REFUSALS, "ENDPOINT_NOT_FOUND", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")
"""Its error codes at a run's start that mean a store can never be used this way."""


def refused(error: BaseException) -> bool:
    """Whether the store has answered, and would give the same answer again."""
    return getattr(error, "error_code", None) in REFUSALS


def _misused(error: Exception) -> bool:
    """Whether a store that raises this at a run's start can never be used."""
    old = "out-of-date database schema" in str(error)  # MLflow has no code for it; the text names the remedy
    return isinstance(error, ImportError) or old or getattr(error, "error_code", None) in MISUSES


class Store:
    """An opened MLflow store. Its methods raise what goes wrong.

    Attributes:
        client: MLflow's.
        experiment_id: of the experiment that new runs belong to; None without one.
        file_seconds: how long the file being sent may take; None while there is none.
    """

    def __init__(self, storage: Folder, experiment: str | None, uri: str | None = None):
        """Open it, and create the experiment if there is none of that name; None leaves experiments alone.

        Raises:
            InputError: the store can never be used.
        """
        mlflow = load_mlflow()
        self.uri = uri or default_uri(storage)
        self.file_seconds: float | None = None
        ready(self.uri)
        try:
            self.client = mlflow.MlflowClient(self.uri)
            self.experiment_id = self._experiment(storage, experiment) if experiment else None
        except (mlflow.exceptions.MlflowException, ImportError) as error:
            if _misused(error):
                reason = without_secrets(first_line(error))[:300]
                raise InputError(f"MLflow cannot use {without_secrets(self.uri)}: {reason}") from error
            raise

    def _experiment(self, storage: Folder, name: str) -> str:
        import mlflow

        found = self.client.get_experiment_by_name(name)
        if found is None:
            # Absolute, since a database's default is a folder of the current directory. A server has a default of its
            # own. As a URI, since MLflow would percent-decode a path.
            beside = is_database(self.uri) and storage.is_local
            location = (Path(storage.path) / ARTIFACTS / name).as_uri() if beside else None
            try:
                # Without the kind, the UI opens an experiment on its page for language models.
                kind = {"mlflow.experimentKind": "custom_model_development"}
                return self.client.create_experiment(name, artifact_location=location, tags=kind)
            except mlflow.exceptions.MlflowException:  # another process was quicker
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise InputError(f"The MLflow experiment {name} was deleted: restore it, or give another --experiment.")
        return found.experiment_id

    def existing(self, run_id: str | None) -> str | None:
        """This id, if the store has an active run of it."""
        import mlflow

        if run_id is None:
            return None
        try:
            run = self.client.get_run(run_id)
        except mlflow.exceptions.MlflowException as error:
            if refused(error):
                return None
            raise
        return run_id if run.info.lifecycle_stage == "active" else None

    def find(self, key: str, own: str | None = None) -> str | None:
        """The id of the run with this key, if there is one.

        A creation whose answer was lost may have made two: `own` stays (else the oldest), the other is deleted.
        """
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        found = self.client.search_runs([self.experiment_id], f"tags.`{KEY}` = '{key}'", order_by=order)
        ids = [run.info.run_id for run in found]
        kept = own if own in ids else next(iter(ids), None)
        for double in ids:
            if double != kept:
                self.client.delete_run(double)
        return kept
