"""A sweep's own record, `trials.jsonl`: one line per trial, in the order of their starts.

The file is replaced whole at each change, so no kill tears it. Tune's own state is disposable: whatever continues,
extends or ranks a sweep reads this and the trials' run folders.

Why: docs/decisions.md#own-ledger-instead-of-tunerrestore
"""

import json
from collections.abc import Iterable

from unet.locks import Lock
from unet.metric_names import BEST, BEST_EPOCH, SCORE, of_class
from unet.runs.checkpoint import Checkpoints
from unet.runs.run import METRICS, SUMMARY
from unet.storage import Folder

TRIALS = "trials.jsonl"
UNFINISHED = ("running", "stopped")


class Ledger:
    """The trials of a sweep's folder: what they draw, how far they got, why they ended.

    A row holds `trial` (its name and the name of its run), `end` (running, finished, pruned, failed, stopped),
    `reason`, `settings` (what the space drew), `tries`, `epochs`, `val/best_mean_iou`, `val/best_epoch`,
    `val/iou/<class>` of that epoch, `started` and `ended` (seconds since 1970), `seconds` in its process,
    `training_seconds` of them (without the first step, which traces), `pid` and `memory_mb` of that process,
    `diverged`, `mlflow_key`, `mlflow_run_id`, and `sent`: whether MLflow has it all. `held` is the lock of the sweep
    that writes.
    """

    def __init__(self, folder: Folder, held: Lock | None = None):
        self._folder, self._held = folder, held
        lines = folder.read_text(TRIALS).splitlines() if folder.exists(TRIALS) else []
        self._rows = {row["trial"]: row for row in map(json.loads, lines)}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, trial: str) -> dict:
        return self._rows[trial]

    @property
    def rows(self) -> list[dict]:
        return [dict(row) for row in self._rows.values()]

    def unfinished(self) -> list[dict]:
        """The trials that have begun and have not ended for good."""
        return [row for row in self.rows if row["end"] in UNFINISHED]

    def begin(self, settings: dict) -> dict:
        """A new trial."""
        row: dict = {"trial": f"trial-{len(self) + 1:03d}", "end": "running", "reason": None, "settings": settings}
        row |= {"tries": 0, "epochs": 0, BEST: None, BEST_EPOCH: None, "seconds": 0.0}
        self._rows[row["trial"]] = row
        self.write()
        return row

    def update(self, trial: str, write: bool = True, **changes) -> None:
        self._rows[trial] |= changes
        if write:
            self.write()

    def write(self) -> None:
        if self._held:
            self._held.check(f"the sweep in {self._folder}")
        self._folder.write_text(TRIALS, "".join(json.dumps(row) + "\n" for row in self._rows.values()))

    def history(self, trial: str) -> list[dict]:
        """The epochs of a trial, as its run recorded them."""
        run = self._folder / trial
        return [json.loads(line) for line in run.read_text(METRICS).splitlines()] if run.exists(METRICS) else []

    def continued(self, trial: str) -> list[dict]:
        """The epochs that an unfinished trial need not train again, by its latest checkpoint."""
        latest = Checkpoints(self._folder / trial).latest()
        return latest[1].history if latest else []

    def refresh(self, trial: str, epochs: int | None = None) -> None:
        """Update a row from its trial's run, up to an epoch; in memory only, since the run is on disk."""
        history = self.continued(trial) if epochs is None else self.history(trial)
        records = [r for r in history if epochs is None or r["epoch"] <= epochs]
        scored = [r for r in records if SCORE in r]
        facts = {"epochs": records[-1]["epoch"] if records else 0}
        if scored:
            best = max(scored, key=lambda r: r[SCORE])  # the first of equals
            facts |= {BEST: best[SCORE], BEST_EPOCH: best["epoch"]}
            facts |= {key: value for key, value in best.items() if key.startswith(of_class("val", "iou", ""))}
        self.update(trial, write=False, **facts)

    def run_summary(self, trial: str) -> dict:
        """The `summary.json` of a trial's run; empty if there is none."""
        run = self._folder / trial
        return json.loads(run.read_text(SUMMARY)) if run.exists(SUMMARY) else {}

    def close_run(self, trial: str) -> None:
        """Record in a trial's run how it ended (a pruned run was stopped) and which MLflow run it has."""
        if summary := self.run_summary(trial):
            row = self[trial]
            if not summary.get("test"):  # else it was chosen, and is finished whatever its end
                summary["status"] = {"pruned": "stopped"}.get(row["end"], row["end"])
            summary |= {"end": row["end"], "reason": row["reason"]}
            summary |= {name: row.get(name) for name in ("mlflow_key", "mlflow_run_id")}
            (self._folder / trial).write_text(SUMMARY, json.dumps(summary, indent=2))


def ranked(rows: Iterable[dict]) -> list[dict]:
    """Best first by val mean IoU; those without a score last."""
    return sorted(rows, key=lambda r: -1.0 if r[BEST] is None else r[BEST], reverse=True)
