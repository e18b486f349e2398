"""What a run leaves in its folder: pictures and the packaged model; and what it says in the terminal at its end."""

import io
import shlex
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from unet import metric_names
from unet.classes import Classes
from unet.config import TrainSettings
from unet.metric_names import BEST
from unet.pages import figures
from unet.pages.pictures import outlines
from unet.recipe.augment import AugmentSettings
from unet.runs.run import MODEL, Run, called, where
from unet.runs.state import State
from unet.secrets import without_credentials
from unet.storage import Folder
from unet.supervise.board import Board
from unet.terminal import Display, score_table
from unet.tracking.reach import default_uri, page, ranking

SHOWN_SIDE = 256
"""Pixels of a side that a photo of an epoch is enlarged to."""
AUGMENTED = "augmented.png"
"""Of a run that varies its training samples: what its network sees."""


@dataclass(frozen=True)
class Results:
    """What the workers hand over at the end of a training (`unet.training.finish`).

    Attributes:
        test: scores of the test split.
        tested: when, in milliseconds since 1970.
        gallery: photos of validation with their truth and predictions, as arrays.
        package: the files of the packaged model.
    """

    test: dict
    tested: int
    gallery: dict
    package: dict[str, bytes]


def keep(run: Run, state: State, history: list[dict], results: Results, board: Board) -> None:
    """Write the pictures and the packaged model; the board gets the pictures and the test scores."""
    place = history[-1]["epoch"], results.tested
    board.scores(metric_names.of("test", results.test), *place)
    for name, content in draw(history, results.test, results.gallery, state.class_infos).items():
        run.write(name, content)
        if name.endswith(".png"):
            board.picture(name.removesuffix(".png"), name, *place)
    run.folder.commit(MODEL, results.package)


def more(settings: TrainSettings, epochs: int) -> str:
    """The flag with which a run that has ended, after so many epochs, goes on."""
    minutes = settings.length.minutes
    if minutes is None or (settings.epochs is not None and epochs >= settings.epochs):
        return f"--epochs {epochs + 10}"
    return f"--minutes {2 * minutes:g}"


def draw(history: list[dict], test: dict, gallery: dict, classes: Classes) -> dict[str, bytes]:
    """PNG pictures by file name, and the gallery's arrays as NPZ."""
    g = gallery
    pictures = {
        "training_curves.png": lambda path: figures.training_curves(history, classes, path),
        "confusion_test.png": lambda path: figures.confusion_picture(np.array(test["confusion"]), classes, path),
        "gallery.png": lambda path: figures.gallery(g["images"], g["truth"], g["predicted"], g["names"], classes, path),
    }
    arrays = io.BytesIO()
    np.savez_compressed(arrays, **(gallery | {"names": np.array(gallery["names"])}))
    return {"gallery.npz": arrays.getvalue()} | {name: _png(picture) for name, picture in pictures.items()}


def draw_augmented(samples: dict, settings: AugmentSettings, classes: Classes) -> bytes:
    """A PNG picture of training samples as `unet.training.begin` gives them."""
    strength = f"strength {settings.augment:g} ({settings.augment_with})" if settings.augment else "mirrored"
    title = f"Training samples as the network sees them: {strength}, {settings.mix:.0%} mixed"
    parts = samples["images"], samples["masks"], samples["names"]
    return _png(lambda path: figures.samples(*parts, classes, title, path))


def draw_shown(content: dict, classes: Classes) -> dict[str, Image.Image]:
    """Photos of an epoch as `unet.training.shown` gives them, by name: outlined, left the truth, right the model's.

    Without what a model says (None) the right one is bare.
    """
    found = {}
    for name, image, *masks in zip(*(content[key] for key in ("names", "images", "truth", "predicted")), strict=True):
        times = max(1, SHOWN_SIDE // len(image))
        shape = (times * image.shape[0], times * image.shape[1])
        photo = Image.fromarray(image).resize(shape[::-1], Image.Resampling.BICUBIC)
        both = Image.new("RGB", (2 * shape[1] + 8, shape[0]), "white")
        for place, mask in enumerate(masks):
            shown = photo
            if mask is not None:
                lines = outlines(mask, classes, shape).convert("RGBA")
                shown = Image.alpha_composite(photo.convert("RGBA"), lines).convert("RGB")
            both.paste(shown, (place * (shape[1] + 8), 0))
        found[name] = both
    return found


def _png(picture: Callable[[Path], object]) -> bytes:
    """What `picture` writes to a file."""
    with tempfile.TemporaryDirectory() as scratch:
        picture(Path(scratch) / "picture.png")
        return (Path(scratch) / "picture.png").read_bytes()


def _where_to_look(run: Run) -> list[tuple[str, str]]:
    """What shows the run in TensorBoard and MLflow, and the runs of its experiment beside each other."""
    part, summary = run.settings.run, run.summary
    uri = part.tracking_uri or default_uri(Folder(part.storage_path))
    found = [] if uri.startswith("http") else [("look", f"mlflow ui --backend-store-uri {shlex.quote(uri)}")]
    if experiment := summary.get("mlflow_experiment_id"):
        found.append(("" if found else "look", page(uri, experiment, summary["mlflow_run_id"])))
        found.append(("ranking", ranking(uri, experiment, BEST)))
    board = ("TensorBoard", f"tensorboard --logdir {shlex.quote(str(run.folder))}")
    return [*found, board] if part.tensorboard else found


def show_scores(run: Run, display: Display) -> None:
    """The table of the test split's scores."""
    kind, _ = _chosen(run)
    display.console.print(score_table(f"Test split, {kind} epoch's weights", run.summary["test"]))


def _chosen(run: Run) -> tuple[str, str]:
    """Which epoch's weights a finished run means, and why."""
    best = run.summary["best_epoch"]
    return ("last", "no epoch has a score") if best is None else ("best", f"epoch {best}")


def show(run: Run, display: Display, made: Mapping[str, str]) -> None:
    """Where everything of a finished run is, and the commands to look, evaluate and continue.

    `made` is what was made of it, and where that is.
    """
    summary, settings = run.summary, run.settings
    kind, reason = _chosen(run)
    more_of, data = more(settings, settings.epochs or 0), shlex.quote(without_credentials(settings.data.data))
    patience, latest = settings.training.patience, run.checkpoints.latest()
    if patience is not None and latest and patience <= latest[1].stale_epochs:
        more_of = f"{more_of} --patience {patience + 5}"
    display.table(
        f"Run {run.name} is finished",
        [
            (kind, f"{reason}, {run.folder}/{summary['best_checkpoint']}"),
            ("model", summary["model_uri"] or f"{run.folder}/{MODEL}"),
            *made.items(),
            *_where_to_look(run),
            (
                "evaluate",
                f"{called('evaluate')} --model {run.name} --data {data}{where(run.settings.run, tracking=False)}",
            ),
            ("continue", f"{called('train')} --resume {run.name} {more_of}{where(run.settings.run)}"),
        ],
    )
