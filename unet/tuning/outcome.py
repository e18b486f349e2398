"""The end of a sweep: its ranking and files, the test score and model of the best trial, and its MLflow run."""

import csv
import io
import shlex
import tempfile
import threading
import time
from pathlib import Path

import yaml

from unet.classes import Classes
from unet.config import TrainSettings, TuneSettings, unflat
from unet.errors import InputError, RunFailed
from unet.metrics import as_metrics
from unet.secrets import without_passwords
from unet.supervise.driver import train
from unet.supervise.preflight import open_run
from unet.terminal import Display, score_table
from unet.tracking.tracker import Tracker
from unet.tuning import figures
from unet.tuning.board import epochs_saved, trial_table
from unet.tuning.ledger import Ledger, ranked
from unet.tuning.search import BEST
from unet.tuning.space import Space
from unet.tuning.trial import Shared

OF_THIS_PLACE = ("storage_path", "tracking_uri", "run_name", "resume", "config", "debug")
"""Settings that best_config.yaml leaves out: it trains anywhere."""


def rank(ledger: Ledger) -> list[dict]:
    """The trials, best first.

    Raises:
        RunFailed: none came to a score.
    """
    rows = ranked(ledger.rows)
    if not rows or rows[0][BEST] is None:
        reasons = {row["reason"] for row in rows if row["reason"]}
        raise RunFailed(f"No trial came to a score. {' '.join(sorted(reasons)[:2])}".strip())
    return rows


def write_files(folder, rows: list[dict], ledger: Ledger, settings: TuneSettings, space: Space, shared: Shared) -> dict:
    """`sweep.csv`, `best_config.yaml` and the pictures into the sweep's folder; their content by name."""
    table = io.StringIO()
    by_class = [f"val_iou_{c.name}" for c in shared.classes]
    columns = ["trial", "end", "epochs", *space.draws, BEST, "best_epoch", *by_class]
    columns += ["started", "ended", "seconds", "tries", "reason", "mlflow_run_id"]
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(row | row["settings"] for row in rows)
    best = shared.base | {"data": settings.data.data} | rows[0]["settings"]
    best = without_passwords({k: v for k, v in best.items() if k not in OF_THIS_PLACE})
    files = {"sweep.csv": table.getvalue().encode(), "best_config.yaml": yaml.safe_dump(best, sort_keys=False).encode()}
    importance = figures.parameter_importance(rows, space, settings.training.seed)
    histories = {row["trial"]: ledger.history(row["trial"])[: row["epochs"]] for row in rows}
    pictures = {
        "scores_over_time.png": lambda path: figures.scores_over_time(histories, rows, path),
        "settings.png": lambda path: figures.settings_and_scores(rows, space, path),
    }
    if importance:
        pictures["importance.png"] = lambda path: figures.importance_picture(importance, path)
    with tempfile.TemporaryDirectory() as scratch:
        for name, picture in pictures.items():
            picture(Path(scratch) / name)
            files[name] = (Path(scratch) / name).read_bytes()
    for name, content in files.items():
        folder.write_bytes(name, content)
    return files


def score_best(best: dict, shared: Shared, tracking_uri: str, stop_signal: threading.Event) -> dict:
    """Score the test split with the best trial's best weights, once, and package them; the summary of its run.

    The run is continued with no epoch left to train, so what follows is what follows every training.
    """
    values = shared.base | best["settings"] | {"run_name": best["trial"], "tracking_uri": tracking_uri}
    settings = unflat(TrainSettings, values | {"epochs": best["epochs"]})
    try:
        return train(open_run(settings), Display(quiet=True), stop_signal=stop_signal)
    except InputError as error:  # the sweep has run: it is no matter of its input any more
        raise RunFailed(f"The best trial could not be scored: {error} The same command tries again.") from error


def report_to_parent(tracker: Tracker, rows: list[dict], epochs: int, summary: dict, files: dict[str, bytes]) -> None:
    """The outcome into the sweep's own MLflow run."""
    best = rows[0]
    ends = {end: sum(r["end"] == end for r in rows) for end in ("finished", "pruned", "failed", "stopped")}
    metrics = {f"trials_{end}": count for end, count in ends.items()}
    metrics |= {"trials": len(rows), "trial_epochs_saved": epochs_saved(rows, epochs), BEST: best[BEST]}
    if summary.get("test"):
        metrics |= as_metrics("test", summary["test"])
    tracker.metrics(metrics, 0, int(time.time() * 1000))
    tags = {
        "status": summary["status"],
        "reason": summary["reason"],
        "best_trial": best["trial"],
        "best_run_id": best.get("mlflow_run_id"),
    }
    tracker.tags(tags | {f"best_{k}": v for k, v in best["settings"].items()})
    tracker.artifacts("", files)
    tracker.status(summary["status"])


def show(
    name: str,
    folder,
    rows: list[dict],
    summary: dict,
    settings: TuneSettings,
    classes: Classes,
    where: str,
    display: Display,
) -> None:
    """The ranked table, the best trial's test score, and the commands that follow."""
    epochs = settings.training.epochs
    width, title = display.console.width, "Trials, best first"
    display.console.print(trial_table(rows, lambda row: f"{row['epochs']}/{epochs}", classes, width, title))
    if summary.get("test"):
        title = f"Test split, {summary['best_trial']}"
        display.console.print(score_table(title, summary["test"]))
    saved, total = summary["trial_epochs_saved"], len(rows) * epochs
    lines = [
        ("best", f"{summary['best_trial']}, val mean IoU {rows[0][BEST]:.4f} at epoch {rows[0]['best_epoch']}"),
        ("saved", f"{saved} of {total} trial-epochs by pruning"),
        ("files", f"{folder}/: sweep.csv, trials.jsonl, pictures"),
        (
            "train it",
            f"python jobs/train.py --config {shlex.quote(f'{folder}/best_config.yaml')} --epochs {3 * epochs}",
        ),
        ("more trials", f"python jobs/tune.py --resume {name} --extend 10{where}"),
    ]
    if summary.get("model_uri"):
        lines.insert(1, ("model", summary["model_uri"]))
    if summary.get("registered"):
        lines.insert(2, ("registered", summary["registered"]))
    if settings.sweep.search == "grid":
        lines.pop()
    display.table(f"Sweep {name} is finished", lines)
