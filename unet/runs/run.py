"""A run's folder: which run the settings mean, and what it says about itself.

Why: docs/decisions.md#the-runs-folder-is-the-truth
"""

import contextlib
import json
import os
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unet.config import CONFIG, FENCING_TOKEN, RunSettings, TrainSettings, flat, moved_with, read_config
from unet.data.manifest import MANIFEST
from unet.environment import is_submitted
from unet.errors import InputError, StorageFailed
from unet.locks import LOCK, Busy, Lock, held
from unet.remote import patience
from unet.runs.checkpoint import Checkpoints
from unet.secrets import lost, without_credentials, without_passwords, without_secrets
from unet.storage import Folder

SUMMARY, METRICS, SYSTEM, MODEL = "summary.json", "metrics.jsonl", "system.jsonl", "model"
KNOWN_LATER = (
    *("mlflow_run_id", "mlflow_experiment_id", "model_uri", "best_epoch", "best_checkpoint", "images_per_second"),
    *("seconds_to_first_step", "restarts", "restart_log", "nodes", "skipped_steps", "val", "test", "test_time"),
    *("reason", "ended", "delivered", "reproduction"),
)
OF_AN_END = ("model_uri", "test", "test_time", "reason", "ended", "delivered", "reproduction")
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
    fencing_token: str | None = None
    """Of the workers that may write there: those of an earlier one, which may outlive their driver, may not."""
    lock: Lock | None = None

    @classmethod
    def load(cls, name: str, settings: TrainSettings) -> "Run":
        """The run of that name under the settings' storage path, with what it says about itself if it exists."""
        folder = Folder(settings.run.storage_path) / name
        return cls(name, settings, folder, read_summary(folder))

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder)

    def start(self, **facts) -> None:
        """Write down that the run is on: its settings and what is known of it."""
        self._sweep()
        self.folder.write_text(CONFIG, yaml.safe_dump(self.public_settings(), sort_keys=False))
        later = {k: self.summary.get(k) for k in KNOWN_LATER} | dict.fromkeys(OF_AN_END)
        later["restarts"] = later["restarts"] or 0
        later["started"] = self.summary.get("started") or milliseconds()
        self.write_summary(run_name=self.name, status="running", **later, **facts)

    def _sweep(self) -> None:
        """Remove what a kill left half written."""
        if self.folder.is_local:
            for path in Path(self.folder.path).glob(".*"):
                if path.name.startswith(".tmp-"):
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name not in (LOCK, FENCING_TOKEN) and path.is_file():
                    path.unlink(missing_ok=True)

    def write_summary(self, **changes) -> None:
        self.summary |= changes
        self.write(SUMMARY, json.dumps(self.summary, indent=2).encode())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """This run, for this process alone, with what it says about itself now. Raises InputError."""
        with locked(self.folder, self.name) as self.lock:
            self.summary = read_summary(self.folder)  # another driver may have had it until now
            yield

    def take_over(self) -> None:
        """Let no workers but those to come write there.

        Raises:
            StorageFailed: it cannot be written, or another driver has the run since this one took it.
        """
        with contextlib.suppress(FileNotFoundError):  # with the folder, which the write says
            self._check_ours()
        token = uuid.uuid4().hex
        self.write(FENCING_TOKEN, token.encode())
        self.fencing_token = token

    def write_history(self, history: list[dict]) -> None:
        """The lines of `metrics.jsonl`, whole: a file that is replaced is never torn or doubled by a kill."""
        self.write(METRICS, _text(history))

    def write_system(self, lines: list[dict]) -> None:
        """The lines of `system.jsonl`, whole. Without another attempt: it comes often, and nothing waits for it."""
        self.write(SYSTEM, _text(lines), patiently=False)

    def write(self, name: str, content: bytes, patiently: bool = True) -> None:
        """Write a file of the run that has started.

        Raises:
            StorageFailed: it cannot be written, the run's folder is gone, or another driver has taken the run.
        """

        def write() -> None:
            if self.lock:
                self.lock.check(f"the run {self.name}")
            self.folder.require(CONFIG)
            self.folder.write_bytes(name, content)

        if not patiently or self.summary.get("status") == "failed":  # perhaps for want of this storage
            with patience(0):
                write()
        else:
            with patience(check=self._check_ours):
                self.folder.persistently(write)

    def _check_ours(self) -> None:
        """Refuse to write where another driver does, after an outage in which this one may have lost the run.

        Raises:
            StorageFailed: it has.
        """
        if self.lock:
            self.lock.check(f"the run {self.name}")
        if self.fencing_token and self.folder.read_text(FENCING_TOKEN) != self.fencing_token:
            raise StorageFailed(f"Another process has taken over the run {self.name}: wait until it has ended")

    def after(self, error: StorageFailed) -> StorageFailed:
        """The same with what is left and how to go on."""
        if not self.summary:
            return StorageFailed(f"{error}, and start again.")
        left = ""
        with contextlib.suppress(StorageFailed), patience(0):  # it may be the storage that is away
            left = "".join(f" (the last whole checkpoint is {name})" for name in self.checkpoints.whole()[-1:])
        again = f"{called('train')} --resume {self.name}{where(self.settings.run)}"
        return StorageFailed(f"{error}, then: {again}{left}.")

    def history(self) -> list[dict]:
        """The lines of `metrics.jsonl`."""
        return read_history(self.folder)

    def system(self) -> list[dict]:
        """The lines of `system.jsonl`."""
        return _read_lines(self.folder, SYSTEM)

    def mlflow_key(self) -> str:
        """What its MLflow run is found by where nobody has heard its id."""
        if not self.summary.get("mlflow_key"):
            self.write_summary(mlflow_key=uuid.uuid4().hex)
        return self.summary["mlflow_key"]

    def public_settings(self) -> dict[str, Any]:
        """The settings as they may be saved and sent: this run's name, and no secret."""
        return without_passwords(
            flat(self.settings) | {"run_name": self.name, "resume": None, "sync": None, "config": None}
        )


def read_summary(folder: Folder) -> dict[str, Any]:
    """What a run's folder says about itself; empty for a new run.

    Raises:
        InputError: it is damaged.
    """
    try:
        return dict(json.loads(folder.read_bytes(SUMMARY)))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder}/{SUMMARY} is damaged: bring back a copy of it, or remove it to go on without."
        ) from error


def prepared_of(folder: Folder) -> str | None:
    """Where the data of a run's training are, as its folder says; None where it does not, or they are gone."""
    place = read_summary(folder).get("prepared")
    if place is None or lost(place):
        return None
    if folder.exists(CONFIG):
        place = moved_with(folder, read_config(folder), place)
    return place if Folder(place).exists(MANIFEST) else None


def read_history(folder: Folder) -> list[dict]:
    """The lines of the `metrics.jsonl` of a run's folder; none where it has none."""
    return _read_lines(folder, METRICS)


def _read_lines(folder: Folder, name: str) -> list[dict]:
    try:
        lines = folder.read_text(name).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [json.loads(line) for line in lines]


def _text(lines: list[dict]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def milliseconds() -> int:
    """Now, as MLflow counts."""
    return int(time.time() * 1000)


@contextlib.contextmanager
def locked(folder: Folder, name: str) -> Iterator[Lock]:
    """The folder of a run or sweep for this process alone.

    Raises:
        InputError: another process has it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if folder.is_local:
            stack.callback(_remove_empty, folder.path)
        try:
            lock = stack.enter_context(held(folder))
        except Busy as error:
            raise InputError(
                f"{name} is already running ({error}): wait for it to end, stop it, or give another --run-name."
            ) from error
        except StorageFailed as error:
            raise InputError(f"{error}.") from error
        yield lock


def _remove_empty(path: str) -> None:
    with contextlib.suppress(OSError):  # it is not: something began here
        os.rmdir(path)


def called(job: str) -> str:
    """How a job is called from where this one was: one that was submitted submits the next."""
    command = f"python jobs/{job}.py"
    return f"ray job submit --working-dir . -- {command}" if is_submitted() else command


def where(run: RunSettings, tracking: bool = True) -> str:
    """The flags that a later command needs to find a run or sweep, and its MLflow store where it asks for one."""
    flags = ""
    if run.storage_path != RunSettings(tracking_uri=run.tracking_uri).storage_path:
        flags += f" --storage-path {shlex.quote(without_credentials(run.storage_path))}"
    if tracking and run.tracking_uri:
        flags += f" --tracking-uri {shlex.quote(without_secrets(run.tracking_uri))}"
    return flags
