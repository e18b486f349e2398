"""What becomes of an evaluation: files in its folder, and scores in the model's MLflow run."""

import json
import re
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq

from unet.config import EvaluateSettings
from unet.errors import first_line
from unet.evaluation.output import METRICS, PAGE, RECORDS, is_best
from unet.evaluation.page import evaluation_page
from unet.evaluation.records import written
from unet.evaluation.run import Evaluation
from unet.models.trained import TrainedModel, tracking_uri_of
from unet.runs.run import read_history
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.terminal import Display

FILES = (METRICS, RECORDS, PAGE)


def write(done: Evaluation, display: Display) -> None:
    """Write the results into their folder. What an earlier evaluation left there is written over.

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


def track(done: Evaluation, settings: EvaluateSettings, display: Display) -> None:
    """Log scores and files to the model's MLflow run; where that cannot be done, a sentence says so."""
    model, kept = done.model, f"the results are in {done.folder}"
    not_its_model = f"Not logged to MLflow, since {model.checkpoint} is not the best of {model.run_name}: {kept}."
    if model.run is not None and not is_best(model):
        display.say(not_its_model)
        return
    if model.mlflow_run_id is None:
        display.say(f"{done.label} has no MLflow run: {kept}.", "yellow")
        return
    storage = Folder(settings.store.storage_path)
    try:
        uri = settings.store.tracking_uri or tracking_uri_of(model.run)
        if not _send(done, storage, uri):
            display.say(not_its_model)
    except Exception as error:  # whatever the store's library raises: the results are there
        display.say(
            f"MLflow has not taken the evaluation ({without_secrets(first_line(error))[:200].rstrip('.')}): {kept}.",
            "yellow",
        )


def _send(done: Evaluation, storage: Folder, uri: str | None) -> bool:
    """Whether the scores were sent: they are not where the run's own model is another by now."""
    from unet.tracking.reach import check_server
    from unet.tracking.stored_run import StoredRun

    check_server(uri)
    store = StoredRun.of_existing(storage, done.model.mlflow_run_id, uri)
    if not _is_of_run(done.model, store):
        return False
    store.latest(tracked_metrics(done))
    for name in FILES:
        store.file(done.folder, name, f"evaluation/{done.part}")
    return True


def _is_of_run(model: TrainedModel, store) -> bool:
    """Whether a model is what its MLflow run holds; a registered version may be of an earlier checkpoint."""
    if model.run is not None or re.fullmatch(r"runs:/[0-9a-f]+/model/?", model.name):
        return True
    best = store.client.get_run(model.mlflow_run_id).data.tags.get("best_checkpoint", "")
    return best.rpartition("/")[2] == model.checkpoint


def tracked_metrics(done: Evaluation) -> dict[str, float]:
    """The scores as MLflow has them: `eval_test_mean_iou`, its `_low` and `_high`, `eval_test_band_mean_iou`, …

    Where a class is called `pet_low`, its IoU has the name, and the interval of `pet` lacks that end.
    """
    found, ends = {}, {}
    for part in ("", "band", "own_size"):
        scores = done.metrics.get(part) if part else done.metrics
        if scores is None:
            continue
        prefix = f"eval_{done.part}_{part}_" if part else f"eval_{done.part}_"
        spans = scores.get("intervals") or {}
        for key in ("mean_iou", "mean_dice", "accuracy"):
            found[prefix + key] = scores[key]
            ends |= _ends(prefix + key, spans.get(key))
        for kind in ("iou", "dice"):
            for name, value in scores[kind].items():
                found[f"{prefix}{kind}_{name}"] = value
                ends |= _ends(f"{prefix}{kind}_{name}", (spans.get(kind) or {}).get(name))
        if "loss" in scores:
            found[f"{prefix}loss"] = scores["loss"]
    return {name: value for name, value in (ends | found).items() if value is not None}


def _ends(name: str, span: list | None) -> dict[str, float]:
    return {f"{name}_low": span[0], f"{name}_high": span[1]} if span else {}
