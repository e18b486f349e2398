"""The scores of parts of an evaluation's images: by species, breed, size of the photo and size of the subject."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from unet.classes import Classes
from unet.evaluation.counts import Counts
from unet.evaluation.intervals import intervals, named, score_vector
from unet.evaluation.records import counts_of
from unet.pages.charts import Axis
from unet.pages.render import percent

QUARTERS, LEAST_SLICE = 4, 10
"""Parts that images are split into by a number, and the fewest images of one."""


class Slice(NamedTuple):
    """A part of the images: `mean_iou` and its interval may be None."""

    name: str
    images: int
    mean_iou: float | None
    interval: list[float] | None


class Slicing(NamedTuple):
    """One way to divide the images, and the axis on which their scores are drawn."""

    key: str
    title: str
    note: str
    axis: Axis
    slices: list[Slice]


def slices(metrics: Mapping, records: pa.Table, classes: Classes) -> list[Slicing]:
    """The images by species, by breed, by photo size and by how much of the photo the subject fills."""
    found: list[tuple[str, str, str, list[Slice]]] = []
    for key in ("species", "breed"):
        rows = [
            Slice(name, part["images"], part["mean_iou"], part["intervals"]["mean_iou"])
            for name, part in metrics[f"by_{key}"].items()
        ]
        rows.sort(key=lambda row: (row.mean_iou is None, row.mean_iou, row.name))
        note = "From the lowest mean IoU to the highest." if len(rows) > QUARTERS else ""
        found.append((key, f"By {key}", note, rows))
    counts = counts_of(records, "confusion", len(classes))
    resamples = (metrics.get("bootstrap") or {}).get("resamples", 0)
    names = [item.name for item in classes]
    area = records["height"].to_numpy().astype(np.int64) * records["width"].to_numpy()
    found.append(("size", "By the photo's own size", "", _quarters(area, _megapixels, counts, names, resamples)))
    by_class = counts.sums()[:, 1]
    largest, valid = int(by_class.sum(0).argmax()), by_class.sum(1) > 0
    subject = 1 - by_class[valid, largest] / by_class[valid].sum(1)
    title = f"By how much of the photo is not {names[largest]}"
    found.append(("subject", title, "", _quarters(subject, percent, counts.where(valid), names, resamples)))
    kept = []
    for key, title, note, rows in found:
        if len(rows) > 1:
            ends = [end for row in rows for end in (row.mean_iou, *(row.interval or ()))]
            kept.append(Slicing(key, title, note, Axis.over(ends), rows))
    return kept


def _quarters(
    values: np.ndarray, words: Callable[[float], str], counts: Counts, names: Sequence[str], resamples: int
) -> list[Slice]:
    """Images in four parts of about equal size, from low values (N,) to high, with the scores of each.

    Equal values stay together. If values do not differ, or there are few images, there are fewer parts.
    """
    parts = min(QUARTERS, len(values) // LEAST_SLICE)
    edges = np.unique(np.quantile(values, np.arange(1, parts) / parts, method="lower")) if parts > 1 else np.empty(0)
    place = np.searchsorted(edges, values)
    found = []
    for part in np.unique(place):
        inside = place == part
        sums = counts.where(inside).sums()
        span = named(intervals({"": sums}, resamples)[""], names)["mean_iou"]
        score = named(score_vector(sums.sum(0)), names)["mean_iou"]
        score = float(score) if np.isfinite(score) else None
        low, high = words(values[inside].min()), words(values[inside].max())
        name = low if low == high else f"{low} – {high}"
        found.append(Slice(name, int(inside.sum()), score, span))
    return found


def _megapixels(area: float) -> str:
    return f"{area / 1e6:.2g} MP"
