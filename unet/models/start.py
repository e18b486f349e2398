"""What a training begins with that is not drawn: weights of an earlier model, or of an encoder known from ImageNet."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unet.config import CONFIG, TrainSettings, read_config
from unet.data.shards import Prepared
from unet.errors import InputError
from unet.models.imagenet import encoder_weights
from unet.models.trained import TrainedModel, located
from unet.recipe.folding import unfolded_weights
from unet.recipe.network import is_of_encoder
from unet.recipe.recipe import Recipe
from unet.recipe.start import DRAWN, IMAGENET
from unet.runs.checkpoint import Checkpoints
from unet.storage import Folder

HEAD = "head/"
"""What the names of the last layer's weights begin with, which mean the classes."""


@dataclass(frozen=True, repr=False)  # the weights would fill a log
class Start:
    """Weights to begin with.

    Attributes:
        weights: float32 arrays by name (`Network.variables`); those that are absent are drawn.
        words: where they are from, for the overview.
    """

    weights: dict[str, np.ndarray]
    words: str


def start_of(
    settings: TrainSettings, recipe: Recipe, class_names: list[str], prepared: Prepared | None = None
) -> Start | None:
    """What a training of these settings begins with; None: with weights that are drawn.

    Raises:
        InputError: they cannot be had, are not for this network, or were learned from what `prepared` tests with.
    """
    start, encoder = recipe.start, recipe.model.encoder
    if start.init_from:
        return _of_model(start.init_from, settings, recipe, class_names, prepared)
    if encoder == "none" or start.encoder_weights == DRAWN:
        return None
    file = None if start.encoder_weights == IMAGENET else start.encoder_weights
    weights = encoder_weights(encoder, file, recipe.network.variables)
    return Start(weights, f"the encoder's from {Path(file).name if file else 'ImageNet'}")


def _of_model(
    model: str, settings: TrainSettings, recipe: Recipe, class_names: list[str], prepared: Prepared | None
) -> Start:
    """The weights of an earlier model whose name and shape fit; the last layer's only if it means the same classes."""
    storage = Folder(settings.run.storage_path)
    trained = TrainedModel.find(model, storage, settings.run.tracking_uri)
    if prepared:
        refuse_shared(trained, prepared, storage)
    place = located(model, storage)
    if place and place[1]:  # a package has its norms folded into its convolutions, a checkpoint has them
        found = Checkpoints(place[0]).weights(place[1])
    else:
        found = unfolded_weights(recipe.network, trained.weights)
    wanted = recipe.network.variables
    same_classes = trained.class_names == class_names
    fit = {
        name: array
        for name, array in found.items()
        if wanted.get(name) == array.shape and (same_classes or not name.startswith(HEAD))
    }
    if not any(is_of_encoder(name) for name in fit):
        raise InputError(
            f"Nothing of {model} ({trained.network.title}, {trained.network.base_filters} filters) fits the network of "
            f"this training ({recipe.model.title}, {recipe.model.base_filters} filters): give --network, --encoder, "
            "--norm, --depth and --base-filters as it has them."
        )
    left = sorted({name.partition("/")[0] for name in wanted.keys() - fit.keys()})
    anew = f", anew: {', '.join(left[:4])}{' and others' if len(left) > 4 else ''}" if left else ""
    return Start(fit, f"{len(fit)} of {len(wanted)} from {trained.run_name}, {trained.checkpoint}{anew}")


MIXED = (("train", "test"), ("train", "val"), ("test", "train"))
"""Splits, of the data before and now, that must have no photo in common: else a score means less than it seems to."""


def refuse_shared(trained: TrainedModel, prepared: Prepared, storage: Folder) -> None:
    """Refuse to go on from a model with other splits of the same photos, if its data are still there.

    Photos are the same by name and size, and by their pixels where both were prepared alike.

    Raises:
        InputError: with how many there are, and one of them.
    """
    before = _prepared_of(trained, storage)
    if before is None or before.manifest.data_digest == prepared.manifest.data_digest:
        return
    earlier, now = _photos(before), _photos(prepared)
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


def _photos(prepared: Prepared) -> dict[str, set[tuple[str, int, int]]]:
    """Name and size of the photos of each split."""
    columns = ("split", "name", "original_height", "original_width")
    rows = zip(*(prepared.samples(columns)[name].to_pylist() for name in columns), strict=True)
    found: dict[str, set[tuple[str, int, int]]] = {split: set() for split in prepared.manifest.counts}
    for split, *photo in rows:
        found[split].add(tuple(photo))
    return found


def _alike(before: Prepared, old: str, shared: set[tuple[str, int, int]], now: Prepared, new: str) -> list[str]:
    """The names of those that have equal pixels, if that can be seen."""
    names = {name for name, *_ in shared}
    one, other = before.manifest, now.manifest
    if not names or (one.image_size, one.resize) != (other.image_size, other.resize):
        return sorted(names)
    first, second = _digests(before, old, names), _digests(now, new, names)
    return sorted(name for name in names if first[name] == second[name])


def _digests(prepared: Prepared, split: str, names: set[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for chunk in range(len(prepared.chunks[split])):
        table = prepared.read_chunk(split, chunk, ("name", "image"))
        rows = zip(table["name"].to_pylist(), table["image"].to_pylist(), strict=True)
        found |= {name: hashlib.sha256(image).digest() for name, image in rows if name in names}
    return found
