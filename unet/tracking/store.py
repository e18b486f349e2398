"""One run in an MLflow store, by explicit ids. Whatever is sent twice is there once.

MLflow's key of a metric is (name, time, step, value), so a line of `metrics.jsonl` may be sent again. A run is found
again by a tag with a key of its own, since the answer to its creation can be lost.
"""

import contextlib
import copy
import getpass
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from unet.data.manifest import MANIFEST, REPORT
from unet.data.shards import Prepared
from unet.errors import InputError, first_line
from unet.secrets import without_passwords, without_secrets
from unet.storage import Folder
from unet.tracking.database import ARTIFACTS, ready
from unet.tracking.library import load_mlflow
from unet.tracking.patience import patient
from unet.tracking.reach import default_uri, is_database

STATUS = {"running": "RUNNING", "finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
KEY = "unet.run_key"
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
"""What MLflow answers where trying again would end the same."""
MISUSES = (*REFUSALS, "ENDPOINT_NOT_FOUND", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")
"""What it answers where it can never be used so, as far as one can tell at a run's start."""
BATCH = 1000
"""How many metrics MLflow takes at a time."""


def refused(error: BaseException) -> bool:
    """Whether the store has answered, and would give the same answer again."""
    return getattr(error, "error_code", None) in REFUSALS


def _misused(error: Exception) -> bool:
    """Whether a store that raises this at a run's start can never be used so."""
    old = "out-of-date database schema" in str(error)  # MLflow has no code for it; the text names the remedy
    return isinstance(error, ImportError) or old or error.error_code in MISUSES


class Store:
    """One MLflow run. Its calls raise what goes wrong.

    Attributes:
        file_seconds: how long the file that is being sent may take; None while there is none.

    Raises:
        InputError: at its making, where the store can never be used so.
    """

    def __init__(self, storage: Folder, experiment: str | None, uri: str | None = None):
        """Open the store, and make the experiment if there is none of that name; None leaves experiments alone."""
        mlflow = load_mlflow()
        self.uri = uri or default_uri(storage)
        self.run_id: str | None = None
        self.file_seconds: float | None = None
        ready(self.uri)
        try:
            self.client = mlflow.MlflowClient(self.uri)
            self.experiment_id = self._experiment(storage, experiment) if experiment else None
        except (mlflow.exceptions.MlflowException, ImportError) as error:
            if _misused(error):
                raise self.unusable(error) from error
            raise

    @classmethod
    def of_existing(cls, storage: Folder, run_id: str, uri: str | None = None) -> "Store":
        """The store that has a run already.

        Raises:
            InputError: it has not.
        """
        store = cls(storage, None, uri)
        store.run_id = store._existing(run_id)
        if store.run_id is None:
            raise InputError(f"{without_secrets(store.uri)} has no run {run_id}")
        return store

    def unusable(self, error: Exception) -> InputError:
        return InputError(f"MLflow cannot use {without_secrets(self.uri)}: {without_secrets(first_line(error))[:300]}")

    def _experiment(self, storage: Folder, name: str) -> str:
        import mlflow

        found = self.client.get_experiment_by_name(name)
        if found is None:
            # Absolute, since a database's default is a folder of the current directory. A server knows its own place.
            # As a URI, since MLflow would percent-decode a path.
            own_place = is_database(self.uri) and storage.is_local
            location = (Path(storage.path) / ARTIFACTS / name).as_uri() if own_place else None
            try:
                # Without the kind, the UI opens an experiment on its page for language models.
                kind = {"mlflow.experimentKind": "custom_model_development"}
                return self.client.create_experiment(name, artifact_location=location, tags=kind)
            except mlflow.exceptions.MlflowException:  # somebody else was quicker
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise InputError(f"The MLflow experiment {name} was deleted: restore it, or give another --experiment.")
        return found.experiment_id

    def start(
        self,
        run_name: str,
        run_id: str | None,
        params: dict,
        tags: dict,
        parent_run_id: str | None = None,
        key: str | None = None,
        started: int | None = None,
    ) -> str:
        """Continue `run_id` or the run with this key, else create one; its id.

        `started` is the time of a new run in milliseconds. A run that was removed, or is of another store, is made
        anew: its whole history is sent in any case.
        """
        self.run_id = self._existing(run_id) or self.find(key)
        parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        if self.run_id is None:
            source = {
                "mlflow.user": _user(),
                "mlflow.source.name": Path(sys.argv[0]).name or "python",
                "mlflow.source.type": "LOCAL",
                "mlflow.source.git.commit": code_version(),
            }
            own = {KEY: key} if key else {}
            tags = source | parent | own | without_passwords(tags)
            run = self.client.create_run(self.experiment_id, started, tags, run_name)
            self.run_id = run.info.run_id
            self.find(key)
        else:
            self._tags(tags | parent)
        self.params(params)
        return self.run_id

    def _existing(self, run_id: str | None) -> str | None:
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

    def find(self, key: str | None) -> str | None:
        """The id of the run with this key, if there is one.

        Where a creation whose answer was lost has made two, this store's own one (else the oldest) stays.
        """
        if key is None:
            return None
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        found = self.client.search_runs([self.experiment_id], f"tags.`{KEY}` = '{key}'", order_by=order)
        ids = [run.info.run_id for run in found]
        kept = self.run_id if self.run_id in ids else next(iter(ids), None)
        for double in ids:
            if double != kept:
                self.client.delete_run(double)
        return kept

    def params(self, params: dict) -> None:
        """Those that the run lacks: MLflow refuses to change one."""
        from mlflow.entities import Param

        sent: Collection[str] = self.client.get_run(self.run_id).data.params
        new = {
            name: value for name, value in without_passwords(params).items() if value is not None and name not in sent
        }
        self.client.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in new.items()])

    def of_run(self, run_id: str | None) -> "Store":
        """The same store, for another run of it."""
        other = copy.copy(self)
        other.run_id = run_id
        return other

    def child(self, trial: str) -> str | None:
        """The id of this run's child for a trial, if there is one."""
        query = f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.trial = '{trial}'"
        found = self.client.search_runs([self.experiment_id], query, max_results=1)
        return found[0].info.run_id if found else None

    def data(self, prepared: Prepared) -> None:
        """The prepared data as the run's input, with their manifest and the page that shows them."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        manifest = prepared.manifest
        told = {name: manifest.kinds(name).total() for name in ("left_out", "repaired")} | {"classes": manifest.classes}
        told |= {"image_size": manifest.image_size, "resize": manifest.resize, "digest": manifest.data_digest}
        data = Dataset(
            name=manifest.source,
            digest=manifest.data_digest[:36],
            source_type="local" if prepared.folder.is_local else "object store",
            source=str(prepared.folder),
            profile=json.dumps(manifest.counts | told),
        )
        tag = InputTag("mlflow.data.context", "training")
        self._make(lambda: self.client.log_inputs(self.run_id, [DatasetInput(data, [tag])]))
        for name in (MANIFEST, REPORT):
            if prepared.folder.exists(name):
                self.file(prepared.folder, name, "data")

    def epoch(self, *records: dict) -> None:
        """Lines of `metrics.jsonl`, with their own times (milliseconds) and the epochs as steps."""
        from mlflow.entities import Metric

        metrics = []
        for record in records:
            values = {k: v for k, v in record.items() if k not in ("epoch", "step", "time")}
            # First what the UI's comparison of runs shows first.
            values = sorted(values.items(), key=lambda item: item[0] != "best_val_mean_iou")
            metrics += [Metric(name, float(value), record["time"], record["epoch"]) for name, value in values]
        self._metrics(metrics)

    def metrics(self, values: dict[str, float], step: int, time_ms: int) -> None:
        from mlflow.entities import Metric

        self._metrics([Metric(name, float(value), time_ms, step) for name, value in values.items()])

    def latest(self, values: dict[str, float]) -> None:
        """Metrics without a history: those whose latest value is another, now, at step 0."""
        known = self.client.get_run(self.run_id).data.metrics
        changed = {name: value for name, value in values.items() if known.get(name) != value}
        self.metrics(changed, 0, int(time.time() * 1000))

    def _metrics(self, metrics: list) -> None:
        for first in range(0, len(metrics), BATCH):
            batch = metrics[first : first + BATCH]
            self._make(lambda batch=batch: self.client.log_batch(self.run_id, metrics=batch))

    def tags(self, tags: dict) -> None:
        self._make(lambda: self._tags(tags))

    def _tags(self, tags: dict) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(k, str(v)) for k, v in without_passwords(tags).items()])

    def artifacts(self, folder: str, files: dict[str, bytes]) -> None:
        """Files by name, under `folder` of the run's artifacts ("" is the top)."""

        def send():
            with tempfile.TemporaryDirectory() as scratch:
                for name, content in files.items():
                    (Path(scratch) / name).write_bytes(content)
                with self._patient(max(map(len, files.values()), default=0)):
                    self.client.log_artifacts(self.run_id, scratch, folder or None)

        self._make(send, file=True)

    def file(self, source: Folder, name: str, folder: str = "") -> None:
        """A file of a folder, under the same relative name below `folder` of the run's artifacts; read when sent."""
        place = "/".join(part for part in (folder, *name.split("/")[:-1]) if part) or None

        def send():
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(source.at(name))
                if not source.is_local:
                    path = Path(scratch) / path.name
                    path.write_bytes(source.read_bytes(name))
                with self._patient(path.stat().st_size):
                    self.client.log_artifact(self.run_id, str(path), place)

        self._make(send, file=True)

    @contextlib.contextmanager
    def _patient(self, size: int) -> Iterator[None]:
        with patient(size) as seconds:
            self.file_seconds = seconds
            try:
                yield
            finally:
                self.file_seconds = None

    def status(self, status: str, ended: int | None = None) -> None:
        """running, finished, stopped or failed; `ended` in milliseconds, default: now."""
        if status == "running":
            self._make(lambda: self.client.update_run(self.run_id, status="RUNNING"))
        else:
            self._make(lambda: self.client.set_terminated(self.run_id, STATUS[status], ended))

    def _make(self, call: Callable[[], Any], file: bool = False) -> None:
        call()


def code_version() -> str:
    """The commit of the checkout, or the package's version where there is none."""
    try:
        root = Path(__file__).resolve().parent.parent.parent
        git = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("unet-pets")
        except PackageNotFoundError:
            return "unknown"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
