"""The page of an evaluation: one HTML file, without scripts or anything from the network.

It shows the scores with their uncertainty, where the model fails, and the masks it disagrees with most confidently.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from unet.classes import MANY, Classes
from unet.data.shards import Prepared
from unet.evaluation.gallery import PREDICTION, TRUTH, gallery, highest, pictures
from unet.evaluation.slices import slices
from unet.pages.charts import Axis, training_charts
from unet.pages.numbers import cell_text
from unet.pages.pictures import relative
from unet.pages.render import render

DOUBTFUL = 12
"""Masks shown as likely label errors."""
BINS = 50


def evaluation_page(
    metrics: Mapping, records: pa.Table, prepared: Prepared, split: str, history: Sequence[Mapping]
) -> str:
    """The whole page, as text to encode in UTF-8. Reads the chunks of the samples that it shows, one at a time.

    Args:
        metrics: the content of `metrics.json` (`unet.evaluation.summary`, and which model was scored on which data).
        records: a row per image, with its scores (`unet.evaluation.records.with_scores`), in any order.
        prepared: the data, which hold photo and mask of each image of the records.
        split: their part that was scored.
        history: a record per epoch of the training (`unet.pages.figures.training_curves`); may be empty.

    Raises:
        InputError: the data are damaged.
        KeyError: a record's name is not in the split.
    """
    classes = prepared.manifest.class_infos
    groups, doubtful = gallery(records), highest(records, "doubt")[:DOUBTFUL]
    shown = sorted({row for group in groups for row in group.rows} | set(doubtful))
    images = _scores_of_images(records)
    return render(
        "evaluation/page.html.jinja",
        metrics=metrics,
        manifest=prepared.manifest,
        split=split,
        classes=classes,
        views=views(metrics),
        score_axis=Axis.over(_ends(metrics)),
        binary=binary_rows(metrics),
        charts=training_charts(history, classes),
        confusion=confusion_rows(metrics["confusion"]) if len(classes) <= MANY else [],
        mistaken=mistaken(metrics["confusion"], classes) if len(classes) > MANY else [],
        images=images,
        spreads=spreads(records, classes),
        groups=groups,
        doubtful=doubtful,
        pictures=pictures(prepared, split, records, shown, doubtful),
        slices=slices(metrics, records, classes),
        pairs=comparison_rows(metrics),
        colours={"truth": TRUTH[0], "prediction": PREDICTION[0]},
    )


class View(NamedTuple):
    """The scores of the same predictions, counted in one way."""

    title: str
    note: str
    scores: Mapping


def views(metrics: Mapping) -> list[View]:
    """The ways that were counted, the network's size first."""
    found = [View("network size", "all pixels of the square that the network sees", metrics)]
    if own := metrics.get("own_size"):
        found.append(View("own size", "predictions enlarged to each photo's own size", own))
    if band := metrics.get("band"):
        note = f"only pixels within {band['width']} px of a border between classes, where masks are hardest"
        found.append(View(f"within {band['width']} px of a border", note, band))
    return found


def binary_rows(metrics: Mapping) -> list[tuple[str, Mapping]]:
    """Pet against background: how the outline counts, and the scores."""
    words = {"outline_as_pet": "outline counted as pet", "outline_ignored": "outline ignored"}
    found = []
    for suffix, part in (("", metrics), (", own size", metrics.get("own_size") or {})):
        found += [(words[way] + suffix, scores) for way, scores in (part.get("binary") or {}).items()]
    return found


def _ends(part: Mapping) -> list[float | None]:
    """The IoUs of some scores and the ends of their intervals."""
    spans = part["intervals"]
    found = [part["mean_iou"], *part["iou"].values()]
    return found + [end for span in (spans["mean_iou"], *spans["iou"].values()) for end in span or ()]


def confusion_rows(confusion: Sequence[Sequence[int]]) -> list[list[dict]]:
    """For each cell its share of the row in 0..1, and the text for share and pixels."""
    rows = []
    for row in confusion:
        total = sum(row)
        texts = [cell_text(pixels, total) for pixels in row]
        rows.append(
            [
                {"share": pixels / max(total, 1), "words": words, "pixels": shown, "exact": pixels}
                for pixels, (words, shown) in zip(row, texts, strict=True)
            ]
        )
    return rows


def mistaken(confusion: Sequence[Sequence[int]], classes: Classes) -> list[dict]:
    """The `MANY` off-diagonal cells with most pixels, of a matrix too large to be shown whole."""
    counts = np.array(confusion, np.int64)
    totals = counts.sum(1)
    np.fill_diagonal(counts, 0)
    rows = []
    for cell in np.argsort(-counts, axis=None, kind="stable")[:MANY].tolist():
        truth, predicted = divmod(cell, len(classes))
        if pixels := int(counts[truth, predicted]):
            words = cell_text(pixels, int(totals[truth]))[0]
            rows.append({"truth": classes[truth], "predicted": classes[predicted], "pixels": pixels, "share": words})
    return rows


def _scores_of_images(records: pa.Table) -> dict | None:
    """The distribution of the images' mean IoUs; None if no image has a score."""
    values = records["mean_iou"].drop_null().to_numpy()
    if len(values) == 0:
        return None
    tenth, median = np.quantile(values, [0.1, 0.5])
    bars = np.histogram(values, bins=BINS, range=(0, 1))[0]
    return {
        "bars": relative(bars),
        "scored": len(values),
        "lowest": float(values.min()),
        "tenth": float(tenth),
        "median": float(median),
        "highest": float(values.max()),
    }


def spreads(records: pa.Table, classes: Classes) -> list[dict]:
    """A row per class: in how many images it is scored, and the distribution of its IoUs there."""
    rows = []
    for item in classes:
        values = records[f"iou_{item.name}"].drop_null().to_numpy()
        bars = np.histogram(values, bins=25, range=(0, 1))[0]
        tenth, median = np.quantile(values, [0.1, 0.5]).tolist() if len(values) else (None, None)
        missed = int((values == 0).sum())
        shown = {"item": item, "images": len(values), "tenth": tenth, "median": median, "missed": missed}
        rows.append(shown | {"bars": relative(bars)})
    return rows


def comparison_rows(metrics: Mapping) -> list[dict]:
    """For each pair of models the verdict, and the differences behind it."""
    if not metrics.get("comparison"):
        return []
    titles = {"network_size": "", "band": ", near borders", "own_size": ", own size"}
    found = []
    for pair in metrics["comparison"]["pairs"]:
        rows = []
        for part, suffix in titles.items():
            if part in pair:
                rows.append((f"mean{suffix}", pair[part]["mean_iou"]))
            if part == "network_size":
                rows += pair[part]["iou"].items()
        ends = [0.0, *(end for _, one in rows for end in (one["value"], *(one["interval"] or ())))]
        found.append(
            {"a": pair["a"], "b": pair["b"], "verdict": pair["verdict"], "rows": rows, "axis": Axis.over(ends)}
        )
    return found
