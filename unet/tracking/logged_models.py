"""The checkpoints of a run as MLflow's logged models, so that its Models page ranks them over runs.

Each best checkpoint that is kept is one, with the scores of its epoch; the packaged model is one called `model`, in
which MLflow finds `runs:/RUN_ID/model`, and takes the place of its checkpoint's. What is there is compared with what
should be there, so that nothing is doubled however often it is sent.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet.metric_names import BEST_EPOCH
from unet.runs.run import MODEL, Run
from unet.runs.state import name_of
from unet.secrets import without_passwords
from unet.storage import Folder

if TYPE_CHECKING:
    from unet.tracking.stored_run import StoredRun

CHECKPOINT, KEPT, READY = "checkpoint", "checkpoint_kept", "READY"
"""Tags: whose weights the model has, and whether the run's folder still holds them; MLflow's status of a whole one."""


@dataclass(frozen=True)
class Best:
    """A checkpoint that was the best when its epoch ended.

    Attributes:
        checkpoint: its name.
        epoch, time: when that was; milliseconds.
        scores: on the validation split, by the names of metrics.
        kept: whether the run's folder still holds it.
    """

    checkpoint: str
    epoch: int
    time: int
    scores: dict[str, float]
    kept: bool


@dataclass(frozen=True)
class Models:
    """What MLflow is to have of a run's models.

    Attributes:
        best: its best checkpoints, in order.
        tags, params: of each.
        validated_on: name and digest of the data set of the scores, as the run's inputs have them.
        package: the folder of the packaged model; None before the run's end.
        packaged: the checkpoint that it was made of.
        test: scores of the packaged model on the test split.
        tested: the epoch and the time, in milliseconds, of those.
    """

    best: list[Best]
    tags: dict[str, str]
    params: dict[str, Any]
    validated_on: tuple[str, str]
    package: Folder | None = None
    packaged: str | None = None
    test: dict[str, float] = field(default_factory=dict)
    tested: tuple[int, int] = (0, 0)


def best_of(run: Run, packaged: str | None = None) -> list[Best]:
    """The best checkpoints of a run so far, and the packaged one: without a score that is the last."""
    folder, found = run.folder / "checkpoints", []
    for record in run.history():
        name = name_of(record["step"])
        if record.get(BEST_EPOCH) == record["epoch"] or name == packaged:
            scores = {key: value for key, value in record.items() if key.startswith("val/")}
            found.append(Best(name, record["epoch"], record["time"], scores, folder.committed(name)))
    return found


def reconcile(run: "StoredRun", models: Models) -> None:
    """Create, mark and fill what MLflow lacks; delete what a creation whose answer was lost may have doubled."""
    there = _known(run)
    for best in models.best:
        name = MODEL if best.checkpoint == models.packaged else best.checkpoint
        found = there.get((MODEL, best.checkpoint))  # packaged now, or at an earlier end of the run
        if name != MODEL:
            found = found or there.get((name, best.checkpoint))
        if found is None and (best.kept or name == MODEL):
            found = _created(run, name, best, models)
        if found is None:
            continue
        whole = str(found.status) == READY
        if not whole:
            _describe(run, found.model_id, best, models)
        if found.tags.get(KEPT) != str(best.kept).lower():
            run.client.set_logged_model_tags(found.model_id, {KEPT: str(best.kept).lower()})
        if name == MODEL:
            _fill(run, found, models)
        if not whole:  # last, so that what a kill left undone is done again
            run.client.finalize_logged_model(found.model_id, READY)
    twin = there.get((models.packaged, models.packaged)) if models.packaged else None
    if twin is not None:
        run.client.delete_logged_model(twin.model_id)


def _known(run: "StoredRun") -> dict[tuple[str | None, str | None], Any]:
    """The run's models by name and checkpoint."""
    found: dict = {}
    for model in sorted(models_of(run.client, run.run_id), key=lambda model: model.creation_timestamp):
        key = model.name, model.tags.get(CHECKPOINT)
        if key in found:
            run.client.delete_logged_model(model.model_id)
        else:
            found[key] = model
    return found


def models_of(client, run_id: str | None) -> Iterator[Any]:
    """The logged models of an MLflow run."""
    experiment, token = client.get_run(run_id).info.experiment_id, None
    while True:
        only = f"source_run_id = '{run_id}'"
        page = client.search_logged_models([experiment], filter_string=only, page_token=token)
        yield from page
        if not (token := page.token):
            return


def packaged_of(client, run_id: str) -> Any:
    """The logged model of a run that has its packaged model; None before the run's end."""
    found = [model for model in models_of(client, run_id) if model.name == MODEL]
    return max(found, key=lambda model: model.creation_timestamp, default=None)


def _created(run: "StoredRun", name: str, best: Best, models: Models):
    client, experiment = run.client, run.client.get_run(run.run_id).info.experiment_id
    tags = models.tags | {CHECKPOINT: best.checkpoint, KEPT: str(best.kept).lower()}
    params = {key: str(value) for key, value in without_passwords(models.params).items() if value is not None}
    return client.create_logged_model(experiment, name, run.run_id, without_passwords(tags), params)


def _describe(run: "StoredRun", model_id: str, best: Best, models: Models) -> None:
    """Send the scores of a model and link it to its run."""
    from mlflow.entities import LoggedModelOutput

    run.scores(best.scores, best.epoch, best.time, model_id, models.validated_on)
    outputs = run.client.get_run(run.run_id).outputs
    if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        run.client.log_outputs(run.run_id, [LoggedModelOutput(model_id, best.epoch)])


def _fill(run: "StoredRun", model, models: Models) -> None:
    """Send the files of the packaged model, and its scores on the test split."""
    if models.package is not None:
        with tempfile.TemporaryDirectory() as scratch:
            size = 0
            for name in models.package.files():
                place = Path(scratch) / name
                place.parent.mkdir(parents=True, exist_ok=True)
                size += place.write_bytes(models.package.read_bytes(name))
            with run.patient(size):
                run.client.log_model_artifacts(model.model_id, scratch)
    if models.test:
        name, digest = models.validated_on
        run.scores(models.test, *models.tested, model.model_id, (name.removesuffix("/val") + "/test", digest))
