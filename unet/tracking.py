"""MLflow: one writer, the driver, with explicit run ids.

A run's `metrics.jsonl` is the outbox: MLflow's key of a metric is (name, time, step, value), so sending a line
again is harmless, and whatever could not be delivered is sent with the next line. A store that is away for a while
never stops a training.
"""

import contextlib
import copy
import getpass
import json
import logging
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from unet.data.shards import MANIFEST, REPORT, Prepared
from unet.errors import InputError
from unet.storage import Folder

STATUS = {"running": "RUNNING", "finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def default_uri(storage: Folder) -> str:
    return f"sqlite:///{storage.path}/mlflow.db"


def without_password(uri: str) -> str:
    """A URI as it may be shown and saved."""
    parts = urlsplit(uri)
    if not parts.password:
        return uri
    host = parts.hostname + (f":{parts.port}" if parts.port else "")
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{host}"))


def check_server(uri: str | None) -> None:
    """Refuse a tracking server that does not answer.

    Raises:
        InputError: with what to do.
    """
    if not uri or urlsplit(uri).scheme not in ("http", "https"):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers; whether it accepts us shows later
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"The tracking server {without_password(uri)} does not answer ({reason}): start it, correct "
            "--tracking-uri, or leave it out to track under the storage path."
        ) from error


class Tracker:
    """One MLflow run. Every call that fails is remembered and made again by `deliver`."""

    def __init__(self, storage: Folder, experiment: str, uri: str | None = None):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.uri = uri or default_uri(storage)
        self.run_id: str | None = None
        self._outbox: list[Callable[[], Any]] = []
        self._files: list[Callable[[], Any]] = []
        try:
            if not uri:
                Path(storage.path).mkdir(parents=True, exist_ok=True)
            self.client = mlflow.MlflowClient(self.uri)
            self.experiment_id = self._experiment(storage, experiment, own_store=not uri)
        except mlflow.exceptions.MlflowException as error:
            reason = str(error).splitlines()[0][:300]
            raise InputError(f"MLflow cannot use {without_password(self.uri)}: {reason}") from error

    def _experiment(self, storage: Folder, name: str, own_store: bool) -> str:
        import mlflow

        found = self.client.get_experiment_by_name(name)
        if found is None:
            # Absolute, since MLflow's default is a folder of the current directory. A server knows its own place.
            location = f"{storage.path}/mlartifacts/{name}" if own_store else None
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
        self, run_name: str, run_id: str | None, params: dict, tags: dict, parent_run_id: str | None = None
    ) -> str:
        """Create the run, or continue `run_id`; its id."""
        import mlflow

        if run_id:
            try:
                self.client.update_run(run_id, status="RUNNING")
                self.run_id = run_id
                self._tags(tags)
                # A kill may have come before they were sent; MLflow refuses to change those that were.
                self._params(params, self.client.get_run(run_id).data.params)
                return run_id
            except mlflow.exceptions.MlflowException:
                pass  # another store, or the run was removed there: a new one gets the whole history
        parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        source = {
            "mlflow.user": _user(),
            "mlflow.source.name": Path(sys.argv[0]).name or "python",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": code_version(),
        }
        run = self.client.create_run(self.experiment_id, tags=source | parent | tags, run_name=run_name)
        self.run_id = run.info.run_id
        self._params(params)
        return self.run_id

    def _params(self, params: dict, sent: Collection[str] = ()) -> None:
        from mlflow.entities import Param

        new = [Param(name, str(value)) for name, value in params.items() if value is not None and name not in sent]
        self.client.log_batch(self.run_id, params=new)

    def of_run(self, run_id: str | None) -> "Tracker":
        """The same store, for another run of it."""
        other = copy.copy(self)
        other.run_id, other._outbox, other._files = run_id, [], []
        return other

    def child(self, trial: str) -> str | None:
        """The id of this run's child for a trial, if there is one."""
        query = f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.trial = '{trial}'"
        found = self.client.search_runs([self.experiment_id], query, max_results=1)
        return found[0].info.run_id if found else None

    def register(self, model: str) -> str:
        """Make the run's packaged model a version of a registered model; the version."""
        import mlflow

        with contextlib.suppress(mlflow.exceptions.MlflowException):  # it is there already
            self.client.create_registered_model(model)
        source = f"{self.client.get_run(self.run_id).info.artifact_uri}/model"
        return self.client.create_model_version(model, source, self.run_id).version

    def data(self, prepared: Prepared) -> None:
        """The prepared data as the run's input, with their manifest and the page that shows them."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        manifest = prepared.manifest
        told = {"left_out": len(manifest.left_out), "repaired": len(manifest.repaired), "classes": manifest.classes}
        told |= {"image_size": manifest.image_size, "resize": manifest.resize, "digest": manifest.data_digest}
        data = Dataset(
            name=manifest.source,
            digest=manifest.data_digest[:36],
            source_type="local" if prepared.folder.is_local else "object store",
            source=str(prepared.folder),
            profile=json.dumps(manifest.counts | told),
        )
        tag = InputTag("mlflow.data.context", "training")
        self._try(lambda: self.client.log_inputs(self.run_id, [DatasetInput(data, [tag])]))
        present = [name for name in (MANIFEST, REPORT) if prepared.folder.exists(name)]
        self.artifacts("data", {name: prepared.folder.read_bytes(name) for name in present})

    def epoch(self, record: dict) -> None:
        """One line of `metrics.jsonl`, with its own time (milliseconds) and the epoch as step."""
        values = {k: v for k, v in record.items() if k not in ("epoch", "step", "time")}
        # First what the UI's comparison of runs shows first.
        values = dict(sorted(values.items(), key=lambda item: item[0] != "best_val_mean_iou"))
        self.metrics(values, record["epoch"], record["time"])

    def metrics(self, values: dict[str, float], step: int, time_ms: int) -> None:
        from mlflow.entities import Metric

        entities = [Metric(name, float(value), time_ms, step) for name, value in values.items()]
        self._try(lambda: self.client.log_batch(self.run_id, metrics=entities))

    def tags(self, tags: dict) -> None:
        self._try(lambda: self._tags(tags))

    def _tags(self, tags: dict) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(k, str(v)) for k, v in tags.items()])

    def artifacts(self, folder: str, files: dict[str, bytes]) -> None:
        """Files by relative name, under `folder` of the run's artifacts ("" is the top)."""

        def send():
            with tempfile.TemporaryDirectory() as scratch:
                for name, content in files.items():
                    path = Path(scratch) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                self.client.log_artifacts(self.run_id, scratch, folder or None)

        # Apart from the rest: a store whose files cannot be written takes metrics all the same.
        self._files.append(send)
        self.deliver()

    def status(self, status: str) -> None:
        """running, finished, stopped or failed."""
        if status == "running":
            self._try(lambda: self.client.update_run(self.run_id, status="RUNNING"))
        else:
            self._try(lambda: self.client.set_terminated(self.run_id, STATUS[status]))

    def _try(self, call: Callable[[], Any]) -> None:
        self._outbox.append(call)
        self.deliver()

    def deliver(self) -> bool:
        """Make the calls that are waiting, in their order; whether none is left."""
        for waiting in (self._outbox, self._files):
            while waiting:
                try:
                    waiting[0]()
                except Exception as error:
                    # Any failure of the store, whatever its library raises, must not reach the training.
                    logging.getLogger(__name__).debug("MLflow: %s", error)
                    break
                waiting.pop(0)
        return not (self._outbox or self._files)


class Untracked:
    """Stands in for a `Tracker` where somebody else writes the run: a sweep writes those of its trials."""

    run_id = None

    def start(self, *args, **kwargs) -> None:
        """Nothing, as with all that would be sent."""

    data = epoch = metrics = tags = artifacts = status = start

    def deliver(self) -> bool:
        return True


def code_version() -> str:
    """The commit of the checkout, or the package's version where there is none."""
    try:
        root = Path(__file__).resolve().parent.parent
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
