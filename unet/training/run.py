"""A run's folder: which run the settings mean, and what it says about itself."""

import json
import shlex
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import yaml

from unet.config import MAY_CHANGE, RunSettings, TrainSettings, flat
from unet.data.shards import MANIFEST
from unet.data.sources.find import check_source
from unet.errors import InputError
from unet.secrets import shown, without_secrets
from unet.storage import Folder
from unet.tracking.store import check_server
from unet.training.checkpoint import Checkpoints
from unet.training.resources import check_writable

SUMMARY, CONFIG, METRICS, MODEL = "summary.json", "config.yaml", "metrics.jsonl", "model"
KNOWN_LATER = (
    *("mlflow_run_id", "model_uri", "best_epoch", "best_checkpoint", "images_per_second", "seconds_to_first_step"),
    *("restarts", "val", "test", "test_time", "reason", "ended", "delivered"),
)
OF_AN_END = ("model_uri", "test", "test_time", "reason", "ended", "delivered")
"""These of them come anew at the next end."""


@dataclass
class Run:
    """A run's folder and what it says about itself.

    Attributes:
        name: of the run, its folder and its MLflow run.
        settings: it is trained with.
        folder: `<storage-path>/<name>`.
        summary: the content of `summary.json`; empty for a new run.
    """

    name: str
    settings: TrainSettings
    folder: Folder
    summary: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, settings: TrainSettings) -> "Run":
        """The run of that name under the settings' storage path, with what it says about itself if it exists."""
        run = cls(name, settings, Folder(settings.run.storage_path) / name)
        if run.folder.exists(SUMMARY):
            run.summary = json.loads(run.folder.read_text(SUMMARY))
        return run

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder)

    def start(self, **facts) -> None:
        """Write down that the run is on: its settings and what is known of it."""
        self.folder.write_text(CONFIG, yaml.safe_dump(self.shown_settings(), sort_keys=False))
        later = {k: self.summary.get(k) for k in KNOWN_LATER} | dict.fromkeys(OF_AN_END)
        later["started"] = self.summary.get("started") or milliseconds()
        self.write_summary(run_name=self.name, status="running", **later, **facts)

    def write_summary(self, **changes) -> None:
        self.summary |= changes
        self.folder.write_text(SUMMARY, json.dumps(self.summary, indent=2))

    def write_history(self, history: list[dict]) -> None:
        """The lines of `metrics.jsonl`, whole: a file that is replaced is never torn or doubled by a kill."""
        self.folder.write_text(METRICS, "".join(json.dumps(line) + "\n" for line in history))

    def history(self) -> list[dict]:
        """The lines of `metrics.jsonl`."""
        lines = self.folder.read_text(METRICS).splitlines() if self.folder.exists(METRICS) else []
        return [json.loads(line) for line in lines]

    def mlflow_key(self) -> str:
        """What its MLflow run is found by where nobody has heard its id."""
        if not self.summary.get("mlflow_key"):
            self.write_summary(mlflow_key=uuid.uuid4().hex)
        return self.summary["mlflow_key"]

    def shown_settings(self) -> dict[str, Any]:
        """The settings as they may be saved and sent: this run's name, and no secret."""
        return shown(flat(self.settings) | {"run_name": self.name, "resume": None, "sync": None, "config": None})


def milliseconds() -> int:
    """Now, as MLflow counts."""
    return int(time.time() * 1000)


def where(run: RunSettings, tracking: bool = True) -> str:
    """The flags that a later command needs to find a run or sweep, and its MLflow store where it asks for one."""
    flags = ""
    if run.storage_path != RunSettings(tracking_uri=run.tracking_uri).storage_path:
        flags += f" --storage-path {shlex.quote(without_secrets(run.storage_path))}"
    if tracking and run.tracking_uri:
        flags += f" --tracking-uri {shlex.quote(without_secrets(run.tracking_uri))}"
    return flags


def open_run(settings: TrainSettings, tracked: bool = True) -> Run:
    """The run that the settings mean, after every check that needs no cluster.

    A run that continues goes on without its tracking server; one that is not `tracked` asks for none.

    Raises:
        InputError: the settings, the data or the tracking server cannot work.
    """
    check_writable(Folder(settings.run.storage_path))
    run = _identify(settings)
    check_source(settings.data.data)
    if tracked and not run.summary:
        check_server(settings.run.tracking_uri)
    return run


def _identify(settings: TrainSettings) -> Run:
    """The run that the settings mean: a new one, or one to continue.

    Raises:
        InputError: the name belongs to a run with other settings.
    """
    name = settings.run.resume or settings.run.run_name or time.strftime("unet-%Y%m%d-%H%M%S")
    run = Run.load(name, settings)
    if not run.folder.exists(CONFIG):
        if run.folder.exists(SUMMARY) or run.folder.exists(MANIFEST):
            raise InputError(f"{run.folder} is no run: give another --run-name.")
        return run
    before = yaml.safe_load(run.folder.read_text(CONFIG))
    if "space" in before:
        raise InputError(f"{name} is a sweep: continue it with `jobs/tune.py`, or give another --run-name.")
    refuse_changes(name, before, flat(settings), MAY_CHANGE)
    run.summary.setdefault("run_name", name)
    return run


def refuse_changes(name: str, before: dict, now: dict, may_change: frozenset[str]) -> None:
    """Refuse to continue under a name with other settings than it was started with.

    Raises:
        InputError: with the settings that differ.
    """
    changed = sorted(k for k in now.keys() - may_change if before.get(k, now[k]) != now[k])
    if changed:
        flags = ", ".join(f"--{k.replace('_', '-')} (was {before[k]}, is {now[k]})" for k in changed)
        raise InputError(f"The run {name} was started with other settings: {flags}. Give another --run-name.")
