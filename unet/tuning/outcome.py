"""The end of a sweep: its ranking and files, the test score and model of the best trial, and its MLflow run."""

import csv
import io
import shlex
import tempfile
import threading
from pathlib import Path

import yaml

from unet import metric_names
from unet.classes import Classes
from unet.config import OF_THIS_PLACE, TrainSettings, TuneSettings, unflat
from unet.errors import InputError, RunFailed
from unet.metric_names import BEST, BEST_EPOCH, EPOCHS_SAVED, TRIALS, of_class
from unet.pages.numbers import score
from unet.runs.run import Run, called, milliseconds, where
from unet.secrets import without_passwords, without_secrets
from unet.storage import Folder
from unet.supervise.driver import train
from unet.supervise.preflight import open_run
from unet.terminal import Display, score_table
from unet.tracking.description import NOTE
from unet.tracking.registry import register
from unet.tracking.run_writer import RunWriter
from unet.tracking.send import send_later
from unet.tuning import figures
from unet.tuning.board import epochs_saved, trial_table
from unet.tuning.importance import parameter_importance
from unet.tuning.ledger import Ledger, ranked
from unet.tuning.space import Space
from unet.tuning.sweep import Sweep
from unet.tuning.sweep_runs import SweepRuns
from unet.tuning.trial import Shared

FILES = ("sweep.csv", "best_config.yaml", "scores_over_time.png", "settings.png", "importance.png")
NOT_ALL_SENT = "MLflow does not have all of the sweep; its folder does."


def rank(ledger: Ledger) -> list[dict]:
    """The trials, best first.

    Raises:
        RunFailed: none has a score.
    """
    rows = ranked(ledger.rows)
    if not rows or rows[0][BEST] is None:
        reasons = {row["reason"] for row in rows if row["reason"]}
        raise RunFailed(f"No trial has a score. {' '.join(sorted(reasons)[:2])}".strip())
    return rows


def write_files(
    folder: Folder, rows: list[dict], ledger: Ledger, settings: TuneSettings, space: Space, shared: Shared
) -> dict:
    """`sweep.csv`, `best_config.yaml` and the pictures into the sweep's folder; their content by name."""
    table = io.StringIO()
    by_class = [of_class("val", "iou", c.name) for c in shared.classes]
    columns = ["trial", "end", "epochs", *space.draws, BEST, BEST_EPOCH, *by_class]
    columns += ["started", "ended", "seconds", "tries", "reason", "mlflow_run_id"]
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(row | row["settings"] for row in rows)
    best = shared.base | {"data": settings.data.data} | rows[0]["settings"]
    best = without_passwords({k: v for k, v in best.items() if k not in OF_THIS_PLACE})
    files = {"sweep.csv": table.getvalue().encode(), "best_config.yaml": yaml.safe_dump(best, sort_keys=False).encode()}
    importance = parameter_importance(rows, space, settings.training.seed)
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


def score_best(best: dict, base: dict, tracking_uri: str, stop_signal: threading.Event) -> dict:
    """Score the test split with the best trial's best weights, once, and package them; the summary of its run.

    The run is continued with no epoch left to train, so what follows is what follows every training.
    """
    settings = _settings_of(best, base, tracking_uri, epochs=best["epochs"])
    try:
        return train(open_run(settings), Display(quiet=True), stop_signal=stop_signal)
    except InputError as error:  # the sweep has run: its input is not to blame
        raise RunFailed(f"The best trial could not be scored: {error} The same command tries again.") from error


def _settings_of(row: dict, base: dict, tracking_uri: str, **changes) -> TrainSettings:
    values = base | row["settings"] | {"run_name": row["trial"], "tracking_uri": tracking_uri}
    return unflat(TrainSettings, values | changes)


SHOWN_TRIALS = 30


def report(to: RunWriter, folder: Folder, rows: list[dict], epochs: int, summary: dict) -> None:
    """Send the outcome to the sweep's own MLflow run."""
    best = rows[0]
    ends = {end: sum(r["end"] == end for r in rows) for end in ("finished", "pruned", "failed", "stopped")}
    metrics = {f"{TRIALS}_{end}": count for end, count in ends.items()}
    metrics |= {TRIALS: len(rows), EPOCHS_SAVED: epochs_saved(rows, epochs), BEST: best[BEST]}
    if summary.get("test"):
        metrics |= metric_names.of("test", summary["test"])
    to.metrics(metrics, 0, summary["ended"])
    tags = {
        "status": summary["status"],
        "reason": summary["reason"],
        "best_trial": best["trial"],
        "best_run_id": best.get("mlflow_run_id"),
    }
    to.tags(tags | {f"best_{k}": v for k, v in best["settings"].items()} | {NOTE: described(rows, epochs, summary)})
    for name in FILES:
        if folder.exists(name):
            to.file(folder, name)
    to.status(summary["status"], summary["ended"])


def described(rows: list[dict], epochs: int, summary: dict) -> str:
    """The sweep's description in MLflow: Markdown, at most 8,000 characters."""
    best, saved, names = rows[0], epochs_saved(rows, epochs), list(rows[0]["settings"])
    words = f"**{summary['status'].capitalize()}**: {len(rows)} trials, {saved} of {len(rows) * epochs} trial-epochs "
    words += f"saved by pruning. Best: **{best['trial']}**, val mean IoU {score(best[BEST])}"
    if summary.get("test"):
        words += f", test mean IoU {score(summary['test']['mean_iou'])}"
    lines = [["trial", *names, "val mean IoU", "epochs", "end"], ["---"] * (len(names) + 4)]
    for row in rows[:SHOWN_TRIALS]:
        values = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row["settings"].values())
        lines.append([row["trial"], *values, score(row[BEST]), str(row["epochs"]), row["end"]])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    more = f"\n\n{len(rows) - SHOWN_TRIALS} more: see `sweep.csv`." if len(rows) > SHOWN_TRIALS else ""
    return f"{words}.\n\n{table}{more}"


def conclude(
    sweep: Sweep,
    ledger: Ledger,
    shared: Shared,
    runs: SweepRuns,
    display: Display,
    reason: str,
    stop_signal: threading.Event,
) -> dict | None:
    """What follows the last trial; the sweep's summary, or None if it was stopped before the best was scored."""
    settings, uri = sweep.settings, runs.own.uri
    epochs, rows = settings.epochs, rank(ledger)
    write_files(sweep.folder, rows, ledger, settings, sweep.space, shared)
    best = rows[0]
    display.waiting(f"scoring the test split with {best['trial']}")
    ledger.close_run(best["trial"])  # the id of its MLflow run may have come after its end
    run = score_best(best, shared.base, uri, stop_signal)
    display.close()
    if run["status"] != "finished":
        return None
    facts = {"trials": len(rows), "trial_epochs_saved": epochs_saved(rows, epochs), "best_trial": best["trial"]}
    facts |= {BEST: best[BEST], "model_uri": run["model_uri"], "test": run["test"], "reason": reason}
    sent = run.get("delivered", True)
    if settings.run.register and sent:
        facts["registered"] = register(uri, settings.run.register, run["mlflow_run_id"], display)
    sweep.write_summary(status="finished", extending=False, ended=milliseconds(), delivered=False, **facts)
    report(runs.own, sweep.folder, rows, epochs, sweep.summary)
    sweep.write_summary(delivered=runs.finish(until=stop_signal) and sent)
    if not sweep.summary["delivered"]:
        model = " and registers the model" if settings.run.register and not sent else ""
        display.say(f"{NOT_ALL_SENT} The same command sends the rest{model}.", "yellow")
    show(sweep, rows, shared.classes, display)
    return sweep.summary


def send_missing(sweep: Sweep, ledger: Ledger, display: Display) -> None:
    """Send what MLflow lacks of a finished sweep.

    Raises:
        InputError: MLflow can never be used.
        RunFailed: it has not accepted everything.
    """
    runs, summary = SweepRuns(sweep, ledger, display.say), sweep.summary
    base = sweep.base(summary["prepared"], without_secrets(runs.own.uri))
    rows = rank(ledger)
    run = Run.load(rows[0]["trial"], _settings_of(rows[0], base, runs.own.uri))
    runs.check()
    try:
        display.waiting(f"sending {sweep.name} to MLflow")
        runs.begin(base)
        runs.deliver()
        if runs.own.run_id is not None:  # else MLflow is away
            if not run.summary.get("delivered", True):
                with run.locked():
                    send_later(run, display)
            report(runs.own, sweep.folder, rank(ledger), sweep.settings.epochs, summary)
            sweep.write_summary(delivered=runs.finish(), model_uri=run.summary["model_uri"])
    finally:
        runs.close()
        display.close()
    if not summary["delivered"]:
        reason = f" ({runs.own.reason})" if runs.own.reason else ""
        raise RunFailed(f"{NOT_ALL_SENT} The same command tries again{reason}.")
    display.say(f"MLflow at {without_secrets(runs.own.uri)} has all of the sweep {sweep.name}.")


def show(sweep: Sweep, rows: list[dict], classes: Classes, display: Display) -> None:
    """The ranked table, the best trial's test score, and the commands that follow."""
    settings, summary, folder, name = sweep.settings, sweep.summary, sweep.folder, sweep.name
    epochs = settings.epochs
    width, title = display.console.width, "Trials, best first"
    display.console.print(trial_table(rows, lambda row: f"{row['epochs']}/{epochs}", classes, width, title))
    if summary.get("test"):
        title = f"Test split, {summary['best_trial']}"
        display.console.print(score_table(title, summary["test"]))
    saved, total = summary["trial_epochs_saved"], len(rows) * epochs
    lines = [
        ("best", f"{summary['best_trial']}, val mean IoU {rows[0][BEST]:.4f} at epoch {rows[0][BEST_EPOCH]}"),
        ("saved", f"{saved} of {total} trial-epochs by pruning"),
        ("files", f"{folder}/: sweep.csv, trials.jsonl, pictures"),
        (
            "train it",
            f"{called('train')} --config {shlex.quote(folder.typed('best_config.yaml'))} --epochs {3 * epochs}"
            f"{where(settings.run)}",
        ),
        ("more trials", f"{called('tune')} --resume {name} --extend 10{where(settings.run)}"),
    ]
    if summary.get("model_uri"):
        lines.insert(1, ("model", summary["model_uri"]))
    if summary.get("registered"):
        lines.insert(2, ("registered", summary["registered"]))
    if settings.sweep.search == "grid":
        lines.pop()
    display.table(f"Sweep {name} is finished", lines)
