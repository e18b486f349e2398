"""What is known of an earlier run, from its folder or from MLflow: enough to train it again and to compare."""

import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unet.config import CONFIG, parse_yaml, read_config
from unet.errors import InputError, first_line
from unet.metric_names import PLACE
from unet.runs.checkpoint import STATE, Checkpoints
from unet.runs.run import SUMMARY, read_history, read_summary
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.tracking.database import ready
from unet.tracking.library import load_mlflow
from unet.tracking.reach import check_server, default_uri

LOCAL = ("storage_path", "tracking_uri", "run_name", "resume", "sync", "config", "reproduce", "register", "tensorboard")
"""Settings that say where a run is kept, not what it is."""
BEST = "best_checkpoint"
"""The folder of the best checkpoint among a run's artifacts."""


@dataclass(frozen=True)
class Original:
    """An earlier run.

    Attributes:
        name: of the run.
        settings: what it is, without `LOCAL`.
        history: its epochs, as lines of `metrics.jsonl`.
        summary: its `summary.json`, as far as there is one.
        equality: what its bits depend on beside settings and data (`unet.training.equality`); empty if unknown.
    """

    name: str
    settings: dict[str, Any]
    history: list[dict]
    summary: dict[str, Any] = field(default_factory=dict)
    equality: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, name: str, storage: Folder, tracking_uri: str | None = None) -> "Original":
        """The run that a name under the storage path, the id of a run in MLflow or a URI such as `runs:/ID` means.

        Raises:
            InputError: there is no such run, or MLflow does not answer.
        """
        in_mlflow = re.fullmatch(r"(?:runs:/)?([0-9a-f]{32})(?:/model)?/?", name)
        if not in_mlflow and ":/" in name:
            raise InputError(f"{name} is not a run: give its name, its id in MLflow, or runs:/ID.")
        if in_mlflow and not storage.exists(name):
            return cls._of_mlflow(in_mlflow[1], tracking_uri or default_uri(storage))
        folder = storage / name
        if not folder.exists(CONFIG):
            raise InputError(f"There is no run {name} under {storage}: give its name, its id in MLflow, or runs:/ID.")
        latest = Checkpoints(folder).latest()
        equality = latest[1].equality if latest else {}
        return cls(name, _own(read_config(folder)), read_history(folder), read_summary(folder), equality)

    @classmethod
    def _of_mlflow(cls, run_id: str, uri: str) -> "Original":
        mlflow = load_mlflow()
        check_server(uri)
        try:
            ready(uri)
            client = mlflow.MlflowClient(uri)
            run = client.get_run(run_id)
            epochs: dict[int, dict] = {}
            for key in run.data.metrics:
                if key.startswith(("train/", "val/", "speed/")):
                    for metric in client.get_metric_history(run_id, key):
                        line = epochs.setdefault(metric.step, {"epoch": metric.step, "time": metric.timestamp})
                        line[key] = metric.value
            with tempfile.TemporaryDirectory() as scratch:
                places = {file.path for path in (None, BEST) for file in client.list_artifacts(run_id, path)}
                files = {
                    name: Path(client.download_artifacts(run_id, name, scratch)).read_bytes()
                    for name in (CONFIG, SUMMARY, f"{BEST}/{STATE}")
                    if name in places
                }
        except Exception as error:  # whatever the store's library raises
            words = without_secrets(f"MLflow at {uri} does not give the run {run_id}: {first_line(error)}")
            raise InputError(words) from error
        if CONFIG not in files:
            raise InputError(f"The run {run_id} in MLflow has no {CONFIG}: it is not a training of this program.")
        settings = parse_yaml(files[CONFIG], f"{CONFIG} of {run_id}")
        state = json.loads(files.get(f"{BEST}/{STATE}", b"{}"))
        summary = {"code": run.data.tags.get("mlflow.source.git.commit")}
        summary |= {"data_digest": run.data.tags.get("data_digest")} | json.loads(files.get(SUMMARY, b"{}"))
        history = [epochs[epoch] for epoch in sorted(epochs)]
        return cls(run.info.run_name, _own(settings), history, summary, state.get("equality", {}))


def _own(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in LOCAL}


def numbers(record: dict) -> dict[str, float]:
    """What an epoch came to, without when and how fast."""
    return {key: value for key, value in record.items() if key not in PLACE and not key.startswith("speed/")}
