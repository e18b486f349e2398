"""The page of an evaluation: one HTML file, without scripts or anything from the network.

It shows the scores with their uncertainty, where the model fails, and the masks that it most surely disagrees with.
"""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from unet.classes import MANY, Classes
from unet.data.resize import box_of, letterbox_box
from unet.data.shards import Prepared
from unet.evaluation.counts import Counts
from unet.evaluation.intervals import intervals, named, score_vector
from unet.evaluation.records import counts_of
from unet.pages.charts import Axis, training_charts
from unet.pages.numbers import ABSENT, cell_text, percent
from unet.pages.pictures import contour, data_uri, regions, relative
from unet.pages.render import render

GALLERY = 8
"""Pictures each of the best, the median and the worst."""
DOUBTFUL = 12
"""Masks that are shown as likely errors."""
QUARTERS, LEAST_SLICE = 4, 10
"""Parts that images are cut into by a number, and how many images make one."""
BINS = 50
PHOTO, LINES = 256, 600
"""Longest side of a photo and of the lines over it, in pixels."""
TRUTH, PREDICTION = ((86, 200, 255), 9), ((255, 138, 0), 5)
"""Colour and width of the outlines: blue and orange differ for colour-blind readers too, and where both run together
the narrow one lies inside the broad one."""


def evaluation_page(
    metrics: Mapping, records: pa.Table, prepared: Prepared, split: str, history: Sequence[Mapping]
) -> str:
    """The whole page, as text that encodes to UTF-8. Reads the chunks of the samples it shows, one at a time.

    Args:
        metrics: the content of `metrics.json` (`unet.evaluation.summary`, and what was scored on what).
        records: a row an image, with its scores (`unet.evaluation.records.with_scores`), in any order.
        prepared: the data, which hold photo and mask of each image of the records.
        split: their part that was scored.
        history: a record an epoch of the training (`unet.pages.figures.training_curves`); may be empty.

    Raises:
        InputError: the data are damaged.
        KeyError: a record's name is not in the split.
    """
    classes = prepared.manifest.class_infos
    groups, doubtful = gallery(records), _highest(records, "doubt")[:DOUBTFUL]
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
        pictures=_pictures(prepared, split, records, shown, doubtful),
        slices=slices(metrics, records, classes),
        pairs=comparison_rows(metrics),
        colours={"truth": TRUTH[0], "prediction": PREDICTION[0]},
        absent=ABSENT,
    )


class View(NamedTuple):
    """The scores of one way to count the same predictions."""

    title: str
    note: str
    scores: Mapping


def views(metrics: Mapping) -> list[View]:
    """The ways that were counted, that at the network's size first."""
    found = [View("network size", "all pixels of the square that the network sees", metrics)]
    if own := metrics.get("own_size"):
        found.append(View("own size", "predictions enlarged to each photo's own size", own))
    if band := metrics.get("band"):
        note = f"only pixels within {band['width']} px of a border between classes, where masks are hardest"
        found.append(View(f"within {band['width']} px of a border", note, band))
    return found


def binary_rows(metrics: Mapping) -> list[tuple[str, Mapping]]:
    """Pet against background: the way and its scores."""
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
    """Of each cell its share of the row in 0..1, and the words for share and pixels."""
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
    """The `MANY` cells off the diagonal with most pixels, of a matrix that is too large to be shown whole."""
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
    """How the images' mean IoUs spread; None where none has a score."""
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
    """A row a class: in how many images it is scored, and how its IoUs there spread."""
    rows = []
    for item in classes:
        values = records[f"iou_{item.name}"].drop_null().to_numpy()
        bars = np.histogram(values, bins=25, range=(0, 1))[0]
        tenth, median = np.quantile(values, [0.1, 0.5]).tolist() if len(values) else (None, None)
        missed = int((values == 0).sum())
        shown = {"item": item, "images": len(values), "tenth": tenth, "median": median, "missed": missed}
        rows.append(shown | {"bars": relative(bars)})
    return rows


class ImageGroup(NamedTuple):
    """Rows of the records that are shown together."""

    title: str
    rows: list[int]


def gallery(records: pa.Table) -> list[ImageGroup]:
    """The best, the median and the worst images by their mean IoU, or, of few images, all of them."""
    ranked = _highest(records, "mean_iou")
    if len(ranked) <= 3 * GALLERY:
        return [ImageGroup("All, the best first", ranked)] if ranked else []
    middle = (len(ranked) - GALLERY) // 2
    return [
        ImageGroup("Worst", ranked[: -GALLERY - 1 : -1]),
        ImageGroup("Median", ranked[middle : middle + GALLERY]),
        ImageGroup("Best", ranked[:GALLERY]),
    ]


def _highest(records: pa.Table, column: str) -> list[int]:
    """The rows with a value in a column, the highest first, of equal ones by name."""
    values, names = records[column].to_pylist(), records["name"].to_pylist()
    return sorted((i for i, v in enumerate(values) if v is not None), key=lambda i: (-values[i], names[i]))


class Slice(NamedTuple):
    """A part of the images: `mean_iou` and its interval may be None."""

    name: str
    images: int
    mean_iou: float | None
    interval: list[float] | None


class Slicing(NamedTuple):
    """One way to part the images; `ranked`: from the lowest score to the highest, and not in an order of their own."""

    key: str
    title: str
    note: str
    axis: Axis
    slices: list[Slice]


def slices(metrics: Mapping, records: pa.Table, classes: Classes) -> list[Slicing]:
    """The images by species, by breed, by the photos' size and by how much of a photo its subject fills."""
    found = []
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


def _quarters(values: np.ndarray, words, counts: Counts, names: Sequence[str], resamples: int) -> list[Slice]:
    """Images in four parts of about equal number, from low values (N,) to high, with the scores of each.

    Equal values stay together. Where the values do not differ, or images are few, there are fewer parts.
    """
    parts = min(QUARTERS, len(values) // LEAST_SLICE)
    edges = np.unique(np.quantile(values, np.arange(1, parts) / parts, method="lower")) if parts > 1 else []
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


def _megapixels(area: int) -> str:
    return f"{area / 1e6:.2g} MP"


def comparison_rows(metrics: Mapping) -> list[dict]:
    """Of each pair of models the verdict, and the differences that led to it."""
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


def _pictures(
    prepared: Prepared, split: str, records: pa.Table, shown: Sequence[int], doubtful: Sequence[int]
) -> dict[int, dict]:
    """By row of the records: photo, outlines and masks as data URIs, and where they lie in a square frame."""
    taken = records.take(pa.array(shown, pa.int64())).to_pylist()
    wanted = {record["name"] for record in taken}
    places = {name: place for place, name in enumerate(prepared.names(split)) if name in wanted}
    facts = {places[record["name"]]: (row, record) for row, record in zip(shown, taken, strict=True)}
    found = {}
    for place, image, truth in prepared.pick(split, facts):
        row, record = facts[place]
        predicted = np.asarray(Image.open(io.BytesIO(record["predicted"])))
        top, left, height, width = box_of(record["height"], record["width"], len(truth), prepared.manifest.resize)
        inside = slice(top, top + height), slice(left, left + width)
        cut = (part[inside] for part in (image, truth, predicted))
        classes = prepared.manifest.class_infos if row in doubtful else None
        found[row] = _picture(*cut, record["height"], record["width"], classes)
        found[row] |= {key: record[key] for key in ("name", "mean_iou", "doubt")}
        found[row]["iou"] = {name: record[f"iou_{name}"] for name in prepared.manifest.classes}
    return found


def _picture(image, truth, predicted, height: int, width: int, classes: Classes | None) -> dict:
    """A photo in its own shape, with what is drawn over it; the masks' regions only where classes are given."""
    photo = Image.fromarray(image)
    photo.thumbnail((PHOTO, PHOTO), Image.Resampling.LANCZOS)
    top, left, *shape = letterbox_box(height, width, LINES)
    found = {
        "photo": data_uri(photo, "webp", quality=82, method=6),
        "truth": data_uri(contour(truth, *TRUTH, shape), "png", optimize=True),
        "prediction": data_uri(contour(predicted, *PREDICTION, shape), "png", optimize=True),
        "box": [f"{100 * side / LINES:.2f}%" for side in (top, left, *shape)],
    }
    if classes:
        for name, mask in (("truth_regions", truth), ("prediction_regions", predicted)):
            found[name] = data_uri(regions(mask, classes, shape), "png", optimize=True)
    return found
