"""An evaluation from its settings to its results: models and data are found, compared, scored and summed up."""

from dataclasses import dataclass

import pyarrow as pa

from unet.config import EvaluateSettings
from unet.data.prepare import resolve
from unet.data.shards import Prepared
from unet.data.sources.find import check_source
from unet.errors import InputError
from unet.evaluation.pool import take_pool
from unet.evaluation.records import with_scores
from unet.evaluation.scorer import batch_size, score_split, scorer_bytes
from unet.evaluation.summary import compare, summary
from unet.session import silenced
from unet.storage import Folder
from unet.terminal import Display
from unet.trained import TrainedModel


@dataclass(frozen=True)
class Evaluation:
    """What one model scored on a split.

    Attributes:
        model: which.
        label: how it is called among others.
        prepared: the data.
        split: their part.
        metrics: the content of `metrics.json`.
        records: a row an image, with its scores (`unet.evaluation.records`), sorted by name.
    """

    model: TrainedModel
    label: str
    prepared: Prepared
    split: str
    metrics: dict
    records: pa.Table


def evaluate(settings: EvaluateSettings, display: Display) -> list[Evaluation]:
    """Score the models of the settings on a split. Ray must be connected.

    Raises:
        InputError: a model or the data are not there or do not fit each other, or the cluster has no room.
        RunFailed: scoring failed.
    """
    part, storage = settings.evaluate, Folder(settings.store.storage_path)
    check_source(part.data)
    models = find_models(part.model, storage, settings.store.tracking_uri)
    first = models[0]
    prepared = resolve(part.data, first.image_size, first.resize, storage, display.working)
    check_classes(first, prepared)
    if not prepared.count(part.split):
        raise InputError(f"{prepared.folder} has no {part.split} samples: give another --split.")
    pool = take_pool(part.num_workers, scorer_bytes(models), lambda text: display.say(text, "yellow"))
    display.waiting(f"starting {pool.processes} processes")
    rates: list[float] = []

    def tell(done: int, total: int, rate: float | None) -> None:
        rates[:] = [rate] if rate else rates
        display.scoring(done, total, rate)

    with silenced(settings.door.debug):  # Ray warns of arguments that might get lost; this process keeps them
        tables = score_split(models, prepared, part.split, pool, part.band, batch_size(models), tell)
    speed = f" at {rates[0]:.1f} images/s" if rates else ""
    display.say(f"Scored {len(tables[0]):,} images{speed}, {pool.processes} processes of one thread.")
    names, labels = prepared.manifest.classes, [label(model) for model in models]
    comparison = compare(labels, tables, names, part.bootstrap) if len(models) > 1 else None
    found = []
    for model, name, table in zip(models, labels, tables, strict=True):
        display.working(f"intervals of {name}", 0, 0)
        about = {"model": model.name, "run_name": model.run_name, "checkpoint": model.checkpoint, "split": part.split}
        about |= {"data": str(prepared.folder), "data_digest": prepared.manifest.data_digest}
        about |= {"image_size": model.image_size, "resize": model.resize}
        scores = summary(table, names, part.band, part.bootstrap)
        result = about | scores | {"comparison": comparison}
        found.append(Evaluation(model, name, prepared, part.split, result, with_scores(table, names)))
    return found


def find_models(names: str, storage: Folder, tracking_uri: str | None) -> list[TrainedModel]:
    """The models that `--model` names, which can be compared.

    Raises:
        InputError: there is no such model, or they do not compare.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()] or [""]
    if twice := next((name for name in asked if asked.count(name) > 1), None):
        raise InputError(f"--model names {twice} twice.")
    models = [TrainedModel.find(name, storage, tracking_uri) for name in asked]
    first = models[0]
    for other in models[1:]:
        if other.class_names != first.class_names:
            raise InputError(
                f"{first.name} knows the classes {', '.join(first.class_names)}, {other.name} knows "
                f"{', '.join(other.class_names)}: their scores do not compare; evaluate them one by one."
            )
        if (other.image_size, other.resize) != (first.image_size, first.resize):
            raise InputError(
                f"{first.name} sees photos at {first.image_size} px ({first.resize}), {other.name} at "
                f"{other.image_size} px ({other.resize}): their pixels are not the same. Evaluate each on its own "
                "preparation of the data with --original-masks, and compare the scores at the photos' own size."
            )
    return models


def check_classes(model: TrainedModel, prepared: Prepared) -> None:
    """Refuse data with other classes than the model's."""
    names, found = model.class_names, prepared.manifest.classes
    if names != found:
        raise InputError(
            f"{model.name} was trained for the classes {', '.join(names)}, {prepared.folder} has {', '.join(found)}: "
            "give data that were prepared with the model's classes."
        )


def label(model: TrainedModel) -> str:
    """A short name: as asked for; run/checkpoint for a folder."""
    is_folder = "/" in model.name and ":/" not in model.name
    return f"{model.run_name}/{model.checkpoint}" if is_folder else model.name
