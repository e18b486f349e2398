"""What is wrong with a data set, as far as its decoded samples and their names show.

A problem that would make scores untrue (the same photo on both sides of a split) leaves a sample out; what only
looks wrong is a warning, and the sample stays.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

from unet.classes import IGNORE
from unet.data.resize import Box
from unet.data.sources import Problem

FIT_SIZE, FIT_BLOCK = 32, 4
MISFIT = -0.25
"""A mask below this `mask_fit` is warned about: 0.2 % of real masks are, and 37 % of other photos' (at 128 px)."""
KEPT_FIRST = {"test": 0, "val": 1, "train": 2}
"""Of a photo in two splits the copy for evaluation stays, so that test is whole whatever is in training."""
LISTED = 20


def mask_fit(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """How much better each mask explains the colours of its photo than the same mask mirrored, turned or shifted.

    In small blocks that hold several classes, the share of the colours' variance that lies between the classes; in
    standard deviations above the mean of seventeen such variants of the mask. A mask of another photo scores about 0.

    Args:
        images: uint8 (N, S, S, 3).
        masks: uint8 (N, S, S) class ids.

    Returns:
        float64 (N,), NaN if a mask has no border, or the pictures are too small to judge.
    """
    if images.shape[1] < FIT_SIZE:
        return np.full(len(images), np.nan)
    # (N, blocks, bands, pixels): the colours less their mean, and a band of ones, which counts pixels.
    tiles = _blocks(_small(images, Image.Resampling.BOX)).swapaxes(2, 3)
    bands = np.ones((*tiles.shape[:2], 4, tiles.shape[3]), np.float32)
    colours = bands[:, :, :3]
    np.subtract(tiles, tiles.mean(3, dtype=np.float32, keepdims=True), out=colours)
    total = np.maximum(np.einsum("nbcp,nbcp->nb", colours, colours), 1e-3)
    ids = _small(masks, Image.Resampling.NEAREST).reshape(len(masks), -1)
    variants = np.take(ids, _VARIANTS.reshape(-1), axis=1).reshape(len(masks), *_VARIANTS.shape)
    shape = (len(images), *_VARIANTS.shape[::2])
    between, classes = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    for i in set(np.unique(ids)) - {IGNORE}:
        sums = bands @ (variants == i).astype(np.float32)  # (N, blocks, bands, variants)
        between += np.einsum("nbcv,nbcv->nbv", sums[:, :, :3], sums[:, :, :3]) / np.maximum(sums[:, :, 3], 1)
        classes += sums[:, :, 3] > 0
    mixed = classes > 1
    explained = (between / total[:, :, None] * mixed).sum(1) / np.maximum(mixed.sum(1), 1)
    own, others = explained[:, 0], np.where(mixed[:, :, 1:].any(1), explained[:, 1:], np.nan)
    fits = np.full(len(images), np.nan)
    some = mixed[:, :, 0].any(1) & ~np.isnan(others).all(1)
    fits[some] = (own[some] - np.nanmean(others[some], 1)) / (np.nanstd(others[some], 1) + 1e-3)
    return fits


def _small(pictures: np.ndarray, resample: Image.Resampling) -> np.ndarray:
    """(N, S, S, …) at `FIT_SIZE`, as one tall picture: first in width, then in height, as Pillow does a square."""
    count, side = pictures.shape[:2]
    tall = Image.fromarray(pictures.reshape(count * side, *pictures.shape[2:]))
    small = tall.resize((FIT_SIZE, count * side), resample).resize((FIT_SIZE, count * FIT_SIZE), resample)
    return np.asarray(small).reshape(count, FIT_SIZE, FIT_SIZE, *pictures.shape[3:])


def without_padding(pictures: np.ndarray, boxes: Sequence[Box], resample: Image.Resampling) -> np.ndarray:
    """Letterboxed pictures (N, S, S, …) cut to their boxes, at `FIT_SIZE`: padding would explain itself too well."""
    cut = (p[top : top + high, left : left + wide] for p, (top, left, high, wide) in zip(pictures, boxes, strict=True))
    return np.stack([np.asarray(Image.fromarray(p).resize((FIT_SIZE, FIT_SIZE), resample)) for p in cut])


def _blocks(pictures: np.ndarray) -> np.ndarray:
    """(N, S, S, bands) as (N, blocks, pixels of a block, bands)."""
    count, across, bands = len(pictures), FIT_SIZE // FIT_BLOCK, pictures.shape[3]
    tiles = pictures.reshape(count, across, FIT_BLOCK, across, FIT_BLOCK, bands).swapaxes(2, 3)
    return tiles.reshape(count, across**2, FIT_BLOCK**2, bands)


def _variants() -> np.ndarray:
    """int (blocks, pixels, 18): where in a small mask each pixel of its variants lies.

    The first is the mask itself; then come mirrored and turned ones, and ones shifted by a quarter and a half.
    """
    own = np.arange(FIT_SIZE**2).reshape(FIT_SIZE, FIT_SIZE)
    mirrored = [own[:, ::-1], own[::-1], own[::-1, ::-1], own.T, own.T[::-1], own.T[:, ::-1]]
    quarter, half = FIT_SIZE // 4, FIT_SIZE // 2
    shifts = [(a, b) for a in (-quarter, 0, quarter) for b in (-quarter, 0, quarter) if (a, b) != (0, 0)]
    shifts += [(0, half), (half, 0), (half, half)]
    every = np.stack([own, *mirrored, *(np.roll(own, shift, (0, 1)) for shift in shifts)])
    return _blocks(every[..., None])[..., 0].transpose(1, 2, 0).copy()


_VARIANTS = _variants()


def duplicates(samples: pa.Table) -> tuple[list[Problem], list[Problem]]:
    """Photos under two names: (those to leave out, since they are in two splits; warnings)."""
    left_out: list[Problem] = []
    warnings: list[Problem] = []
    for same in _groups(samples, "photo"):
        same = sorted(same, key=lambda row: (KEPT_FIRST[row["split"]], row["name"]))
        first = same[0]
        for row in same[1:]:
            detail = f"the same photo as {first['name']} ({first['split']})"
            across = row["split"] != first["split"]
            problem = Problem(row["name"], "duplicate_across_splits" if across else "duplicate", detail, row["split"])
            (left_out if across else warnings).append(problem)
    gone = {problem.name for problem in left_out}
    for same in _groups(samples, "mask_hash"):
        same = [row for row in same if row["name"] not in gone]
        if same and max(same[0]["pixels"]) < sum(same[0]["pixels"]):  # else it is warned about as one class only
            warnings += [
                Problem(row["name"], "same_mask", f"the same mask as {same[0]['name']}, pixel for pixel", row["split"])
                for row in same[1:]
                if row["photo"] != same[0]["photo"]
            ]
    return left_out, warnings


def _groups(samples: pa.Table, key: str) -> list[list[dict]]:
    """The rows that share their value of a column, where it is not unique."""
    found = defaultdict(list)
    for index, value in enumerate(samples[key].to_pylist()):
        found[value].append(index)
    wanted = samples.select([c for c in ("name", "split", "photo", "pixels") if c in samples.column_names])
    return [[wanted.slice(i, 1).to_pylist()[0] for i in rows] for rows in found.values() if len(rows) > 1]


def suspects(samples: pa.Table, classes: list[str], image_size: int) -> list[Problem]:
    """Masks of one class or, at the network's size, of none, masks that do not fit their photo; what splits lack."""
    found = []
    columns = [samples[c].to_pylist() for c in ("name", "split", "pixels", "mask_fit")]
    for name, split, pixels, fit in zip(*columns, strict=True):
        present = [c for c, count in zip(classes, pixels, strict=True) if count]
        if len(present) == 1:
            found.append(Problem(name, "one_class_only", f"the mask holds nothing but {present[0]}", split))
        elif not present:
            words = f"no labelled pixel of the mask is left at {image_size} px"
            found.append(Problem(name, "nothing_labelled_at_size", words, split))
        elif fit < MISFIT:
            words = f"the mask explains the photo no better than its mirror images do (fit {fit:.2f})"
            found.append(Problem(name, "mask_does_not_fit", words, split))
    for split in unlabelled_splits(samples):
        words = f"no pixel of {split} has a label at {image_size} px, so it has no scores"
        found.append(Problem("", "split_unlabelled", words, split))
    return found + _empty_splits(samples) + _missing_classes(samples, classes, image_size) + _missing_breeds(samples)


def _empty_splits(samples: pa.Table) -> list[Problem]:
    empty = sorted(KEPT_FIRST.keys() - set(samples["split"].to_pylist()))
    return [Problem("", "empty_split", f"{split} has no samples", split) for split in empty]


def _missing_classes(samples: pa.Table, classes: list[str], image_size: int) -> list[Problem]:
    """Classes that a split lacks, and those that its masks hold but have no pixel of at the network's size."""
    found = []
    for split in sorted(set(samples["split"].to_pylist())):
        rows = samples.filter(pa.compute.equal(samples["split"], split))
        pixels = np.sum(rows["pixels"].to_pylist(), axis=0)
        held = set(pa.compute.list_flatten(rows["present"]).to_pylist())
        gone = [name for i, name in enumerate(classes) if not pixels[i] and i in held]
        absent = [name for i, name in enumerate(classes) if not pixels[i] and i not in held]
        if gone:
            words = f"at {image_size} px, {split} has no pixel left of classes in its masks: {_listed(gone)}"
            found.append(Problem("", "class_vanishes", words, split))
        if absent:
            words = f"{split} lacks {len(absent)} of {len(classes)} classes: {_listed(absent)}"
            found.append(Problem("", "class_missing", words, split))
    return found


def unlabelled_splits(samples: pa.Table) -> list[str]:
    """The splits that have samples, and no labelled pixel of any at the network's size."""
    pixels = np.array(samples["pixels"].to_pylist()).sum(axis=1)
    splits = np.array(samples["split"].to_pylist())
    return sorted(split for split in KEPT_FIRST if (splits == split).any() and not pixels[splits == split].any())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _missing_breeds(samples: pa.Table) -> list[Problem]:
    found = []
    breeds = defaultdict(set)
    for split, breed in zip(samples["split"].to_pylist(), samples["breed"].to_pylist(), strict=True):
        breeds[split].add(breed)
    every = set().union(*breeds.values())
    for split in sorted(breeds):
        lacking = sorted(every - breeds[split])
        if lacking:
            words = f"{split} lacks {len(lacking)} of {len(every)} breeds: {_listed(lacking)}"
            found.append(Problem("", "breed_missing", words, split))
    return found
