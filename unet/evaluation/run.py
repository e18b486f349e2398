"""An evaluation from its settings to its results: models and data are found, checked, scored and summed up."""

from dataclasses import dataclass
from itertools import combinations

import pyarrow as pa

from unet.cluster.demand import Needs, when_grown
from unet.cluster.placement import Node, Placement, in_words
from unet.cluster.planner import plan_scoring
from unet.cluster.room import take
from unet.cluster.session import silenced
from unet.config import EvaluateSettings
from unet.data.preparing.resolve import resolve
from unet.data.shards import Prepared
from unet.data.streaming import DATA_CPUS
from unet.disk import check_writable
from unet.errors import InputError
from unet.evaluation.output import asked, data_of, folder_of, labels_of, part_of
from unet.evaluation.records import with_scores
from unet.evaluation.scorer import batch_size, score_split, scorer_bytes
from unet.evaluation.summary import compare, summary
from unet.models.trained import TrainedModel
from unet.pages.numbers import images
from unet.storage import Folder
from unet.terminal import Display


@dataclass(frozen=True)
class Evaluation:
    """What one model scored on a split.

    Attributes:
        model: the one scored.
        label: its short name among the models of the evaluation.
        prepared: the data.
        split: their part.
        part: the split's name in files and scores (`unet.evaluation.output.part_of`).
        folder: where the results go.
        metrics: the content of `metrics.json`.
        records: a row per image, with its scores (`unet.evaluation.records`), sorted by name.
    """

    model: TrainedModel
    label: str
    prepared: Prepared
    split: str
    part: str
    folder: Folder
    metrics: dict
    records: pa.Table


def evaluate(settings: EvaluateSettings, display: Display) -> list[Evaluation]:
    """Score the models of the settings on a split. Ray must be connected.

    Raises:
        InputError: a model or the data are missing or do not match, the results cannot be written, or the cluster
            has no room.
        RunFailed: scoring failed.
    """
    part, storage = settings.evaluate, Folder(settings.store.storage_path)
    models = find_models(part.model, storage, settings.store.tracking_uri)
    first = models[0]
    data = data_of(models) if part.data is None else part.data
    prepared = resolve(data, first.image_size, first.resize, storage, display.working)
    check_classes(first, prepared)
    if not prepared.count(part.split):
        raise InputError(f"{prepared.folder} has no {part.split} samples: give another --split.")
    digest, labels = prepared.manifest.data_digest, labels_of(models)
    parts = [part_of(model, part.split, digest) for model in models]
    folders = [
        folder_of(model, name, own, settings, alone=len(models) == 1)
        for model, name, own in zip(models, labels, parts, strict=True)
    ]
    for folder in folders:
        check_writable(folder, "--output")

    def planned(nodes: list[Node]) -> Placement:
        return plan_scoring(nodes, part.num_workers, scorer_bytes(models), part.device)

    def now() -> Placement:
        return take(planned, beside=DATA_CPUS, least=1, say=lambda text: display.say(text, "yellow"))

    needs = Needs(part.num_workers or 1, gpu=part.device == "gpu", memory=scorer_bytes(models), beside=DATA_CPUS)
    workers = when_grown(now, needs, display.waiting_for_others)
    if workers.why_cpus:
        display.say(f"On {in_words(workers.use_gpu, workers.why_cpus)}.")
    display.waiting(f"starting {workers.num_workers} × TensorFlow")
    rates: list[float] = []

    def report(done: int, total: int, rate: float | None) -> None:
        rates[:] = [rate] if rate else rates
        display.scoring(done, total, rate)

    with silenced(settings.command.debug):  # Ray warns about references that might get lost; they are kept here
        tables = score_split(models, prepared, part.split, workers, part.band, batch_size(models), report)
    speed = f" at {rates[0]:.1f} images/s" if rates else ""
    each = "a GPU" if workers.use_gpu else "one thread"
    display.say(f"Scored {images(len(tables[0]))}{speed} (workers: {workers.num_workers}, {each} each).")
    names = prepared.manifest.classes
    comparison = compare(labels, tables, names, part.bootstrap) if len(models) > 1 else None
    found = []
    for model, name, own, folder, table in zip(models, labels, parts, folders, tables, strict=True):
        display.working(f"intervals of {name}", 0, 0)
        about = {
            **{"model": model.name, "run_name": model.run_name, "checkpoint": model.checkpoint, "split": part.split},
            **{"data": str(prepared.folder), "data_digest": digest},
            **{"image_size": model.image_size, "resize": model.resize},
        }
        scores = summary(table, names, part.band, part.bootstrap, model.loss)
        result = about | scores | {"comparison": comparison}
        found.append(Evaluation(model, name, prepared, part.split, own, folder, result, with_scores(table, names)))
    return found


def find_models(names: str, storage: Folder, tracking_uri: str | None) -> list[TrainedModel]:
    """The models that `--model` names, which can be compared.

    Raises:
        InputError: there is no such model, or they cannot be compared.
    """
    models = [TrainedModel.find(name, storage, tracking_uri) for name in asked(names)]
    for one, other in combinations(models, 2):
        if one.run and other.run and (one.run.path, one.checkpoint) == (other.run.path, other.checkpoint):
            raise InputError(f"--model names one checkpoint twice: {one.name} and {other.name}.")
    first = models[0]
    for other in models[1:]:
        if other.class_names != first.class_names:
            raise InputError(
                f"{first.name} has the classes {', '.join(first.class_names)}, {other.name} has "
                f"{', '.join(other.class_names)}: their scores cannot be compared; evaluate them one by one."
            )
        if (other.image_size, other.resize) != (first.image_size, first.resize):
            raise InputError(
                f"{first.name} takes photos at {first.image_size} px ({first.resize}), {other.name} at "
                f"{other.image_size} px ({other.resize}), so they would not be scored on the same pixels: evaluate "
                "each on data prepared for it with --original-masks, and compare the scores at the photos' own size."
            )
    return models


def check_classes(model: TrainedModel, prepared: Prepared) -> None:
    """Refuse data with other classes than the model's."""
    names, found = model.class_names, prepared.manifest.classes
    if names != found:
        raise InputError(
            f"{model.name} was trained for the classes {', '.join(names)}, {prepared.folder} has {', '.join(found)}: "
            "give data prepared with the model's classes."
        )
