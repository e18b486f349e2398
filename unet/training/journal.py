"""What a run says about itself while it goes on: in its folder, in MLflow and on the terminal. One thread writes it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from unet.data.shards import Prepared
from unet.errors import StorageFailed
from unet.storage import Folder
from unet.terminal import Display
from unet.tracking import Tracker, Untracked
from unet.training import results
from unet.training.checkpoint import State
from unet.training.run import CONFIG, Run, where

PASSING = ("time", "images_per_second", "data_wait_fraction")
"""What of an epoch's record is not the same when it is trained again."""


@dataclass
class Journal:
    """The journal of one start of a run.

    Attributes:
        as_trial: a trial of a sweep, which has no test score and whose MLflow run the sweep writes.
        started: when the job began, in seconds since 1970.
        history: the epochs so far, as in `metrics.jsonl`.
    """

    run: Run
    prepared: Prepared
    parameters: int
    display: Display
    as_trial: bool
    started: float
    tracker: Tracker | Untracked = field(default_factory=Untracked)
    history: list[dict] = field(default_factory=list)

    def open(self, state: State | None) -> None:
        """Write down that the run is on, from the state of its last checkpoint."""
        run, settings = self.run, self.run.settings
        if not self.as_trial:
            storage = Folder(settings.run.storage_path)
            self.tracker = Tracker(storage, settings.run.experiment, settings.run.tracking_uri)
        self.history = run.read_history()
        run.start(data_digest=self.prepared.manifest.data_digest, parameters=self.parameters)
        # What the checkpoint vouches for: the file may lack an epoch that a kill kept from being written.
        self._take(state.history if state else [])

    def connect(self) -> None:
        """Begin or continue the run in MLflow."""
        run, manifest = self.run, self.prepared.manifest
        params = run.shown_settings() | {"parameters": self.parameters, "data_digest": manifest.data_digest}
        tags = {"status": "running", "data_digest": manifest.data_digest, "run_folder": str(run.folder)}
        run_id = self.tracker.start(run.name, run.summary["mlflow_run_id"], params, tags)
        run.write_summary(mlflow_run_id=run_id or run.summary["mlflow_run_id"])
        self.tracker.data(self.prepared)
        for record in self.history:
            self.tracker.epoch(record)
        self.tracker.artifacts("", {CONFIG: run.folder.read_bytes(CONFIG)})

    def first_step(self, at: float) -> None:
        if self.run.summary["seconds_to_first_step"] is None:
            self.run.write_summary(seconds_to_first_step=round(at - self.started, 2))

    def epoch(self, record: dict, validation: dict | None) -> None:
        """An epoch that has ended, and the scores of the best one."""
        self._take([r for r in self.history if r["epoch"] < record["epoch"]] + [record])
        self.run.write_summary(
            best_epoch=record["best_epoch"], val=validation, skipped_steps=record.get("skipped_steps", 0)
        )
        self.display.epoch(record, self.run.settings.training.epochs, self.prepared.manifest.class_infos)

    def _take(self, history: list[dict]) -> None:
        """Write down the epochs so far and send them on.

        A line that was written once stays as it is, although its epoch may be trained again after a damaged
        checkpoint: MLflow has it with its time.
        """
        written = {_lasting(record): record for record in self.history}
        history = [written.get(_lasting(record), record) for record in history]
        new = [record for record in history if record not in self.history]
        self.history = history
        self.run.write_history(history)
        if self.tracker.run_id is not None:  # else `connect` sends them all
            for record in new:
                self.tracker.epoch(record)

    def restart(self, reason: str, step: int, workers: int) -> None:
        """A group of workers that takes the place of another."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        log = [*(self.run.summary["restart_log"] or [])]
        log.append({"time": at, "reason": reason, "step": step, "workers": workers})
        self.run.write_summary(restarts=len(log), restart_log=log)
        told = f"{at} {reason}; {workers} worker(s) from step {step}"
        self.tracker.tags({"restarts": len(log), f"restart_{len(log):03d}": told[:500]})

    def stopped(self) -> None:
        """Mark the run first of all: a submitted job may have few seconds left."""
        self.run.write_summary(status="stopped")
        self.tracker.tags({"status": "stopped"})
        self.tracker.status("stopped")

    def mark(self, status: str, **facts) -> None:
        """Say how the run ends, in its folder if the storage still takes that."""
        with contextlib.suppress(StorageFailed):
            self.run.write_summary(status=status, **facts)
        self.tracker.status(status)

    def broken_off(self, status: str, state: State | None, reason: str) -> None:
        """The end of a run that was stopped or failed."""
        self.tracker.tags({"status": status, "reason": reason[:500]})
        self.mark(status, **self._facts(state))
        if status == "stopped":
            at = f"step {state.step}" if state else "the start"
            go_on = f"python jobs/train.py --resume {self.run.name}{where(self.run.settings.run)}"
            self.display.say(f"Stopped at {at}. Continue: {go_on}")

    def finished(self, state: State, test: dict | None, gallery: dict | None, package: dict | None) -> None:
        """The end of a run whose last epoch is behind, and whose test split was scored."""
        run, tracker, tags, facts = self.run, self.tracker, {}, self._facts(state)
        if not self.as_trial:
            self.display.waiting("drawing")
            tags = results.keep(run, state, self.history, test, gallery, package, tracker)
            facts |= tags | {"test": test}
            self.display.close()
        if not results.finish(run, tracker, facts, tags):
            self.display.say("MLflow did not take everything; the run's folder holds it all.", "yellow")
        if not self.as_trial:
            results.show(run, tracker, self.display)

    def _facts(self, state: State | None) -> dict:
        speeds = [r["images_per_second"] for r in self.history if "images_per_second" in r]
        return {
            "best_epoch": state and state.best_epoch,
            "best_checkpoint": state and state.best_checkpoint and f"checkpoints/{state.best_checkpoint}",
            "images_per_second": round(float(np.median(speeds)), 2) if speeds else None,
            "val": state and state.validation,
            "skipped_steps": state.skipped_steps if state else 0,
        }


def _lasting(record: dict) -> tuple:
    """What an epoch came to, without when and how fast."""
    return tuple(sorted((k, v) for k, v in record.items() if k not in PASSING))
