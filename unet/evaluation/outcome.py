"""The results of an evaluation: files in its folder, and scores in the model's MLflow run."""

import json
import re
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unet import metric_names
from unet.config import EvaluateSettings
from unet.errors import first_line
from unet.evaluation.output import METRICS, PAGE, RECORDS, is_best
from unet.evaluation.page import evaluation_page
from unet.evaluation.records import counts_of, read_counts, written
from unet.evaluation.run import Evaluation
from unet.models.trained import tracking_uri_of
from unet.runs.run import read_history
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.terminal import Display

FILES = (METRICS, RECORDS, PAGE)


def write(done: Evaluation, display: Display) -> None:
    """Write the results into their folder, over those of an earlier evaluation.

    Raises:
        StorageFailed: they cannot be written.
    """
    display.waiting("drawing report.html")
    content, folder = pa.BufferOutputStream(), done.folder
    parts = written(done.records, len(done.prepared.manifest.classes))
    first = next(parts)
    with pq.ParquetWriter(content, first.schema, compression="zstd") as writer:
        for part in chain([first], parts):
            writer.write_table(part)
    folder.write_bytes(RECORDS, content.getvalue().to_pybytes())
    history = read_history(done.model.run) if done.model.run else []
    folder.write_text(METRICS, json.dumps(done.metrics, indent=2, allow_nan=False))
    folder.write_text(PAGE, evaluation_page(done.metrics, done.records, done.prepared, done.split, history))
    display.close()


def read(folder: Folder, checkpoint: str, data_digest: str) -> tuple[dict, pa.Table] | None:
    """The metrics and the counts of each image that `write` left there, if they are of this checkpoint and these data,
    and belong together."""
    if not (folder.exists(METRICS) and folder.exists(RECORDS)):
        return None
    try:
        metrics = json.loads(folder.read_text(METRICS))
        if (metrics["checkpoint"], metrics["data_digest"]) != (checkpoint, data_digest):
            return None
        classes = len(metrics["iou"])
        records = read_counts(folder.read_bytes(RECORDS), classes)
        is_whole = np.array_equal(counts_of(records, "confusion", classes).total(), metrics["confusion"])
    except (OSError, ValueError, KeyError, TypeError):  # as a kill or another version left them
        return None
    return (metrics, records) if is_whole else None


def track(done: Evaluation, settings: EvaluateSettings, display: Display) -> None:
    """Log scores and files to the model's MLflow run; if that cannot be done, a sentence says so."""
    model, kept = done.model, f"the results are in {done.folder}."
    not_its_model = f"Not logged to MLflow: {model.checkpoint} is not the best checkpoint of {model.run_name}; {kept}"
    if model.run is not None and not is_best(model):
        display.say(not_its_model)
        return
    run_id = model.mlflow_run_id
    if run_id is None:
        display.say(f"{done.label} has no MLflow run: {kept}", "yellow")
        return
    storage = Folder(settings.store.storage_path)
    try:
        uri = settings.store.tracking_uri or tracking_uri_of(model.run)
        if not _send(done, run_id, storage, uri):
            display.say(not_its_model)
    except Exception as error:  # whatever the store's library raises: the results are there
        display.say(not_logged("evaluation", error, kept), "yellow")


def not_logged(what: str, error: Exception, kept: str) -> str:
    """That MLflow has not taken the results of a job, and why."""
    reason = without_secrets(first_line(error))[:200].rstrip(".")
    return f"The {what} was not logged to MLflow ({reason}): {kept} Run it again once MLflow answers."


def _send(done: Evaluation, run_id: str, storage: Folder, uri: str | None) -> bool:
    """Whether the scores were sent: they are not if the run's own model is a different one by now."""
    from unet.tracking.reach import check_server
    from unet.tracking.stored_run import StoredRun

    check_server(uri)
    run = StoredRun.of_existing(storage, run_id, uri)
    # A model of a run's folder is its best by now; a registered version may be of an earlier checkpoint.
    if done.model.run is None and not re.fullmatch(r"runs:/[0-9a-f]+/model/?", done.model.name):
        best = run.client.get_run(run_id).data.tags.get("best_checkpoint", "")
        if best.rpartition("/")[2] != done.model.checkpoint:
            return False
    run.latest(tracked_metrics(done))
    for name in FILES:
        run.file(done.folder, name, f"evaluation/{done.part}")
    return True


def tracked_metrics(done: Evaluation) -> dict[str, float]:
    """The scores as MLflow has them: `eval/test/mean_iou`, `eval/test/band/iou/pet`, `eval/test/low/mean_iou`, …"""
    found: dict[str, float] = {}
    for part in ("", "band", "own_size"):
        scores = done.metrics.get(part) if part else done.metrics
        if scores is None:
            continue
        prefix = f"eval/{done.part}/{part}".rstrip("/")
        found |= metric_names.of(prefix, scores)
        for end, name in enumerate(("low", "high")):
            found |= metric_names.of(f"{prefix}/{name}", _ends(scores.get("intervals") or {}, end))
    return found


def _ends(spans: dict, end: int) -> dict:
    """The lower (0) or upper (1) ends of intervals, as scores."""
    at = lambda span: span and span[end]  # noqa: E731
    by_class = {kind: {name: at(span) for name, span in (spans.get(kind) or {}).items()} for kind in ("iou", "dice")}
    return {name: at(span) for name, span in spans.items() if name not in by_class} | by_class
