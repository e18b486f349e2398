"""From the records of every image to the scores of a model, and to the differences between two models."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pyarrow as pa

from unet import metrics
from unet.classes import PETS
from unet.evaluation import intervals
from unet.evaluation.counts import Counts
from unet.evaluation.records import counts_of, is_measured
from unet.recipe.loss import Loss, LossSettings

BINARY = ("pet", "background")
VIEWS = {"": "confusion", "band": "confusion_band", "own_size": "confusion_own"}
"""The counts of the network's size (""), and of what is scored beside it by the name of its part of `metrics.json`."""


def _views(records: pa.Table, names: Sequence[str]) -> dict[str, Counts]:
    """Those of `VIEWS` that were measured."""
    measured = {part: column for part, column in VIEWS.items() if is_measured(records, column)}
    return {part: counts_of(records, column, len(names)) for part, column in measured.items()}


def binary_views(counts: Counts, names: Sequence[str]) -> dict[str, Counts]:
    """Counts of pet, background and outline as those of pet and background, in the two ways that are common.

    outline_as_pet: the outline is a part of the pet, in truth and prediction.
    outline_ignored: pixels of the true outline are left out; an outline predicted elsewhere counts as pet.
    Other classes have no such views.
    """
    if [c.name for c in PETS.classes] != list(names):
        return {}
    confusions = counts.matrices()
    predicted = np.stack([confusions[..., 0] + confusions[..., 2], confusions[..., 1]], -1)
    merged = np.stack([predicted[:, 0] + predicted[:, 2], predicted[:, 1]], 1)
    found = {"outline_as_pet": merged, "outline_ignored": predicted[:, :2]}
    return {way: Counts.of_matrices(confusions) for way, confusions in found.items()}


def summary(records: pa.Table, names: Sequence[str], band: int, resamples: int, loss: LossSettings) -> dict:
    """The scores of a split, ready for JSON, from its records (`unet.evaluation.records`), of which there are some.

    At the network's size: the result of `unet.metrics.scores`, `loss`, `images`, `intervals`, `binary`, `per_image`
    (means over images). `band` and `own_size` hold the same for their pixels; `by_breed` and `by_species` for their
    images.
    """
    counts = _views(records, names)
    binary = {part: binary_views(found, names) for part, found in counts.items() if part != "band"}
    views = counts | {f"{part}/{way}": found for part, ways in binary.items() for way, found in ways.items()}
    spans = intervals.intervals({part: view.sums() for part, view in views.items()}, resamples)
    found = {
        part: _scored(view, names, spans[part]) | {"per_image": _per_image(view, names)}
        for part, view in counts.items()
    }
    for part, ways in binary.items():
        scored = {way: _scored(view, BINARY, spans[f"{part}/{way}"]) for way, view in ways.items()}
        found[part]["binary"] = scored or None
    result = found.pop("")
    result["loss"] = Loss(loss, len(names)).mean_of(np.sum(records["loss_sums"].to_pylist(), 0))
    how = {"level": intervals.LEVEL, "method": intervals.METHOD, "resamples": resamples, "seed": intervals.SEED}
    result["bootstrap"] = how if resamples else None
    found["band"]["width"] = band
    result |= found
    for group in ("breed", "species"):
        result[f"by_{group}"] = _by_group(records, group, names, resamples)
    return result


def _scored(counts: Counts, names: Sequence[str], spans: list) -> dict:
    result = metrics.scores(counts.total(), names) | {"images": len(counts)}
    return result | {"intervals": intervals.named(spans, names)}


def _per_image(counts: Counts, names: Sequence[str]) -> dict:
    """Means over images: each weighs the same, whatever its size; a class that an image lacks does not count."""
    columns = [column[np.isfinite(column)] for column in intervals.score_vector(counts.sums()).T]
    return intervals.named([float(column.mean()) if len(column) else None for column in columns], names)


def _by_group(records: pa.Table, group: str, names: Sequence[str], resamples: int) -> dict:
    """The scores by breed or species, at the network's size; empty if none is known."""
    labels, every = np.array(records[group].to_pylist(), dtype=object), counts_of(records, "confusion", len(names))
    found = {}
    for label in sorted({label for label in labels if label}):
        counts = every.where(labels == label)
        found[label] = _scored(counts, names, intervals.intervals({"": counts.sums()}, resamples)[""])
    return found


def compare(labels: Sequence[str], tables: Sequence[pa.Table], names: Sequence[str], resamples: int) -> dict:
    """Each pair of models on the same images: how much more the later one scores, with paired intervals.

    Both are scored on the same resamples, so what is hard for both cancels out of the difference.
    """
    sums = [{part: view.sums() for part, view in _views(table, names).items()} for table in tables]
    pairs = []
    for (a, before), (b, after) in combinations(zip(labels, sums, strict=True), 2):
        spans = intervals.paired_intervals(before, after, resamples)
        differences = {}
        for part in before:
            change = intervals.score_vector(after[part].sum(0)) - intervals.score_vector(before[part].sum(0))
            values = [float(v) if np.isfinite(v) else None for v in change]
            both = [{"value": value, "interval": span} for value, span in zip(values, spans[part], strict=True)]
            differences[part or "network_size"] = intervals.named(both, names)
        pairs.append(
            {"a": a, "b": b, "verdict": _verdict(a, b, differences["network_size"]["mean_iou"], resamples)}
            | differences
        )
    return {"models": list(labels), "pairs": pairs}


def _verdict(a: str, b: str, difference: dict, resamples: int) -> str:
    """Better, worse or no significant difference, by the interval of the difference in mean IoU."""
    value, span = difference["value"], difference["interval"]
    if value is not None and not resamples:
        return f"Whether {b} and {a} differ by more than chance is unknown without intervals: mean IoU {value:+.4f}."
    if value is None or span is None:
        return f"{b} and {a} cannot be compared: there is nothing to measure, or there are too few images."
    amount = f"mean IoU {value:+.4f} (95 %: {span[0]:+.4f} to {span[1]:+.4f})"
    if span[0] > 0 or span[1] < 0:
        return f"{b} is {'better' if value > 0 else 'worse'} than {a}: {amount}."
    return f"No significant difference between {b} and {a}: {amount}."
