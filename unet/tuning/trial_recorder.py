"""Records what Tune reports of the trials, in the ledger and in their MLflow runs."""

import time

from ray import tune

from unet.secrets import without_secrets
from unet.tuning.ledger import Ledger
from unet.tuning.sweep_runs import SweepRuns


class TrialRecorder(tune.Callback):
    """Records starts, epochs and ends. `scheduler` is named as the reason where a trial was stopped early.

    Attributes:
        running: the trials that have a process now.
        idle_seconds: how long no trial has had one.
        begun: when the first trial of this start began, by `time.monotonic`; None before.
    """

    def __init__(self, ledger: Ledger, runs: SweepRuns, epochs: int, scheduler: str):
        self._ledger, self._runs, self._epochs, self._scheduler = ledger, runs, epochs, scheduler
        self._lively = time.monotonic()
        self.running: set[str] = set()
        self.idle_seconds = 0.0
        self.begun: float | None = None

    def __getstate__(self):
        return {}  # Tune pickles its callbacks for a restore that a sweep does not use

    def on_step_end(self, iteration, trials, **info):
        now = time.monotonic()
        self.running = {name(trial) for trial in trials if trial.status == "RUNNING"}
        self._lively = now if self.running else self._lively
        self.idle_seconds = now - self._lively
        self._runs.receive()

    def on_trial_start(self, iteration, trials, trial, **info):
        self.begun = self.begun or time.monotonic()
        row = self._ledger[name(trial)]
        first = {"started": row.get("started") or round(time.time(), 1), "tries": max(1, row["tries"])}
        self._ledger.update(name(trial), end="running", reason=None, sent=False, **first)
        self._runs.sync(name(trial))

    def on_trial_recover(self, iteration, trials, trial, **info):
        self._ledger.update(name(trial), tries=self._ledger[name(trial)]["tries"] + 1)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        row = self._ledger[name(trial)]
        changes = {key: result[key] for key in ("pid", "memory_mb") if key in result}
        changes["seconds"] = row["seconds"] + result.get("time_this_iter_s", 0.0)
        changes["training_seconds"] = row.get("training_seconds", 0.0) + result.get("training_seconds", 0.0)
        changes["settings"] = dict(trial.config["draw"])  # PBT changes them
        # On disk only what a restart could not learn from the trial's own run.
        write = row.get("pid") != result.get("pid") or row["settings"] != changes["settings"]
        self._ledger.update(name(trial), write=write, **changes)
        if not result.get("diverged"):
            self._ledger.refresh(name(trial), result["epoch"])
        self._runs.sync(name(trial))

    def on_trial_complete(self, iteration, trials, trial, **info):
        summary, result = self._ledger.run_summary(name(trial)), trial.last_result or {}
        if summary.get("status") == "failed":
            self.end(name(trial), "failed", summary.get("reason"), diverged=True)
        elif result.get("stopped"):
            self.end(name(trial), "stopped", None)
        elif summary.get("status") == "finished" or self._ledger[name(trial)]["epochs"] >= self._epochs:
            self.end(name(trial), "finished", "trained to the end")
        else:
            self.end(name(trial), "pruned", f"{self._scheduler} stopped it")

    def on_trial_error(self, iteration, trials, trial, **info):
        error = trial.get_error()
        lines = str(getattr(error, "cause", None) or error or "unknown").strip().splitlines()
        self.end(name(trial), "failed", lines[-1] if lines else "unknown")

    def end(self, trial: str, end: str, reason: str | None, **facts) -> None:
        reason = reason and without_secrets(reason)
        self._ledger.update(trial, end=end, reason=reason, ended=round(time.time(), 1), **facts)
        self._ledger.close_run(trial)
        self._runs.end(trial)


def name(trial) -> str:
    """Our name of a trial of Tune."""
    return trial.custom_trial_name
