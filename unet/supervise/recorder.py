"""What a run says about itself while it goes on: in its folder, in MLflow and on the terminal. One thread writes it."""

import contextlib
import math
import shlex
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import numpy as np

from unet.data.shards import Prepared
from unet.errors import InputError, StorageFailed
from unet.metric_names import BEST_EPOCH, DATA_WAIT, SCORE, SKIPPED_STEPS, SPEED
from unet.runs.run import Run, called, milliseconds, where
from unet.runs.state import State
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.supervise import results
from unet.supervise.board import Board
from unet.supervise.reproduction import Reproduction
from unet.supervise.system import SystemMetrics
from unet.terminal import Display
from unet.tracking import images
from unet.tracking.send import PATIENCE, STOP_SECONDS, begin, kept_back, restart_tags, send, shown, tell
from unet.tracking.stored_run import code_version
from unet.tracking.writer import AsyncWriter, Untracked
from unet.training.meters import Meters

PASSING = ("time", SPEED, DATA_WAIT)
"""What of an epoch's record is not the same when it is trained again."""


@dataclass
class RunRecorder:
    """The recorder of one start of a run.

    Attributes:
        as_trial: a trial of a sweep, which has no test score and whose MLflow run the sweep writes.
        started: when the job began, in seconds since 1970.
        history: the epochs so far.
        written: the lines of `metrics.jsonl`.
        stop_signal: set when somebody wants the driver to end.
        reproduction: the comparison with an earlier run that this one trains again.
    """

    run: Run
    prepared: Prepared
    parameters: int
    display: Display
    as_trial: bool
    started: float
    tracker: AsyncWriter | Untracked = field(default_factory=Untracked)
    history: list[dict] = field(default_factory=list)
    written: list[dict] = field(default_factory=list)
    stop_signal: threading.Event | None = None
    reproduction: Reproduction | None = None

    def __post_init__(self):
        self.system, self.meters = SystemMetrics(self.run), Meters()
        self.board = Board(self.run, lambda words: self.display.say(words, "yellow"))

    def open(self, state: State | None, begins: Mapping = MappingProxyType({})) -> None:
        """Write down that the run is on, from the state of its last checkpoint, and begin or continue it in MLflow.

        `begins` says which weights it begins with (`unet.models.start.Start.facts`), where they are not drawn.

        Raises:
            InputError: MLflow can never accept a new run this way. A run that continues does so without it.
        """
        run, manifest = self.run, self.prepared.manifest
        writer = None if self.as_trial else self._writer()
        self.tracker = writer or self.tracker
        self.written = run.history()
        facts = {"data_digest": manifest.data_digest, "prepared": without_secrets(self.prepared.folder.uri)}
        facts |= {"data_source": manifest.source, "code": run.summary.get("code") or code_version()}
        command = run.summary.get("command") or _command()
        run.start(parameters=self.parameters, command=command, **facts, **begins)
        self.system.open()
        if run.folder.exists(results.AUGMENTED):
            self.board.picture("augmented", results.AUGMENTED, 0, run.summary["started"])
        for name in (run.folder / images.IMAGES).names():
            self.board.image(name)
        # What the checkpoint vouches for: the file may lack an epoch that a kill kept from being written.
        self._take(state.history if state else [])
        self.meters.restarts = run.summary["restarts"]
        self._best_of(state)
        if writer:
            begin(run, writer, self.prepared)  # with the history
            tell(run, writer)
            writer.tags({"status": "running"} | {name: begins[name] for name in begins if name == "begins_with"})
            writer.status("running")

    def _writer(self) -> AsyncWriter:
        part = self.run.settings.run
        say = lambda words: self.display.say(words, "yellow")  # noqa: E731
        writer = AsyncWriter(Folder(part.storage_path), part.experiment, part.tracking_uri, say)
        try:
            if not self.run.summary:
                writer.check(PATIENCE)
        except BaseException:
            writer.close()
            raise
        return writer

    def close(self) -> None:
        """Let go of MLflow; what it has not accepted is in the run's folder."""
        self.tracker.close()
        self.board.close()

    def receive(self) -> None:
        """What MLflow says, and the id of the run there when it is known."""
        self.tracker.receive()
        self._system()
        if self.tracker.run_id not in (None, self.run.summary["mlflow_run_id"]):
            self.run.write_summary(mlflow_run_id=self.tracker.run_id, mlflow_experiment_id=self.tracker.experiment_id)

    def _system(self, last: bool = False) -> None:
        # After an epoch: the UI's comparison of runs begins with the metric that a run had first.
        if self.system.point(last) and self.history:
            self.tracker.epoch(*self.system.lines)

    def first_step(self, at: float) -> None:
        self.tracker.open()  # of a run that goes on; until now the processor was its workers'
        if self.run.summary["seconds_to_first_step"] is None:
            self.run.write_summary(seconds_to_first_step=round(at - self.started, 2))

    def placed(self, hosts: dict[str, list[int]]) -> None:
        """Where the workers of a group are: ranks by host name. A log says it, which may be all that is left to see."""
        if self.display.is_log and not self.as_trial:
            ranks_of = {self.system.called(host): ", ".join(map(str, ranks)) for host, ranks in hosts.items()}
            self.display.say(f"Workers: {'; '.join(f'rank {ranks} on {host}' for host, ranks in ranks_of.items())}.")

    def augmented(self, samples: dict) -> None:
        """Training samples as the network sees them, from `unet.training.begin`."""
        augment, classes = self.run.settings.augment, self.prepared.manifest.class_infos
        self.run.write(results.AUGMENTED, results.draw_augmented(samples, augment, classes))
        self.tracker.file(self.run.folder, results.AUGMENTED)
        self.board.picture("augmented", results.AUGMENTED, 0, self.run.summary["started"])

    def shown(self, content: dict) -> None:
        """Photos of validation after an epoch, from `unet.training.shown`; of an epoch trained again the first ones."""
        if not isinstance(self.tracker, AsyncWriter):
            return
        epoch = content["epoch"]
        # MLflow's slider stands at 0 until it is moved.
        bare = content | {"predicted": [None] * len(content["names"])}
        self._photos(bare, 0, self.run.summary["started"], self.tracker)
        at = next(record["time"] for record in self.history if record["epoch"] == epoch)
        self._photos(content, epoch, at, self.tracker)

    def _photos(self, content: dict, epoch: int, time: int, to: AsyncWriter) -> None:
        known = tuple((self.run.folder / images.IMAGES).names())
        prefixes = {name: images.prefix(f"val/photos/{name}", epoch) for name in content["names"]}
        if all(any(file.startswith(prefix) for file in known) for prefix in prefixes.values()):
            return
        for name, picture in results.draw_shown(content, self.prepared.manifest.class_infos).items():
            if not any(file.startswith(prefixes[name]) for file in known):
                for file, data in images.files(picture, f"val/photos/{name}", epoch, time).items():
                    self.run.write(f"{images.IMAGES}/{file}", data)
                    shown(self.run, file, to)
                    self.board.image(file)

    def epoch(self, record: dict, validation: dict | None) -> None:
        """An epoch that has ended, and its scores if it is the best so far, or none could be scored yet."""
        self.tracker.open()
        self._take([r for r in self.history if r["epoch"] < record["epoch"]] + [record])
        self.tracker.epoch(self.history[-1])
        best = {"best_epoch": record.get(BEST_EPOCH), "val": validation} if validation else {}
        self.run.write_summary(skipped_steps=record.get(SKIPPED_STEPS, 0), **best)
        if isinstance(self.tracker, AsyncWriter):
            tell(self.run, self.tracker)
        self.display.epoch(record, self.run.settings.epochs, self.prepared.manifest.class_infos)
        if self.reproduction:
            self.display.say("  " + self.reproduction.epoch(record))

    def catch_up(self, state: State | None) -> None:
        """The epochs whose checkpoint was written, but whose workers were lost before they reported it."""
        told = self.history[-1]["epoch"] if self.history else 0
        for record in state.history if state else []:
            if record["epoch"] > told:
                self.epoch(record, None)
        self._best_of(state)

    def _best_of(self, state: State | None) -> None:
        """Write down the best epoch of a checkpoint, if another was reported: that one may be lost."""
        if state and (state.best_epoch, state.validation) != (self.run.summary["best_epoch"], self.run.summary["val"]):
            self.run.write_summary(best_epoch=state.best_epoch, val=state.validation)

    def _take(self, history: list[dict]) -> None:
        """Write down the epochs so far.

        A line that was written once stays as it is, although its epoch may be trained again after a damaged
        checkpoint: MLflow has it with its time. Until then it stands after the epochs so far.
        """
        written = {_lasting(record): record for record in self.written}
        self.history = [written.get(_lasting(record), record) for record in history]
        self.meters.val_mean_iou = self.history[-1].get(SCORE) if self.history else None
        last = history[-1]["epoch"] if history else 0
        self.written = self.history + [record for record in self.written if record["epoch"] > last]
        self.run.write_history(self.written)
        self.board.epochs(self.written)

    def restart(self, reason: str, step: int, workers: int) -> None:
        """A group of workers that takes the place of another."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        log = [*(self.run.summary["restart_log"] or [])]
        log.append({"time": at, "reason": without_secrets(reason), "step": step, "workers": workers})
        self.run.write_summary(restarts=len(log), restart_log=log)
        self.meters.restarts = len(log)
        self.tracker.tags(restart_tags(self.run.summary))

    def stopped(self) -> None:
        """Mark the run first of all: a submitted job may have few seconds left."""
        self.run.write_summary(status="stopped")
        self.tracker.tags({"status": "stopped"})
        self.tracker.status("stopped")
        self.tracker.open()

    def mark(self, status: str, **facts) -> None:
        """Say how the run ends, if its storage still takes that."""
        with contextlib.suppress(StorageFailed):
            self.run.write_summary(status=status, ended=milliseconds(), **facts)
        self.tracker.status(status)
        self.tracker.deliver(PATIENCE, at_most=STOP_SECONDS)

    def broken_off(self, status: str, state: State | None, reason: str) -> None:
        """The end of a run that was stopped or failed."""
        self._system(last=True)
        self.mark(status, reason=without_secrets(reason), **self._facts(state))
        with contextlib.suppress(StorageFailed, InputError, OSError):  # what is to be sent may be out of reach
            self._send(STOP_SECONDS if status == "stopped" else math.inf)
        if status == "stopped":
            at = f"step {state.step}" if state else "the start"
            go_on = f"{called('train')} --resume {self.run.name}{where(self.run.settings.run)}"
            self.display.say(f"Stopped at {at}. Continue: {go_on}")

    def finished(self, state: State, found: results.Results | None) -> None:
        """The end of a run whose last epoch is over; `found` is None for a trial of a sweep."""
        run, facts = self.run, self._facts(state)
        self._system(last=True)
        if found:
            self.display.waiting("drawing")
            results.keep(run, state, self.history, found, self.board)
            facts |= {"test": found.test, "test_time": found.tested}
        if self.reproduction:
            for record in self.history:  # of earlier starts, too
                self.reproduction.epoch(record)
            facts["reproduction"] = self.reproduction.verdict(run.summary | facts, state.equality)
        run.write_summary(status="finished", ended=milliseconds(), **facts)
        self._send(math.inf, self.stop_signal)
        if found:
            results.show_scores(run, self.display)
        if self.reproduction:
            self.display.say(run.summary["reproduction"], "bold")

    def _send(self, at_most: float, until: threading.Event | None = None) -> None:
        """Send all of the ended run to MLflow, while it accepts anything and until `until` is set."""
        if not isinstance(self.tracker, AsyncWriter):
            return
        self.display.waiting("sending to MLflow")
        delivered = send(self.run, self.tracker, at_most=at_most, until=until)
        self.display.close()
        if not delivered:
            self.display.say(kept_back(self.run, self.tracker), "yellow")

    def _facts(self, state: State | None) -> dict:
        speeds = [r[SPEED] for r in self.history if SPEED in r]
        return {
            "best_epoch": state and state.best_epoch,
            "best_checkpoint": state and f"checkpoints/{state.chosen}",
            "images_per_second": round(float(np.median(speeds)), 2) if speeds else None,
            "steps": state and state.step,
            "val": state and state.validation,
            "skipped_steps": state.skipped_steps if state else 0,
        }


def _command() -> str | None:
    """What was typed; None where another program trains."""
    program = Path(sys.argv[0])
    name = {"train.py": "python jobs/train.py", "unet-train": "unet-train"}.get(program.name)
    return name and " ".join([name, *(shlex.quote(without_secrets(word)) for word in sys.argv[1:])])


def _lasting(record: dict) -> tuple:
    """What an epoch came to, without when and how fast."""
    return tuple(sorted((k, v) for k, v in record.items() if k not in PASSING))
