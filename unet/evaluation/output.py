"""The labels of an evaluation's models, the data they are scored on, and where their results go."""

import re
from collections.abc import Sequence

from unet.config import CONFIG, EvaluateSettings, read_config
from unet.data.sources.find import check_source
from unet.disk import at_the_door, check_writable
from unet.errors import InputError
from unet.models.trained import TrainedModel, best_checkpoint, located
from unet.runs.run import prepared_of
from unet.secrets import lost
from unet.storage import Folder

METRICS, RECORDS, PAGE = "metrics.json", "per_image.parquet", "report.html"
FOLDER = "evaluations"


def asked(names: str) -> list[str]:
    """What `--model` names, one by one.

    Raises:
        InputError: nothing, or something twice.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found:
        raise InputError("Say which model: --model RUN_NAME, a checkpoint's folder, or an MLflow URI; or several.")
    if twice := next((name for name in found if found.count(name) > 1), None):
        raise InputError(f"--model names {twice} twice.")
    return found


@at_the_door()
def check_settings(settings: EvaluateSettings) -> None:
    """Check what can be known about models and data before Ray starts, which takes seconds.

    Raises:
        InputError: a run, a checkpoint or the data are not there.
    """
    part, storage = settings.evaluate, Folder(settings.store.storage_path)
    if part.output:
        check_writable(Folder(part.output), "--output")
    elif not storage.is_local:  # of a local one it is the model's folder that counts
        check_writable(storage)
    for name in asked(part.model):
        located(name, storage)
    if part.data is not None:
        check_source(part.data)


def data_of(models: Sequence[TrainedModel]) -> str:
    """What the run of the models was trained on, as `--data` would name it.

    Raises:
        InputError: they were trained on different data, no folder says on which, or the data are gone.
    """
    first = models[0]
    other = next((model for model in models if model.data_digest != first.data_digest), None)
    if other:
        raise InputError(f"{first.name} and {other.name} were trained on different data: give --data.")
    if first.run is None:
        raise InputError(f"{first.name} does not say where its training data are: give --data.")
    if prepared := prepared_of(first.run):
        return prepared
    source = read_config(first.run).get("data") if first.run.exists(CONFIG) else None
    if source is None or lost(source):
        raise InputError(f"{first.run} does not say where its training data are: give --data.")
    try:
        check_source(source)
    except InputError as error:
        raise InputError(f"The data that {first.name} was trained on, {source}, are gone: give --data.") from error
    return source


def labels_of(models: Sequence[TrainedModel]) -> list[str]:
    """Short names: as given; run/checkpoint for a folder. One whose folder is another's already gets a number."""
    found: dict[str, str] = {}
    for model in models:
        is_folder = "/" in model.name and ":/" not in model.name
        plain = label = f"{model.run_name}/{model.checkpoint}" if is_folder else model.name
        number = 1
        while _folder_name(label) in found:
            number += 1
            label = f"{plain}-{number}"
        found[_folder_name(label)] = label
    return list(found.values())


def _folder_name(label: str) -> str:
    return re.sub(r"[^\w.@-]+", "-", label).strip("-.")


def part_of(model: TrainedModel, split: str, data_digest: str) -> str:
    """`test`; with the start of the data's digest if they are not those of the training: `test-1a2b3c4d`."""
    return split if data_digest == model.data_digest else f"{split}-{data_digest[:8]}"


def is_best(model: TrainedModel) -> bool:
    """Whether a model from a run's folder is the one that the run's name means."""
    return model.run is not None and best_checkpoint(model.run) == model.checkpoint


def folder_of(model: TrainedModel, label: str, part: str, settings: EvaluateSettings, alone: bool) -> Folder:
    """The folder for an evaluation: `--output`, with a folder for each of several models; else the run's own.

    There the run's best checkpoint has `evaluations/<part>` (`part_of`), another one its name appended. A model from
    MLflow has a folder of its name under the storage path.
    """
    output, name = settings.evaluate.output, _folder_name(label)
    if output:
        return Folder(output) if alone else Folder(output) / name
    if model.run is None:
        return Folder(settings.store.storage_path) / FOLDER / name / part
    return model.run / FOLDER / (part if is_best(model) else f"{part}-{model.checkpoint}")
