"""A sweep: Ray Tune over a space of settings, every trial a training as `jobs/train.py` does it.

Trials run through Ray Train, stop early under ASHA on val mean IoU an epoch, and are child runs of the sweep's
MLflow run.
"""

import csv
import difflib
import io
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from rich.table import Table

import unet.data.prepare as preparing
from unet.classes import CLASSES
from unet.config import SweepSettings, TrainSettings, TuneSettings, flat, load_yaml, unflat
from unet.errors import InputError, RunFailed
from unet.session import ray_session
from unet.storage import Folder
from unet.terminal import Display
from unet.tracking import Tracker, check_server, without_password
from unet.training import resources

SCORE = "val_mean_iou"
SPACES = Path(__file__).resolve().parent.parent / "tune_spaces"
DRAWS = {"uniform": tune.uniform, "loguniform": tune.loguniform, "choice": tune.choice, "randint": tune.randint}


def load_space(name: str, settings: TrainSettings) -> tuple[dict[str, Any], TrainSettings]:
    """The draws of a space by setting, of `tune_spaces/NAME.yaml` or of a file, and the largest trial it can draw.

    Raises:
        InputError: there is no such space, or it names an unknown setting, draw or value (with the nearest known).
    """
    known = {path.stem: path for path in SPACES.glob("*.yaml")}
    path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None:
        raise InputError(f"There is no space {name!r}: known are {', '.join(sorted(known))}, or give a YAML file.")
    space, largest = {}, {k: v for k, v in flat(settings).items() if k != "config"}
    for setting, draw in load_yaml(path).items():
        if not isinstance(draw, dict) or len(draw) != 1:
            raise InputError(f"{path}: {setting} needs one draw, such as {{uniform: [0.0, 0.5]}}.")
        ((kind, values),) = draw.items()
        if kind not in DRAWS:
            near = difflib.get_close_matches(kind, DRAWS, n=1) or sorted(DRAWS)
            raise InputError(f"{path}: unknown draw {kind!r} for {setting}; did you mean {near[0]}?")
        try:
            if kind != "choice":
                low, high = values
                values = [int(low), int(high)] if kind == "randint" else [float(low), float(high)]
            values = list(values)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{path}: {setting} needs {kind}: [{'low, high' if kind != 'choice' else 'a, b, …'}]."
            ) from error
        for value in values:  # the ends of a range, or every choice
            unflat(type(settings), largest | {setting: value}, str(path))
        if setting == "base_filters":
            largest |= {setting: max(values)}
        space[setting] = DRAWS[kind](values) if kind == "choice" else DRAWS[kind](*values)
    return space, unflat(type(settings), largest)


def sweep(settings: TuneSettings, display: Display) -> dict:
    """Run a sweep to its end; the content of its `summary.json`.

    Raises:
        InputError: before anything started.
        RunFailed: no trial came to a score.
    """
    space, largest = load_space(settings.sweep.space, settings)
    storage = Folder(settings.run.storage_path)
    resources.check_writable(storage)
    preparing.check_source(settings.data.data)
    check_server(settings.run.tracking_uri)
    name = settings.run.run_name or time.strftime("sweep-%Y%m%d-%H%M%S")
    folder = storage / name
    if folder.exists("summary.json"):
        raise InputError(f"There is a sweep {name} already under {storage}: give another --run-name.")
    prepared = preparing.resolve(settings.data.data, settings.data.image_size, storage, display.preparing)
    display.close()
    nodes = resources.cluster_nodes()
    together = max(1, int(sum(n.cpus for n in nodes)) // settings.compute.num_workers)
    together = min(together, settings.sweep.num_samples)
    plan = resources.plan(largest, nodes, prepared.bytes_in_memory("train"), together)

    tracker = Tracker(storage, settings.run.experiment, settings.run.tracking_uri)
    params = flat(settings) | {"run_name": name, "tracking_uri": without_password(tracker.uri)}
    parent = tracker.start(name, None, params, {"kind": "sweep"})
    base = flat(settings) | {
        "data": prepared.folder.uri,
        "storage_path": folder.uri,
        "tracking_uri": tracker.uri,
        "run_name": None,
        "config": None,
        "resume": None,
    }
    base = {k: v for k, v in base.items() if k not in SweepSettings.model_fields}
    display.table(
        f"Sweep {name}",
        [
            ("space", ", ".join(f"{k} {v.domain_str if hasattr(v, 'domain_str') else v}" for k, v in space.items())),
            ("trials", f"{settings.sweep.num_samples}, {together} at a time, up to {settings.training.epochs} epochs"),
            ("workers", f"{settings.compute.num_workers} a trial x {plan.cpus_per_worker:g} CPUs"),
            ("results", str(folder)),
        ],
    )
    # Ctrl-C reaches us, not Tune, which would end the sweep as if it were finished.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    scratch = tempfile.mkdtemp(prefix="unet-sweep-")
    try:
        outcome = _tune(settings, space, base, parent, together, scratch, display)
    except BaseException as error:
        tracker.status("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _conclude(name, folder, base, outcome, tracker, display)


def _tune(settings: TuneSettings, space: dict, base: dict, parent: str, together: int, scratch: str, display: Display):
    scheduler = tune.schedulers.ASHAScheduler(time_attr="epoch", grace_period=1, max_t=settings.training.epochs)
    tuner = tune.Tuner(
        # Nothing reserved for the trial itself: it only waits for its workers.
        tune.with_resources(_trial, {"CPU": 0.001}),
        param_space={"draw": space, "base": base, "parent": parent, "together": together},
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode="max",
            num_samples=settings.sweep.num_samples,
            max_concurrent_trials=together,
            scheduler=scheduler if settings.sweep.scheduler == "asha" else None,
            search_alg=tune.search.BasicVariantGenerator(random_state=settings.training.seed, max_concurrent=together),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=scratch, verbose=0, callbacks=[_Lines(display, settings.training.epochs)]
        ),
    )
    return tuner.fit()


def _trial(config: dict) -> None:
    """One trial, in an actor of Tune: a training that reports every epoch."""
    from ray.tune.integration.ray_train import TuneReportCallback

    from unet.training.driver import train
    from unet.training.run import open_run

    with ray_session():
        values = config["base"] | config["draw"] | {"run_name": _run_name(tune.get_context().get_trial_id())}
        train(
            open_run(unflat(TrainSettings, values)),
            parent_run_id=config["parent"],
            callbacks=(TuneReportCallback(),),
            as_trial=True,
            together=config["together"],
        )


def _run_name(trial_id: str) -> str:
    return f"trial-{trial_id.rpartition('_')[2]}"


class _Lines(tune.Callback):
    """A line for every trial's end, and none in between."""

    def __init__(self, display: Display, epochs: int):
        self._display, self._epochs = display, epochs

    def __getstate__(self):
        return {}  # Tune pickles its callbacks for a restore, which a terminal has no part in

    def on_trial_start(self, iteration, trials, trial, **info):
        self._display.say(f"{_run_name(trial.trial_id)} starts  {_drawn(trial.config['draw'])}", "dim")

    def on_trial_complete(self, iteration, trials, trial, **info):
        result = trial.last_result or {}
        epoch, score = result.get("epoch", 0), result.get("best_val_mean_iou")
        end = "pruned" if epoch < self._epochs else "finished"
        shown = "–" if score is None else f"{score:.4f}"
        self._display.say(f"{_run_name(trial.trial_id)} {end} at epoch {epoch}, best mean IoU {shown}")

    def on_trial_error(self, iteration, trials, trial, **info):
        self._display.say(f"{_run_name(trial.trial_id)} failed", "red")


def _conclude(name: str, folder: Folder, base: dict, outcome, tracker: Tracker, display: Display) -> dict:
    """Rank the trials, close their runs, and write the sweep's files."""
    rows = []
    for result in outcome:
        metrics = result.metrics or {}
        trial = _run_name(Path(result.path).name)
        run = folder / trial
        summary = json.loads(run.read_text("summary.json")) if run.exists("summary.json") else {}
        epochs = metrics.get("epoch", 0)
        end = "failed" if result.error else "pruned" if epochs < base["epochs"] else "finished"
        row = {"trial": trial, "end": end, "epochs": epochs, **result.config["draw"]}
        row |= {"best_val_mean_iou": metrics.get("best_val_mean_iou"), "best_epoch": metrics.get("best_epoch")}
        row |= {f"val_iou_{c.name}": metrics.get(f"val_iou_{c.name}") for c in CLASSES}
        rows.append(row | {"mlflow_run_id": summary.get("mlflow_run_id")})
        if summary.get("mlflow_run_id"):
            child = tracker.of_run(summary["mlflow_run_id"])
            child.tags({"end": end, "status": end})
            child.status("failed" if end == "failed" else "finished")
    rows.sort(key=lambda r: -(r["best_val_mean_iou"] if r["best_val_mean_iou"] is not None else -1))
    best = rows[0]
    epochs_saved = sum(base["epochs"] - r["epochs"] for r in rows if r["end"] == "pruned")
    summary = {"sweep": name, "trials": len(rows), "trial_epochs_saved": epochs_saved, "mlflow_run_id": tracker.run_id}
    folder.write_text("trials.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    folder.write_text("sweep.csv", table.getvalue())
    scored = best["best_val_mean_iou"] is not None
    if scored:
        result = next(r for r in outcome if _run_name(Path(r.path).name) == best["trial"])
        left_out = ("storage_path", "tracking_uri", "run_name", "resume", "config", "debug")
        settings = {k: v for k, v in (base | result.config["draw"]).items() if k not in left_out}
        folder.write_text("best_config.yaml", yaml.safe_dump(settings, sort_keys=False))
        summary |= {"best_trial": best["trial"], "best_val_mean_iou": best["best_val_mean_iou"]}
        tracker.metrics({"best_val_mean_iou": best["best_val_mean_iou"]}, 0, int(time.time() * 1000))
    status = "finished" if scored else "failed"
    folder.write_text("summary.json", json.dumps(summary | {"status": status}, indent=2))
    files = [f for f in ("trials.jsonl", "sweep.csv", "best_config.yaml", "summary.json") if folder.exists(f)]
    tracker.artifacts("", {f: folder.read_bytes(f) for f in files})
    tracker.status(status)
    if not scored:
        raise RunFailed(f"No trial came to a score: see {folder}, or run one with `jobs/train.py`.")
    display.console.print(_ranking(rows))
    display.table(
        f"{epochs_saved} of {len(rows) * base['epochs']} trial-epochs saved by pruning",
        [("train it", f"python jobs/train.py --config {folder}/best_config.yaml")],
    )
    return summary


def _ranking(rows: list[dict]) -> Table:
    shown = [k for k in rows[0] if k not in ("mlflow_run_id", "best_epoch")]
    table = Table(title="Trials, best first", title_justify="left")
    for key in shown:
        title = key.replace("best_val_mean_iou", "mean IoU").replace("val_iou_", "").replace("_", " ")
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        values = map(row.get, shown)
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else "–" if v is None else str(v) for v in values))
    return table


def _drawn(values: dict) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
