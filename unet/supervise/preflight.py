"""What can be refused before anything starts: which run the settings mean, its samples, and room on its disk."""

import shutil
import time
from typing import Any

from unet.cluster.precision import Settings
from unet.config import CONFIG, MAY_CHANGE, TrainSettings, flat, read_config
from unet.data.manifest import MANIFEST
from unet.data.shards import Prepared
from unet.data.sources.find import check_source
from unet.disk import _existing, at_the_door, check_writable
from unet.errors import InputError
from unet.models.start import check_start
from unet.recipe.loss import AUTO_WEIGHTS, weights_by_frequency
from unet.recipe.recipe import AUTO, Recipe
from unet.runs.run import SUMMARY, Run
from unet.settings import defaults
from unet.storage import Folder
from unet.tracking.database import check_database
from unet.tracking.reach import check_server, default_uri


@at_the_door()
def open_run(settings: TrainSettings, tracked: bool = True) -> Run:
    """The run that the settings mean, after every check that needs no cluster.

    A run that continues goes on without its tracking server; one that is not `tracked` asks for none.

    Raises:
        InputError: the settings, the data, MLflow's database or the tracking server cannot work.
    """
    storage, uri = Folder(settings.run.storage_path), settings.run.tracking_uri
    check_writable(storage)
    run = _identify(settings)
    if tracked and not run.summary:
        check_start(settings.model, settings.start, settings.optimizer)
    check_source(settings.data.data)
    if tracked:
        check_database(uri or default_uri(storage))
        if not run.summary:
            check_server(uri)
    return run


def _identify(settings: TrainSettings) -> Run:
    """The run that the settings mean: a new one, or one to continue.

    Raises:
        InputError: the name belongs to a run with other settings.
    """
    name = settings.run.resume or settings.run.run_name or time.strftime("unet-%Y%m%d-%H%M%S")
    run = Run.load(name, settings)
    if not run.folder.exists(CONFIG):
        if run.folder.exists(SUMMARY) or run.folder.exists(MANIFEST):
            raise InputError(f"{run.folder} is not the folder of a run: give another --run-name.")
        return run
    before = read_config(run.folder)
    run.settings = with_chosen(settings, before)
    if "space" in before:
        raise InputError(f"{name} is a sweep: continue it with `jobs/tune.py`, or give another --run-name.")
    refuse_changes(name, defaults(TrainSettings) | before, flat(run.settings), MAY_CHANGE)
    run.summary.setdefault("run_name", name)
    return run


def with_chosen(settings: Settings, before: dict[str, Any]) -> Settings:
    """The settings of a run or sweep that goes on, with what it chose at its beginning in the places of `auto`."""
    if settings.training.precision == AUTO:
        settings = settings.with_precision(before.get("precision", AUTO))
    if settings.loss.class_weights == AUTO_WEIGHTS and before.get("class_weights"):
        settings = settings.with_class_weights(before["class_weights"])
    return settings


def with_weights_of(prepared: Prepared, samples: int, settings: Settings) -> Settings:
    """The settings with numbers in the place of `--class-weights auto`, by the first `samples` of train.

    Raises:
        InputError: there is not one weight for each class of the data.
    """
    if settings.loss.class_weights == AUTO_WEIGHTS:
        settings = settings.with_class_weights(weights_by_frequency(prepared.class_pixels("train", samples)))
    settings.recipe(len(prepared.manifest.classes))
    return settings


def refuse_changes(name: str, before: dict, now: dict, may_change: frozenset[str]) -> None:
    """Refuse to continue under a name with other settings than it was started with, of which `before` holds all.

    Raises:
        InputError: with the settings that differ.
    """
    changed = sorted(k for k in now.keys() - may_change if before.get(k) != now[k])
    if changed:
        flags = ", ".join(f"--{k.replace('_', '-')} (was {before[k]}, is {now[k]})" for k in changed)
        raise InputError(
            f"The run {name} was started with other settings: {flags}. Give another --run-name, "
            f"or --resume {name}, which goes on with its own."
        )


def check_disk(settings: TrainSettings, storage: Folder, recipe: Recipe, runs: int = 1) -> None:
    """Refuse runs whose checkpoints would not fit on a local disk.

    Raises:
        InputError: with what is needed and what is free.
    """
    place = _existing(storage)
    if place is None:
        return
    # The best, the last, and the one being written; the rest is pictures and the packaged model.
    kept = runs * (settings.run.keep_checkpoints + 2)
    need, free = kept * recipe.checkpoint_bytes + 100e6, shutil.disk_usage(place).free
    if need > free:
        raise InputError(
            f"The checkpoints need about {need / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free: "
            "make room, or give another --storage-path."
        )


def check_samples(settings: TrainSettings, prepared: Prepared) -> dict[str, int]:
    """How many samples of each split the run uses.

    Raises:
        InputError: a split that training needs is empty, or nothing in train has a class.
    """
    counts = dict(prepared.manifest.counts)
    for split in ("train", "val"):
        if not counts[split]:
            raise InputError(
                f"{prepared.folder} has no {split} samples: give more samples or other lists, or prepare "
                "them with another --val-fraction."
            )
    if not prepared.is_labelled("train"):
        raise InputError(f"No pixel of train in {prepared.folder} has a class: there is nothing to learn from.")
    if settings.data.limit_train:
        counts["train"] = min(counts["train"], settings.data.limit_train)
    return counts
