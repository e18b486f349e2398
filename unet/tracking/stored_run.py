"""One run in an MLflow store. Whatever is sent twice is there once.

MLflow's key of a metric is (name, time, step, value), so a line of `metrics.jsonl` may be sent again. A run is found
again by a tag with a key of its own, since the answer to its creation can be lost.
"""

import contextlib
import functools
import getpass
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from unet.classes import MANY
from unet.data.manifest import MANIFEST, REPORT
from unet.data.shards import Prepared
from unet.errors import InputError
from unet.metric_names import BEST, PLACE, step_of
from unet.secrets import without_passwords, without_secrets
from unet.storage import Folder
from unet.tracking.patience import patient
from unet.tracking.store import KEY, Store

CONTEXTS = {"train": "training", "val": "validation", "test": "testing"}
"""What MLflow's UI calls the splits."""
STATUS = {"running": "RUNNING", "finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
BATCH = 1000
"""The most metrics that MLflow takes in one request."""


class StoredRun:
    """The calls for one run. They raise what goes wrong.

    Attributes:
        run_id: of the run; None before `start`.
    """

    def __init__(self, store: Store, run_id: str | None = None):
        self.store, self.run_id = store, run_id

    @classmethod
    def of_existing(cls, storage: Folder, run_id: str, uri: str | None = None) -> "StoredRun":
        """A run that a store has already.

        Raises:
            InputError: it does not.
        """
        store = Store(storage, None, uri)
        if store.existing(run_id) is None:
            raise InputError(f"{without_secrets(store.uri)} has no run {run_id}")
        return cls(store, run_id)

    @property
    def client(self):
        return self.store.client

    def start(
        self,
        run_name: str,
        run_id: str | None,
        tags: dict,
        parent_run_id: str | None = None,
        key: str | None = None,
        started: int | None = None,
    ) -> str:
        """Continue `run_id` or the run with this key, else create one; its id.

        `started` is the time of a new run in milliseconds. A run that was deleted, or is in another store, is created
        anew: its whole history is sent in any case.
        """
        store = self.store
        self.run_id = store.existing(run_id) or (store.find(key) if key else None)
        parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        if self.run_id is not None:
            self.tags(tags | parent)
            return self.run_id
        source = {
            "mlflow.user": _user(),
            "mlflow.source.name": Path(sys.argv[0]).name or "python",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": code_version(),
        }
        own = {KEY: key} if key else {}
        run = self.client.create_run(
            store.experiment_id, started, source | parent | own | without_passwords(tags), run_name
        )
        found: str = run.info.run_id
        self.run_id = found
        if key:
            store.find(key, found)
        return found

    def single(self, key: str) -> None:
        """Delete what a creation whose answer was lost may have left beside the run."""
        self.store.find(key, self.run_id)

    def params(self, params: dict) -> None:
        """Those that the run lacks: MLflow refuses to change one."""
        from mlflow.entities import Param

        sent: Collection[str] = self.client.get_run(self.run_id).data.params
        new = {
            name: value for name, value in without_passwords(params).items() if value is not None and name not in sent
        }
        self.client.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in new.items()])

    def data(self, prepared: Prepared) -> None:
        """The splits of the prepared data as the run's inputs, with their manifest and the page that shows them."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        manifest, size = prepared.manifest, prepared.manifest.image_size
        profile: dict = {name: manifest.kinds(name).total() for name in ("left_out", "repaired")}
        profile |= {"classes": manifest.classes, "resize": manifest.resize, "digest": manifest.data_digest}
        features = _tensor((-1, size, size, 3)), _tensor((-1, size, size))
        schema = {"mlflow_tensorspec": {"features": json.dumps([features[0]]), "targets": json.dumps([features[1]])}}
        inputs = []
        for split, context in CONTEXTS.items():
            name, digest = data_set(manifest.source, manifest.data_digest, split)
            data = Dataset(
                name=name,
                digest=digest,
                source_type="local" if prepared.folder.is_local else "object store",
                source=str(prepared.folder),
                schema=json.dumps(schema),
                profile=json.dumps({"num_rows": manifest.counts[split]} | profile),
            )
            inputs.append(DatasetInput(data, [InputTag("mlflow.data.context", context)]))
        self.client.log_inputs(self.run_id, inputs)
        for name in (MANIFEST, REPORT):
            if prepared.folder.exists(name):
                self.file(prepared.folder, name, "data")

    def epoch(self, *records: dict) -> None:
        """Lines of `metrics.jsonl` and `system.jsonl`, with their own times (milliseconds) and steps."""
        from mlflow.entities import Metric

        metrics = []
        for record in records:
            values = [(name, value) for name, value in for_charts(record).items() if name not in PLACE]
            # First what the UI's comparison of runs shows first.
            values.sort(key=lambda item: item[0] != BEST)
            metrics += [Metric(name, float(value), record["time"], step_of(record)) for name, value in values]
        self._metrics(metrics)

    def metrics(self, values: dict[str, float], step: int, time_ms: int) -> None:
        from mlflow.entities import Metric

        self._metrics([Metric(name, float(value), time_ms, step) for name, value in for_charts(values).items()])

    def scores(
        self, values: dict[str, float], step: int, time_ms: int, model_id: str, data_set: tuple[str, str]
    ) -> None:
        """Metrics of a logged model on a data set, which has a name and a digest."""
        from mlflow.entities import Metric

        of = {"model_id": model_id, "dataset_name": data_set[0], "dataset_digest": data_set[1], "run_id": self.run_id}
        self._metrics([Metric(name, float(v), time_ms, step, **of) for name, v in for_charts(values).items()])

    def latest(self, values: dict[str, float]) -> None:
        """Metrics without a history: those whose latest value differs, now, at step 0."""
        known = self.client.get_run(self.run_id).data.metrics
        changed = {name: value for name, value in values.items() if known.get(name) != value}
        self.metrics(changed, 0, int(time.time() * 1000))

    def _metrics(self, metrics: list) -> None:
        for first in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + BATCH])

    def tags(self, tags: dict) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(k, str(v)) for k, v in without_passwords(tags).items()])

    def file(self, source: Folder, name: str, folder: str = "") -> None:
        """A file of a folder, under the same relative name below `folder` of the run's artifacts; read when sent."""
        below = "/".join(part for part in (folder, *name.split("/")[:-1]) if part) or None
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(source.at(name))
            if not source.is_local:
                path = Path(scratch) / path.name
                path.write_bytes(source.read_bytes(name))
            with self.patient(path.stat().st_size):
                self.client.log_artifact(self.run_id, str(path), below)

    @contextlib.contextmanager
    def patient(self, size: int) -> Iterator[None]:
        """Give the sending of so many bytes the time that it may take."""
        with patient(size) as seconds:
            self.store.file_seconds = seconds
            try:
                yield
            finally:
                self.store.file_seconds = None

    def status(self, status: str, ended: int | None = None) -> None:
        """running, finished, stopped or failed; `ended` in milliseconds, default: now."""
        if status == "running":
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.client.set_terminated(self.run_id, STATUS[status], ended)


def for_charts(values: dict) -> dict:
    """Metrics without those of single classes where those are too many: MLflow's UI draws a chart for each."""
    of_classes = {name for name in values if "/iou/" in name or "/dice/" in name}
    many = len(of_classes) > 2 * MANY  # IoU and Dice
    return {name: value for name, value in values.items() if not (many and name in of_classes)}


def data_set(source: str, digest: str, split: str) -> tuple[str, str]:
    """Name and digest of a split as an input of a run; MLflow takes 36 characters of a digest."""
    return f"{source}/{split}", digest[:36]


def _tensor(shape: tuple[int, ...]) -> dict:
    return {"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": shape}}


@functools.cache
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
