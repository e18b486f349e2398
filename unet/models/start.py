"""What a training begins with that is not drawn: weights of an earlier model, or of an encoder known from ImageNet."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unet.config import CONFIG, TrainSettings, read_config
from unet.data.shards import Prepared
from unet.errors import Damaged, InputError
from unet.models.imagenet import encoder_weights
from unet.models.trained import TrainedModel
from unet.recipe.network import ModelSettings, Shapes, is_of_encoder
from unet.recipe.optimizer import OptimizerSettings
from unet.recipe.recipe import Recipe
from unet.recipe.start import StartSettings
from unet.runs.checkpoint import Checkpoints
from unet.storage import Folder

HEAD = "head/"
"""What the names of the last layer's weights begin with, which mean the classes."""


@dataclass(frozen=True, repr=False)  # the weights would fill a log
class Known:
    """Weights that trainings may begin with.

    Attributes:
        weights: float32 arrays by name.
        words: where they are from.
        class_names: what the last layer means, if they have one.
        network: what they are of, for a person.
    """

    weights: dict[str, np.ndarray]
    words: str
    class_names: Sequence[str] = ()
    network: str = ""


@dataclass(frozen=True, repr=False)
class Start:
    """Weights that a training begins with.

    Attributes:
        weights: float32 arrays by name (`Network.variables`); those that are absent are drawn.
        words: how many they are and where they are from, for the overview.
    """

    weights: dict[str, np.ndarray]
    words: str


def check_start(model: ModelSettings, start: StartSettings, optimizer: OptimizerSettings) -> None:
    """Refuse what cannot be begun with, as far as the settings and a look at the disk say.

    Raises:
        InputError: with what to give.
    """
    if optimizer.sets_encoder_apart and not start.init_from and model.encoder == "none":
        raise InputError(
            "--freeze and --encoder-rate are for layers that know something already: give --init-from or --encoder, "
            "or --freeze None --encoder-rate 1."
        )
    if start.encoder_weights:
        if model.encoder == "none":
            raise InputError(f"--encoder-weights {start.encoder_weights} is for an --encoder: name it, too.")
        if not Path(start.encoder_weights).is_file():
            raise InputError(f"There is no file {start.encoder_weights}: give another --encoder-weights.")


def known_of(settings: TrainSettings, recipe: Recipe, prepared: Prepared) -> Known | None:
    """What trainings of such settings know at their beginning; None: nothing.

    `recipe` is that of the deepest network among them.

    Raises:
        InputError: it cannot be had, or was learned from what `prepared` tests with.
    """
    start, encoder = recipe.start, recipe.model.encoder
    if start.init_from:
        return _of_model(start.init_from, settings, recipe.network.variables, prepared)
    if encoder == "none":
        return None
    weights = encoder_weights(encoder, start.encoder_weights, recipe.network.variables)
    return Known(weights, Path(start.encoder_weights).name if start.encoder_weights else f"ImageNet's {encoder}")


def start_of(known: Known | None, recipe: Recipe, class_names: Sequence[str]) -> Start | None:
    """What a training by this recipe takes of it: whose name and shape fit, and mean the same classes.

    Raises:
        InputError: nothing fits, or layers that nothing is known of would be frozen.
    """
    if known is None:
        return None
    wanted, same_classes = recipe.network.variables, list(known.class_names) == list(class_names)
    fit = {
        name: array
        for name, array in known.weights.items()
        if wanted.get(name) == array.shape and (same_classes or not name.startswith(HEAD))
    }
    anew = sorted({name.partition("/")[0] for name in wanted.keys() - fit.keys()})
    if not any(map(is_of_encoder, fit)):
        model = recipe.model
        raise InputError(
            f"Nothing of {known.words} ({known.network}) fits the network of this training ({model.title}, "
            f"{model.base_filters} filters): leave out the flags that make it another one, such as --base-filters."
        )
    if recipe.optimizer.freeze and (drawn := [layer for layer in anew if is_of_encoder(layer)]):
        raise InputError(
            f"--freeze {recipe.optimizer.freeze} would keep layers that {known.words} lacks, such as {drawn[0]}: "
            "give --freeze None, or leave out the flags that add them, such as --depth."
        )
    some = f", anew: {', '.join(anew[:4])}{' and others' if len(anew) > 4 else ''}" if anew else ""
    return Start(fit, f"{len(fit)} of {len(wanted)} variables of {known.words}{some}")


def _of_model(model: str, settings: TrainSettings, wanted: Shapes, prepared: Prepared) -> Known:
    """What an earlier model knows. A package has its norms folded away, so its checkpoint is taken."""
    storage = Folder(settings.run.storage_path)
    trained = TrainedModel.find(model, storage, settings.run.tracking_uri)
    refuse_shared(trained, prepared, storage)
    run, weights = trained.run or storage / trained.run_name, trained.weights
    if _is_checkpoint_of(trained, run):
        weights = Checkpoints(run).weights(trained.checkpoint)
    elif any("/moving_" in name for name in wanted):
        raise InputError(
            f"{model} is a package, whose batch norms are folded away, and {run} lacks {trained.checkpoint}, which has "
            "them: give --init-from a run or a checkpoint."
        )
    network = f"{trained.network.title}, {trained.network.base_filters} filters"
    return Known(weights, f"{trained.run_name}, {trained.checkpoint}", trained.class_names, network)


def _is_checkpoint_of(trained: TrainedModel, run: Folder) -> bool:
    """Whether the run in this folder has the checkpoint that a model is of; another run may have its name."""
    if trained.checkpoint not in Checkpoints(run).whole():
        return False
    try:
        found = TrainedModel.of_checkpoint(run, trained.checkpoint).weights
    except Damaged:
        return False
    same = (np.array_equal(array, trained.weights[name]) for name, array in found.items() if name in trained.weights)
    return found.keys() == trained.weights.keys() and all(same)


MIXED = (("train", "test"), ("train", "val"), ("test", "train"))
"""Splits, of the data before and now, that must have no photo in common: else a score means less than it seems to."""


def refuse_shared(trained: TrainedModel, prepared: Prepared, storage: Folder) -> None:
    """Refuse to go on from a model with other splits of the same photos.

    It is seen where the model's data are still there and were prepared at the same size: by names and pixels.

    Raises:
        InputError: with how many there are, and one of them.
    """
    before = _prepared_of(trained, storage)
    if before is None or before.manifest.data_digest == prepared.manifest.data_digest:
        return
    one, other = before.manifest, prepared.manifest
    if (one.image_size, one.resize) != (other.image_size, other.resize):
        return  # photos of one name are often others
    earlier, now = _names(before), _names(prepared)
    for old, new in MIXED:
        if shared := _alike(before, old, earlier[old] & now[new], prepared, new):
            raise InputError(
                f"{len(shared):,} photos that {trained.run_name} had in {old} are in {new} now, such as {shared[0]}: "
                "scores would not be of unseen photos. Give data with the splits of then (list files), or another "
                "--init-from."
            )


def _prepared_of(trained: TrainedModel, storage: Folder) -> Prepared | None:
    """The data that a model was trained on, if they are where its run says or below the storage path."""
    places = [storage / "data" / name for name in (storage / "data").names()]
    if trained.run and trained.run.exists(CONFIG):
        places.append(Folder(read_config(trained.run)["data"]))
    for place in places:
        try:
            if (found := Prepared(place)).manifest.data_digest == trained.data_digest:
                return found
        except (InputError, OSError):
            continue
    return None


def _names(prepared: Prepared) -> dict[str, set[str]]:
    """Those of each split's photos."""
    rows = prepared.samples(("split", "name"))
    found: dict[str, set[str]] = {split: set() for split in prepared.manifest.counts}
    for split, name in zip(rows["split"].to_pylist(), rows["name"].to_pylist(), strict=True):
        found[split].add(name)
    return found


def _alike(before: Prepared, old: str, names: set[str], now: Prepared, new: str) -> list[str]:
    """The names of those that have equal pixels; none where the earlier data can no longer be read."""
    if not names:
        return []
    try:
        first = _digests(before, old, names)
    except InputError:
        return []
    second = _digests(now, new, names)
    return sorted(name for name in names if first[name] == second[name])


def _digests(prepared: Prepared, split: str, names: set[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for chunk in range(len(prepared.chunks[split])):
        table = prepared.read_chunk(split, chunk, ("name", "image"))
        rows = zip(table["name"].to_pylist(), table["image"].to_pylist(), strict=True)
        found |= {name: hashlib.sha256(image).digest() for name, image in rows if name in names}
    return found
