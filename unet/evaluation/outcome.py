"""Where the results of an evaluation go: a folder, and the model's MLflow run."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq

from unet.config import CONFIG, EvaluateSettings, read_config
from unet.errors import InputError, first_line
from unet.evaluation.page import evaluation_page
from unet.evaluation.run import Evaluation
from unet.secrets import lost, without_secrets
from unet.storage import Folder
from unet.terminal import Display
from unet.trained import best_checkpoint
from unet.training.run import read_history

METRICS, RECORDS, PAGE = "metrics.json", "per_image.parquet", "report.html"
PLACE = "evaluations"


def keep(done: Evaluation, settings: EvaluateSettings, display: Display, alone: bool) -> None:
    """Write the results, log them unless the settings say otherwise, and say where they are.

    Raises:
        StorageFailed: they cannot be written.
    """
    folder = place_of(done, settings, alone)
    display.waiting("drawing report.html")
    files = write(done, folder)
    display.close()
    display.say(f"Written: {folder}/: {', '.join(files)}")
    if settings.evaluate.track:
        track(done, folder, files, settings, display)


def place_of(done: Evaluation, settings: EvaluateSettings, alone: bool) -> Folder:
    """The folder for an evaluation: `--output`, with a folder for each of several models; else the run's own.

    There the run's best checkpoint has `evaluations/<part_of>`, another one its name behind it. A model of MLflow has a
    folder of its name under the storage path.
    """
    part, model = settings.evaluate, done.model
    name = re.sub(r"[^\w.@-]+", "-", done.label).strip("-.")
    if part.output:
        return Folder(part.output) if alone else Folder(part.output) / name
    if model.run is None:
        return Folder(settings.store.storage_path) / PLACE / name / part_of(done)
    return model.run / PLACE / (part_of(done) if is_best(done) else f"{part_of(done)}-{model.checkpoint}")


def part_of(done: Evaluation) -> str:
    """`test`; with the beginning of their digest where the data are not those of the training: `test-1a2b3c4d`."""
    digest = done.metrics["data_digest"]
    return done.split if digest == done.model.data_digest else f"{done.split}-{digest[:8]}"


def is_best(done: Evaluation) -> bool:
    """Whether the model is what its run's name means; one out of MLflow is what its run holds."""
    if done.model.run is None:
        return True
    return best_checkpoint(done.model.run) == done.model.checkpoint


def write(done: Evaluation, folder: Folder) -> list[str]:
    """Write the results; the names of the files. What an earlier evaluation left there is written over.

    Raises:
        StorageFailed: they cannot be written.
    """
    content = pa.BufferOutputStream()
    pq.write_table(done.records, content, compression="zstd")
    folder.write_bytes(RECORDS, content.getvalue().to_pybytes())
    history = read_history(done.model.run) if done.model.run else []
    folder.write_text(PAGE, evaluation_page(done.metrics, done.records, done.prepared, done.split, history))
    folder.write_text(METRICS, json.dumps(done.metrics, indent=2, allow_nan=False))
    return [METRICS, RECORDS, PAGE]


def track(done: Evaluation, folder: Folder, files: list[str], settings: EvaluateSettings, display: Display) -> None:
    """Log scores and files to the model's MLflow run; where that cannot be done, a sentence says so."""
    model = done.model
    kept = f"the results are in {folder}"
    if not is_best(done):
        display.say(f"Not logged to MLflow, since {model.checkpoint} is not the best of {model.run_name}: {kept}.")
        return
    if model.mlflow_run_id is None:
        display.say(f"{done.label} has no MLflow run: {kept}.", "yellow")
        return
    storage = Folder(settings.store.storage_path)
    try:
        uri = settings.store.tracking_uri or _uri_of(model.run)
        _send(done, folder, files, storage, uri)
    except Exception as error:  # whatever the store's library raises: the results are there
        display.say(
            f"MLflow has not taken the evaluation ({without_secrets(first_line(error))[:200].rstrip('.')}): {kept}.",
            "yellow",
        )


def _uri_of(run: Folder | None) -> str | None:
    """Where the run is tracked, as its folder says; None for the default store."""
    uri = read_config(run).get("tracking_uri") if run and run.exists(CONFIG) else None
    if lost(uri):
        raise InputError("its tracking URI had a secret, which was not saved: give --tracking-uri")
    return uri


def _send(done: Evaluation, folder: Folder, files: list[str], storage: Folder, uri: str | None) -> None:
    from unet.tracking.store import Store, check_server

    check_server(uri)
    store = Store.of_existing(storage, done.model.mlflow_run_id, uri)
    store.latest(tracked_metrics(done))
    for name in files:
        store.file(folder, name, f"evaluation/{part_of(done)}")


def tracked_metrics(done: Evaluation) -> dict[str, float]:
    """The scores as MLflow has them: `eval_test_mean_iou`, its `_low` and `_high`, `eval_test_band_mean_iou`, …"""
    found = {}
    for part in ("", "band", "own_size"):
        scores = done.metrics.get(part) if part else done.metrics
        if scores is None:
            continue
        prefix = f"eval_{part_of(done)}_{part}_" if part else f"eval_{part_of(done)}_"
        spans = scores.get("intervals") or {}
        for key in ("mean_iou", "mean_dice", "accuracy"):
            found |= _with_span(prefix + key, scores[key], spans.get(key))
        for kind in ("iou", "dice"):
            for name, value in scores[kind].items():
                found |= _with_span(f"{prefix}{kind}_{name}", value, (spans.get(kind) or {}).get(name))
        if "loss" in scores:
            found[f"{prefix}loss"] = scores["loss"]
    return {name: value for name, value in found.items() if value is not None}


def _with_span(name: str, value: float | None, span: list | None) -> dict:
    low, high = span or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}
