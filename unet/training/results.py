"""What a finished run leaves: scores, pictures, the best checkpoint and the packaged model, here and in MLflow."""

import io
import shlex
import tempfile
import time
from pathlib import Path

import numpy as np

from unet import report
from unet.classes import Classes
from unet.metrics import flat as flat_metrics
from unet.terminal import Display
from unet.tracking import Tracker, without_password
from unet.training.checkpoint import State
from unet.training.run import SUMMARY, Run, where


def finish(run: Run, tracker: Tracker, facts: dict, tags: dict[str, str]) -> bool:
    """Mark the run finished; whether MLflow has taken everything."""
    run.write_summary(status="finished", **facts)
    tracker.tags(tags | {"best_checkpoint": facts["best_checkpoint"], "status": "finished"})
    tracker.artifacts("", {SUMMARY: run.folder.read_bytes(SUMMARY)})
    tracker.status("finished")
    return tracker.deliver()


def keep(
    run: Run,
    state: State,
    history: list[dict],
    test: dict,
    gallery: dict,
    package: dict[str, bytes],
    tracker: Tracker,
) -> dict[str, str]:
    """Write and send the scores of test, the pictures, the best checkpoint and its packaged model.

    Returns:
        `model_uri` of the packaged model.
    """
    tracker.metrics(flat_metrics("test", test), state.epoch - 1, int(time.time() * 1000))
    figures = draw(history, test, gallery, state.class_infos)
    for name, content in figures.items():
        run.write(name, content)
    tracker.artifacts("", figures)
    best = run.checkpoints.folder / state.best_checkpoint
    tracker.artifacts("best_checkpoint", {name: best.read_bytes(name) for name in best.names()})
    tracker.artifacts("model", package)
    return {"model_uri": f"runs:/{tracker.run_id}/model"}


def draw(history: list[dict], test: dict, gallery: dict, classes: Classes) -> dict[str, bytes]:
    """PNG pictures by file name, and the gallery's arrays as NPZ."""
    g = gallery
    pictures = {
        "training_curves.png": lambda path: report.training_curves(history, classes, path),
        "confusion_test.png": lambda path: report.confusion_picture(np.array(test["confusion"]), classes, path),
        "gallery.png": lambda path: report.gallery(g["images"], g["truth"], g["predicted"], g["names"], classes, path),
    }
    arrays = io.BytesIO()
    np.savez_compressed(arrays, **(gallery | {"names": np.array(gallery["names"])}))
    files = {"gallery.npz": arrays.getvalue()}
    with tempfile.TemporaryDirectory() as scratch:
        for name, picture in pictures.items():
            picture(Path(scratch) / name)
            files[name] = (Path(scratch) / name).read_bytes()
    return files


def show(run: Run, tracker: Tracker, display: Display) -> None:
    """The table of scores and the commands to look, evaluate and continue."""
    summary, settings = run.summary, run.settings
    display.console.print(report.score_table("Test split, best epoch's weights", summary["test"]))
    more, data, uri = settings.training.epochs + 10, shlex.quote(settings.data.data), without_password(tracker.uri)
    look = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
    patience = settings.training.patience
    if patience is not None and patience <= run.checkpoints.latest()[1].stale_epochs:
        more = f"{more} --patience {patience + 5}"
    display.table(
        f"Run {run.name} is finished",
        [
            ("best", f"epoch {summary['best_epoch']}, {run.folder}/{summary['best_checkpoint']}"),
            ("model", summary["model_uri"]),
            ("look", look),
            (
                "evaluate",
                f"python jobs/evaluate.py --model {run.name} --data {data}{where(run.settings.run, tracking=False)}",
            ),
            ("continue", f"python jobs/train.py --resume {run.name} --epochs {more}{where(run.settings.run)}"),
        ],
    )
