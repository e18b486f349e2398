"""A sweep in MLflow: a run of its own, and below it one for each trial."""

import threading
import uuid
from collections.abc import Callable

from unet.data.shards import Prepared
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.tracking.run_writer import RunWriter
from unet.tracking.send import PATIENCE, STOP_SECONDS, open_data
from unet.tracking.stored_run import code_version
from unet.tracking.writer import AsyncWriter
from unet.tuning.ledger import UNFINISHED, Ledger
from unet.tuning.sweep import SPACE, Sweep

STATUS_OF_END = {"finished": "finished", "pruned": "finished", "failed": "failed", "stopped": "stopped"}
"""The status in MLflow of a trial by its end: a pruned trial did what it should."""


class SweepRuns:
    """Hands a sweep's news to one queue, so that neither the sweep nor a trial waits for a store.

    What a trial's run lacks is read from its `metrics.jsonl`. Its row of the ledger has `sent` once MLflow has
    accepted all of the ended trial; what an outage or a kill held back is sent by `deliver`, or at the next start.

    Attributes:
        own: the writer of the sweep's own run.
    """

    def __init__(self, sweep: Sweep, ledger: Ledger, say: Callable[[str], None]):
        self._sweep, self._ledger, part = sweep, ledger, sweep.settings.run
        self.own = AsyncWriter(Folder(part.storage_path), part.experiment, part.tracking_uri, say)
        self._base: dict = {}
        self._trials: dict[str, RunWriter] = {}
        self._ended: set[str] = set()

    def check(self) -> None:
        """Wait for a first answer of MLflow.

        Raises:
            InputError: it can never be used.
        """
        try:
            self.own.check(PATIENCE)
        except BaseException:
            self.own.close()
            raise

    def begin(self, base: dict, prepared: Prepared | None = None) -> None:
        """Begin or continue the sweep's own run; `base` as `Sweep.base`, `prepared` its data, if they are open."""
        sweep, self._base = self._sweep, base
        shown, summary = sweep.public_settings(), sweep.summary
        # What the space draws is a parameter of the trials only.
        params = {name: value for name, value in shown.items() if name not in sweep.space.draws}
        params["searched"] = sweep.space.described()
        tags = {"kind": "sweep", "data_digest": summary["data_digest"], "run_folder": str(sweep.folder)}
        key, known = summary["mlflow_key"], summary.get("mlflow_run_id")
        self.own.start(sweep.name, known, params, tags, key, summary["started"])
        self.own.tags({"status": summary["status"]})
        self.own.status(summary["status"])
        if prepared := prepared or open_data(sweep.folder, summary["data_digest"]):
            self.own.data(prepared)
        self.own.file(sweep.folder, SPACE)
        self.own.open()

    def sync(self, trial: str) -> None:
        """Send what is new of a running trial, up to the epochs in its row."""
        self._ended.discard(trial)
        self._send(trial)

    def end(self, trial: str) -> None:
        """Send the rest of a trial and how it ended."""
        run, row = self._send(trial), self._ledger[trial]
        run.tags({"status": row["end"], "end": row["end"], "reason": str(row["reason"])[:500]})
        run.status(STATUS_OF_END[row["end"]], int(1000 * row["ended"]))
        run.single(row["mlflow_key"])
        self._ended.add(trial)

    def _send(self, trial: str) -> RunWriter:
        row = self._ledger[trial]
        if trial not in self._trials:
            if not row.get("mlflow_key"):
                self._ledger.update(trial, mlflow_key=uuid.uuid4().hex)
            self._trials[trial] = run = self.own.child()
            tags = {"data_digest": self._sweep.summary["data_digest"], "code": code_version()}
            tags |= {"status": row["end"], "trial": trial}
            params = self._base | row["settings"] | {"run_name": trial}
            started = row.get("started") and int(1000 * row["started"])
            run.start(trial, row.get("mlflow_run_id"), params, tags, row["mlflow_key"], started)
            if row["end"] == "running":
                run.status("running")
        run = self._trials[trial]
        run.epoch(*(record for record in self._ledger.history(trial) if record["epoch"] <= row["epochs"]))
        return run

    def send_missing(self, but: tuple[str, ...] = UNFINISHED) -> None:
        """Send the ended trials that MLflow does not have whole, `but` not those with these ends."""
        for row in self._ledger.rows:
            if row["end"] not in but and not row.get("sent") and row["trial"] not in self._ended:
                self.end(row["trial"])

    def receive(self) -> None:
        """Show news of MLflow, and record which runs it has, and which of them whole."""
        self.own.receive()
        if self.own.run_id not in (None, self._sweep.summary.get("mlflow_run_id")):
            self._sweep.write_summary(mlflow_run_id=self.own.run_id)
        for trial, run in self._trials.items():
            row, ended = self._ledger[trial], trial in self._ended
            news: dict = {"mlflow_run_id": run.run_id} if run.run_id not in (None, row.get("mlflow_run_id")) else {}
            if ended and run.taken and not row.get("sent"):
                news["sent"] = True
            if news:
                self._ledger.update(trial, **news)
                if ended:
                    self._ledger.close_run(trial)

    def deliver(self, stop_signal: threading.Event | None = None) -> bool:
        """Wait until MLflow has accepted all of the ended trials, or is given up: whether it has.

        What is left is dropped, since the best trial's run is about to be continued by a writer of its own; the next
        start sends it. A sweep that is to stop has less patience.
        """
        self.send_missing(but=("running",))
        if not (stop_signal and stop_signal.is_set()):
            self.own.deliver(PATIENCE, until=stop_signal)
        if stop_signal and stop_signal.is_set():
            self.own.deliver(STOP_SECONDS, at_most=PATIENCE)
        self.receive()
        for run in self._trials.values():
            if not run.taken:
                self.own.drop(run)
        self._trials.clear()
        return self.has_all_trials

    @property
    def has_all_trials(self) -> bool:
        """Whether MLflow has all of the ended trials."""
        return all(row.get("sent") for row in self._ledger.rows if row["end"] != "running")

    def finish(self, until: threading.Event | None = None) -> bool:
        """Wait until MLflow has accepted all of the sweep, is given up, or `until` is set: whether it has."""
        self.own.deliver(PATIENCE, until=until)
        self.receive()
        return self.own.taken and self.has_all_trials

    def mark(self, status: str, reason: str) -> None:
        """Send how the sweep ends."""
        self.own.tags({"status": status, "reason": without_secrets(reason)[:500]})
        self.own.status(status)

    def close(self) -> None:
        """Close the queue after a moment for the last calls; what MLflow lacks is in the sweep's folder."""
        self.own.deliver(STOP_SECONDS, at_most=STOP_SECONDS)
        self.own.close()
