"""The trials' runs in MLflow, children of the sweep's run."""

import logging
from concurrent.futures import ThreadPoolExecutor

from unet.tracking.tracker import Tracker
from unet.tuning.ledger import UNDER_WAY, Ledger

ENDED = {"finished": "finished", "pruned": "finished", "failed": "failed", "stopped": "stopped"}
"""The status in MLflow of a trial by its end: a pruned trial did what it should."""


class ChildRuns:
    """Writes them from one thread, so that no trial waits for a store.

    What a run lacks is read from its trial's `metrics.jsonl`. A row of the ledger has `sent` when MLflow has taken all
    of an ended trial; what an outage or a kill kept from being sent is sent by `close`, or at the next start.
    """

    def __init__(self, tracker: Tracker, ledger: Ledger, base: dict, tags: dict):
        self._tracker, self._ledger, self._base, self._tags = tracker, ledger, base, tags
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._runs: dict[str, Tracker] = {}
        self._sent: dict[str, list[dict]] = {}

    def sync(self, trial: str) -> None:
        """Send what is new of a trial, up to the epochs in its row."""
        self._pool.submit(self._quietly, self._sync, trial)

    def end(self, trial: str) -> None:
        """Send the rest of a trial and how it ended."""
        self._pool.submit(self._quietly, self._end, trial)

    def send_missing(self, but: tuple[str, ...] = UNDER_WAY) -> None:
        """Send ended trials that MLflow has not taken wholly; not those that go on."""
        for row in self._ledger.rows:
            if row["end"] not in but and not row.get("sent"):
                self.end(row["trial"])

    def close(self) -> bool:
        """Return when everything was sent or has failed again: whether MLflow has taken it all."""
        self.send_missing(but=("running",))
        self._pool.shutdown(wait=True)
        return all(row.get("sent") for row in self._ledger.rows if row["end"] != "running")

    def _quietly(self, call, trial: str) -> None:
        try:
            call(trial)
        except Exception as error:
            # Any failure of the store must not reach the sweep; the next call tries again.
            logging.getLogger(__name__).debug("MLflow: %s", error)

    def _run(self, trial: str) -> Tracker:
        if trial not in self._runs:
            row = self._ledger[trial]
            run = self._tracker.of_run(None)
            params = self._base | row["settings"] | {"run_name": trial}
            tags = self._tags | {"status": "running", "trial": trial}
            # A kill may have fallen between the run's creation and its entry in the ledger.
            known = row.get("mlflow_run_id") or self._tracker.child(trial)
            # The winner's training may have made it already.
            key = self._ledger.run_summary(trial).get("mlflow_key")
            run.start(trial, known, params, tags, parent_run_id=self._tracker.run_id, key=key)
            self._runs[trial], self._sent[trial] = run, []
            self._ledger.update(trial, mlflow_run_id=run.run_id)
        return self._runs[trial]

    def _sync(self, trial: str) -> None:
        run, sent, epochs = self._run(trial), self._sent[trial], self._ledger[trial]["epochs"]
        for record in self._ledger.history(trial):
            if record not in sent and record["epoch"] <= epochs:
                run.epoch(record)
                sent.append(record)

    def _end(self, trial: str) -> None:
        self._sync(trial)
        run, row = self._run(trial), self._ledger[trial]
        run.tags({"status": row["end"], "end": row["end"], "reason": str(row["reason"])[:500]})
        run.status(ENDED[row["end"]])
        self._ledger.update(trial, sent=run.deliver())
