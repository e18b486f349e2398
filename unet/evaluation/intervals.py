"""How far scores would move with other images: bootstrap intervals over images, and paired differences.

An image is drawn with all of its pixels, which are not independent samples. The counts of each resample are summed and
scored as the split is, so the intervals belong to exactly the scores that are shown. They are percentile intervals,
expanded for small numbers of images (Hesterberg, What Teachers Should Know About the Bootstrap, The American
Statistician 2015). They cover the choice of images, not another training of the same network.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

from unet.metrics import iou_and_dice

LEVEL, METHOD, SEED = 0.95, "expanded percentile", 0
LEAST_IMAGES = 10
"""With fewer images no interval is given: they say too little about their spread."""
BLOCK_BYTES = 2**25
NORMAL = NormalDist()


def score_vector(sums: np.ndarray) -> np.ndarray:
    """Scores of many counts at once: (..., 3, C) (`unet.evaluation.counts.Counts.sums`) to float64 (..., 2C + 3).

    IoU by class, Dice by class, mean IoU, mean Dice, accuracy; NaN where there are no pixels to measure it on.
    """
    sums = np.asarray(sums, np.float64)  # exact below 2**53 pixels
    true_positive, truth, predicted = np.moveaxis(sums, -2, 0)
    iou, dice = iou_and_dice(true_positive, truth, predicted)
    present = truth + predicted > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [np.where(present, values, 0).sum(-1) / present.sum(-1) for values in (iou, dice)]
        accuracy = true_positive.sum(-1) / truth.sum(-1)
    return np.concatenate([iou, dice, np.stack([*means, accuracy], -1)], -1)


def named(values: Sequence | np.ndarray, names: Sequence[str]) -> dict:
    """The parts of a `score_vector`, or what was computed from each: iou, dice, mean_iou, mean_dice, accuracy."""
    count = len(names)
    by_class = {"iou": values[:count], "dice": values[count : 2 * count]}
    found = {kind: dict(zip(names, part, strict=True)) for kind, part in by_class.items()}
    return found | dict(zip(("mean_iou", "mean_dice", "accuracy"), values[2 * count :], strict=True))


def intervals(views: dict[str, np.ndarray], resamples: int) -> dict[str, list]:
    """The interval of each score of a `score_vector`, by view; a view is int64 (N, 3, C), the sums of each image.

    A resample has the same images in all views. A score that cannot be measured has no interval.
    """
    return _intervals({name: (view,) for name, view in views.items()}, resamples)


def paired_intervals(before: dict[str, np.ndarray], after: dict[str, np.ndarray], resamples: int) -> dict[str, list]:
    """The intervals of the differences, after - before, of two models that scored the same images in the same order."""
    return _intervals({name: (after[name], view) for name, view in before.items()}, resamples)


def _intervals(views: dict[str, tuple[np.ndarray, ...]], resamples: int) -> dict[str, list]:
    images = len(next(iter(views.values()))[0])
    if resamples == 0 or images < LEAST_IMAGES:
        return {name: [None] * (2 * parts[0].shape[-1] + 3) for name, parts in views.items()}
    flat = [part.reshape(images, -1) for parts in views.values() for part in parts]
    ends = np.cumsum([part.shape[1] for part in flat])[:-1]
    joined = np.concatenate(flat, 1).astype(np.float64)

    def scored(sums: np.ndarray) -> list[np.ndarray]:
        """Each view's scores or differences, (K, 2C + 3), of summed counts (K, all columns)."""
        columns, found = iter(np.split(sums, ends, 1)), []
        for parts in views.values():
            vectors = [score_vector(next(columns).reshape(-1, *part.shape[1:])) for part in parts]
            found.append(vectors[0] - vectors[1] if len(vectors) == 2 else vectors[0])
        return found

    drawn = [scored(weights @ joined) for weights in _weights(images, resamples)]
    tail = tail_of(images)
    found = {}
    for index, name in enumerate(views):
        columns = np.concatenate([block[index] for block in drawn]).T
        found[name] = [_span(column[np.isfinite(column)], tail) for column in columns]
    return found


def _span(resampled: np.ndarray, tail: float) -> list[float] | None:
    return [float(q) for q in np.quantile(resampled, (tail, 1 - tail))] if len(resampled) else None


def tail_of(images: int) -> float:
    """The share of resamples beyond either end of an interval: less than 2.5 %, because a plain percentile interval is
    as narrow as one that takes Student's t for normal and divides by n in place of n - 1."""
    z, freedom = NORMAL.inv_cdf((1 + LEVEL) / 2), images - 1
    # Student's t by its expansion around the normal quantile (Abramowitz and Stegun 26.7.5): to 0.001 from 9 on.
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return NORMAL.cdf(-t * math.sqrt(images / freedom))


def _weights(images: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each image is in each resample, float64 (K, N), in blocks; the same at every call."""
    rng, rows = np.random.default_rng(SEED), max(1, BLOCK_BYTES // (8 * images))
    for first in range(0, resamples, rows):
        count = min(rows, resamples - first)
        drawn = rng.integers(0, images, (count, images)) + images * np.arange(count)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=count * images).reshape(count, images).astype(np.float64)
