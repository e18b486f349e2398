"""A model over photos: which are left to predict, and what became of each."""

import hashlib
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray

from unet.cluster.demand import Needs, when_grown
from unet.cluster.placement import Placement, in_words
from unet.cluster.planner import plan_prediction
from unet.cluster.room import take
from unet.cluster.session import cause_of
from unet.config import PredictSettings
from unet.data.sources import printable
from unet.data.sources.description import DESCRIPTION, described
from unet.disk import at_the_door, check_writable
from unet.errors import InputError, RunFailed, first_line, own_words
from unet.models.trained import TrainedModel
from unet.pages.numbers import duration
from unet.prediction.photos import Photos, find_photos, output_names
from unet.prediction.results import KINDS, Results, locked, refuse_others, row_schema
from unet.prediction.stages import Work
from unet.prediction.stream import TASK_CPUS, predicted
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.terminal import Display

SHOWN_PROBLEMS = 20
"""Lines about bad photos: more would push everything else off the screen; `predictions.csv` has them all."""


@dataclass(frozen=True)
class Summary:
    """What became of the photos.

    Attributes:
        done: number predicted now.
        before: number predicted by an earlier start.
        bad: number that could not be used.
        speed: photos/s from the end of the first group to the last; None if there was only one.
        startup: seconds until the first group was done.
    """

    done: int
    before: int
    bad: int
    speed: float | None = None
    startup: float = 0.0


def predict(settings: PredictSettings, photos: Photos, display: Display) -> Summary:
    """Predict the photos that are not predicted yet. Ray must be connected.

    Raises:
        InputError: there is no such model, the output holds something else, or the cluster has no room.
        RunFailed: a task failed; what is done is kept.
    """
    output, store = Folder(settings.predict.folder), settings.store
    trained = TrainedModel.find(settings.predict.model, Folder(store.storage_path), store.tracking_uri)
    job = job_of(settings, trained)
    refuse_others(output, job)
    with locked(output):
        results = Results.open(output, job, trained.class_names)
        todo, before = _todo(photos, results)
        _say(display, settings, trained, photos, before)
        try:
            bad, speed, startup = _run(settings, trained, photos, results, todo, display)
        except BaseException:
            results.catch_up()
            raise
        finally:
            results.save()
        results.merge()
        if settings.predict.as_dataset:
            output.write_text(DESCRIPTION, described(trained.classes))
    return Summary(len(todo) + len(photos.unnamed) - bad, before, bad, speed, startup)


@at_the_door()
def photos_of(settings: PredictSettings) -> Photos:
    """The photos that are asked for, once the settings are checked.

    Raises:
        InputError: there are none, or nothing can be written to the output.
    """
    part = settings.predict
    if not part.folder:
        raise InputError("Say where predictions go: --output FOLDER, or s3://bucket/prefix.")
    output = Folder(part.folder)
    check_writable(output, "--as-dataset" if part.as_dataset else "--output")
    if part.as_dataset and output.exists(DESCRIPTION):
        raise InputError(
            f"{output} is a data set already, whose masks may have been corrected since: give another --as-dataset, or "
            "train on it (`jobs/train.py --data`)."
        )
    photos = find_photos(part.input, output)
    if photos.folder.uri.rstrip("/") == output.uri.rstrip("/"):
        raise InputError(f"{output} holds the photos: give another --output, such as a folder in it.")
    return photos


def job_of(settings: PredictSettings, trained: TrainedModel) -> dict:
    """Describes the predictions: those of another model, input or form do not go into the same folder."""
    weights = hashlib.sha256()
    for array in trained.weights.values():
        weights.update(np.ascontiguousarray(array).data)
    about = {key: value for key, value in trained.about.items() if key != "val_mean_iou"}
    part = settings.predict
    options = {key: getattr(part, key) for key in ("tile", "tta", "probabilities", "overlays")}
    options |= {"as_dataset": True, "least_confidence": part.least_confidence} if part.as_dataset else {}
    source = without_secrets(part.input).partition("?")[0] if "://" in part.input else part.input
    return {"input": source, "weights": weights.hexdigest()[:16]} | about | options


def _todo(photos: Photos, results: Results) -> tuple[pa.Table, int]:
    """The photos left to predict, with the `name` of their files; and how many are done already.

    A bad photo is tried again: it may have been repaired.
    """
    table, whole = photos.table, results.whole()
    known = zip(results.rows["file"].to_pylist(), results.rows["name"].to_pylist(), strict=True)
    files, *stamps = (table[name].to_pylist() for name in ("file", "size", "mtime_ns"))
    names = output_names(files, {file: name for file, name in known if name})
    new = [whole.get(file) != stamp for file, stamp in zip(files, zip(*stamps, strict=True), strict=True)]
    table = table.append_column("name", pa.array([names[file] for file in files], pa.string()))
    return table.filter(pa.array(new, pa.bool_())), len(new) - sum(new)


def _run(
    settings: PredictSettings,
    trained: TrainedModel,
    photos: Photos,
    results: Results,
    todo: pa.Table,
    display: Display,
) -> tuple[int, float | None, float]:
    """Predict the photos in `todo`: (bad photos, photos/s, seconds until the first were done)."""
    bad = _report(display, _unnamed(photos, len(trained.classes), results), 0)
    if not len(todo):
        return bad, None, 0.0
    part, begun = settings.predict, time.monotonic()
    work = Work(
        photos=photos.folder.uri,
        output=results.folder.uri,
        image_size=trained.image_size,
        resize=trained.resize,
        classes=trained.classes,
        tile=part.tile,
        overlays=part.overlays,
        probabilities=part.probabilities,
        photos_too=bool(part.as_dataset),
        least_confidence=part.least_confidence,
        first_part=results.next_part,
    )

    def now() -> Placement:
        return take(lambda nodes: plan_prediction(nodes, part.num_workers, part.device), beside=TASK_CPUS)

    needs = Needs(part.num_workers or 1, gpu=part.device == "gpu", beside=TASK_CPUS)
    workers = when_grown(now, needs, display.waiting_for_others)
    if workers.why_cpus:
        display.say(f"On {in_words(workers.use_gpu, workers.why_cpus)}.")
    display.waiting(f"starting {workers.num_workers} × TensorFlow")
    first = done = 0
    first_at = last_at = begun
    try:
        for rows in predicted(todo, work, trained, workers, part, settings.command.debug):
            results.add(rows)
            bad = _report(display, rows, bad)
            done, last_at = done + len(rows), time.monotonic()
            if not first:
                first, first_at = done, last_at
            speed = (done - first) / (last_at - first_at) if done > first else None
            pace = f" · {speed:.1f} images/s · {duration((len(todo) - done) / speed)} left" if speed else ""
            display.waiting(f"{done:,}/{len(todo):,} photos{pace}")
    except ray.exceptions.RayError as error:
        reason = (own_words(str(error)) or first_line(cause_of(error))).rstrip(".")
        raise RunFailed(f"Predicting failed: {reason}. The same command continues from here.") from error
    if done != len(todo):
        raise RunFailed(f"Only {done:,} of {len(todo):,} photos were predicted: the same command predicts the rest.")
    return bad, speed, first_at - begun


def _unnamed(photos: Photos, classes: int, results: Results) -> pa.Table:
    """The rows of photos whose names cannot be used; they are added to `results`."""
    words = {"problem": "unsafe_name", "detail": "its name cannot be written: rename it"}
    nothing = {"pixels": [0] * classes, "written": [0] * len(KINDS)}
    rows = [{"file": name} | words | nothing for name in photos.unnamed]
    table = pa.Table.from_pylist(rows, row_schema(classes))
    results.add(table)
    return table


def _report(display: Display, rows: pa.Table, bad: int) -> int:
    """Say what is wrong with the bad photos of a group, after `bad` earlier ones; returns how many there are now."""
    columns = (rows[name].to_pylist() for name in ("file", "problem", "detail"))
    for file, problem, detail in zip(*columns, strict=True):
        if problem:
            bad += 1
            if bad <= SHOWN_PROBLEMS:
                display.say(f"  skipped {printable(file)}: {printable(detail)}", "red")
            elif bad == SHOWN_PROBLEMS + 1:
                display.say("  and more: predictions.csv lists them all", "red")
    return bad


def _say(display: Display, settings: PredictSettings, trained: TrainedModel, photos: Photos, before: int) -> None:
    part = settings.predict
    held = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in photos.others.most_common(4))
    known = f", {before:,} of them done already" if before else ""
    ways = [words for words, given in (("tiles", part.tile), ("mirrored too", part.tta)) if given]
    rows = [
        ("model", f"{trained.run_name}, {trained.checkpoint}: {', '.join(trained.class_names)}"),
        ("photos", f"{len(photos):,} in {photos.folder}{known}"),
        *([("left out", f"not pictures by their names: {held}")] if held else []),
        ("input", " + ".join([f"{trained.image_size} px, {trained.resize}", *ways])),
    ]
    display.table("Predicting", rows)
