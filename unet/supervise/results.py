"""What a run leaves in its folder: pictures and the packaged model; and what it says in the terminal at its end."""

import io
import shlex
import tempfile
from collections.abc import Callable
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
from unet.runs.run import MODEL, Run, where
from unet.runs.state import State
from unet.supervise.board import Board
from unet.terminal import Display, score_table
from unet.tracking.reach import page, ranking
from unet.tracking.writer import AsyncWriter

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
    """Photos of an epoch as `unet.training.shown` gives them, by name: outlined, left the truth, right the model's."""
    found = {}
    for name, image, *masks in zip(*(content[key] for key in ("names", "images", "truth", "predicted")), strict=True):
        times = max(1, SHOWN_SIDE // len(image))
        shape = (times * image.shape[0], times * image.shape[1])
        photo = Image.fromarray(image).resize(shape[::-1], Image.Resampling.BICUBIC)
        both = Image.new("RGB", (2 * shape[1] + 8, shape[0]), "white")
        for place, mask in enumerate(masks):
            lines = outlines(mask, classes, shape).convert("RGBA")
            both.paste(Image.alpha_composite(photo.convert("RGBA"), lines).convert("RGB"), (place * (shape[1] + 8), 0))
        found[name] = both
    return found


def _png(picture: Callable[[Path], object]) -> bytes:
    """What `picture` writes to a file."""
    with tempfile.TemporaryDirectory() as scratch:
        picture(Path(scratch) / "picture.png")
        return (Path(scratch) / "picture.png").read_bytes()


def _where_to_look(to: AsyncWriter) -> list[tuple[str, str]]:
    """What shows the run in MLflow, and the runs of its experiment beside each other."""
    first = [] if to.uri.startswith("http") else [("look", f"mlflow ui --backend-store-uri {shlex.quote(to.uri)}")]
    if to.run_id is None or to.experiment_id is None:
        return first
    pages = [page(to.uri, to.experiment_id, to.run_id), ranking(to.uri, to.experiment_id, BEST)]
    return [*first, ("", pages[0]) if first else ("look", pages[0]), ("ranking", pages[1])]


def show(run: Run, to: AsyncWriter, display: Display) -> None:
    """The table of scores and the commands to look, evaluate and continue."""
    summary, settings = run.summary, run.settings
    scored = summary["best_epoch"] is not None
    kind, reason = ("best", f"epoch {summary['best_epoch']}") if scored else ("last", "no epoch has a score")
    display.console.print(score_table(f"Test split, {kind} epoch's weights", summary["test"]))
    more_of, data = more(settings, settings.epochs or 0), shlex.quote(settings.data.data)
    board = (
        [("TensorBoard", f"tensorboard --logdir {shlex.quote(str(run.folder))}")] if settings.run.tensorboard else []
    )
    patience, latest = settings.training.patience, run.checkpoints.latest()
    if patience is not None and latest and patience <= latest[1].stale_epochs:
        more_of = f"{more_of} --patience {patience + 5}"
    display.table(
        f"Run {run.name} is finished",
        [
            (kind, f"{reason}, {run.folder}/{summary['best_checkpoint']}"),
            ("model", summary["model_uri"] or f"{run.folder}/{MODEL}"),
            *_where_to_look(to),
            *board,
            (
                "evaluate",
                f"python jobs/evaluate.py --model {run.name} --data {data}{where(run.settings.run, tracking=False)}",
            ),
            ("continue", f"python jobs/train.py --resume {run.name} {more_of}{where(run.settings.run)}"),
        ],
    )
