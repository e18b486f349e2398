"""What happens to the trials, written down: the ledger at each start and end, MLflow after each epoch."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

from ray import tune

from unet.classes import CLASSES
from unet.tracking import Tracker
from unet.tuning.ledger import Ledger
from unet.tuning.search import BEST

ENDED = {"finished": "finished", "pruned": "finished", "failed": "failed", "stopped": "stopped"}
"""The status in MLflow of a trial by its end: a pruned trial did what it should."""


class ChildRuns:
    """The trials' runs in MLflow, children of the sweep's, written by one thread so that no trial waits for a store.

    What a run lacks is read from its trial's `metrics.jsonl`; what could not be sent is sent with the next epoch.
    """

    def __init__(self, tracker: Tracker, ledger: Ledger, base: dict, tags: dict):
        self._tracker, self._ledger, self._base, self._tags = tracker, ledger, base, tags
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._runs: dict[str, Tracker] = {}
        self._sent: dict[str, list[dict]] = {}

    def sync(self, trial: str, epochs: int | None = None) -> None:
        """Send what is new of a trial, up to an epoch."""
        self._pool.submit(self._quietly, self._sync, trial, epochs)

    def end(self, trial: str, epochs: int | None, end: str, reason: str | None) -> None:
        self.sync(trial, epochs)
        self._pool.submit(self._quietly, self._end, trial, end, reason)

    def close(self) -> None:
        """Return when everything was sent or has failed again."""
        self._pool.shutdown(wait=True)

    def _quietly(self, call, *arguments) -> None:
        try:
            call(*arguments)
        except Exception as error:
            # Any failure of the store must not reach the sweep; the next call tries again.
            logging.getLogger(__name__).debug("MLflow: %s", error)

    def _run(self, trial: str) -> Tracker:
        if trial not in self._runs:
            row = self._ledger[trial]
            run = self._tracker.of_run(None)
            params = self._base | row["settings"] | {"run_name": trial}
            tags = self._tags | {"status": "running", "trial": trial}
            known = row.get("mlflow_run_id")
            run.start(trial, known, params, tags, parent_run_id=self._tracker.run_id)
            self._runs[trial], self._sent[trial] = run, []
            self._ledger.update(trial, mlflow_run_id=run.run_id)
        return self._runs[trial]

    def _sync(self, trial: str, epochs: int | None) -> None:
        run = self._run(trial)
        for record in self._ledger.history(trial):
            if record not in self._sent[trial] and (epochs is None or record["epoch"] <= epochs):
                run.epoch(record)
                self._sent[trial].append(record)

    def _end(self, trial: str, end: str, reason: str | None) -> None:
        run = self._run(trial)
        run.tags({"status": end, "end": end} | ({"reason": reason[:500]} if reason else {}))
        run.status(ENDED[end])


class Recorder(tune.Callback):
    """Tune's news into the ledger and the child runs."""

    def __init__(self, ledger: Ledger, children: ChildRuns):
        self._ledger, self._children = ledger, children
        self._lively, self.idle_seconds = time.monotonic(), 0.0

    def __getstate__(self):
        return {}  # Tune pickles its callbacks for a restore that a sweep does not use

    def on_step_end(self, iteration, trials, **info):
        now = time.monotonic()
        if any(trial.status == "RUNNING" for trial in trials):
            self._lively = now
        self.idle_seconds = now - self._lively

    def on_trial_start(self, iteration, trials, trial, **info):
        row = self._ledger[name(trial)]
        started = row.get("started") or round(time.time(), 1)
        self._ledger.update(name(trial), end="running", reason=None, tries=row["tries"] + 1, started=started)
        self._children.sync(name(trial))

    def on_trial_result(self, iteration, trials, trial, result, **info):
        row = self._ledger[name(trial)]
        changes = {key: result[key] for key in ("pid", "memory_mb", "epoch_seconds") if key in result}
        changes["seconds"] = row["seconds"] + changes.pop("epoch_seconds", result.get("time_this_iter_s") or 0.0)
        changes["settings"] = dict(trial.config["draw"])  # PBT changes them
        if result.get("best_epoch"):
            changes |= {"epochs": result["epoch"], BEST: result[BEST], "best_epoch": result["best_epoch"]}
            if result["best_epoch"] == result["epoch"]:
                changes |= {f"val_iou_{c.name}": result.get(f"val_iou_{c.name}") for c in CLASSES}
        # On disk at a process' first epoch; later ones are in the trial's own run.
        self._ledger.update(name(trial), write=row.get("pid") != result.get("pid"), **changes)
        self._children.sync(name(trial), result["epoch"])

    def on_trial_complete(self, iteration, trials, trial, **info):
        summary = self._ledger.run_summary(name(trial))
        end = summary.get("status")
        self.end(name(trial), end if end in ("finished", "failed") else "pruned", summary.get("reason"))

    def on_trial_error(self, iteration, trials, trial, **info):
        error = trial.get_error()
        lines = str(getattr(error, "cause", None) or error or "unknown").strip().splitlines()
        self.end(name(trial), "failed", lines[-1] if lines else "unknown")

    def end(self, trial: str, end: str, reason: str | None = None) -> None:
        self._ledger.update(trial, end=end, reason=reason, ended=round(time.time(), 1))
        self._ledger.close_run(trial, end)
        self._children.end(trial, self._ledger[trial]["epochs"], end, reason)


def name(trial) -> str:
    """Our name of a trial of Tune."""
    return trial.custom_trial_name
