"""The images that an evaluation's page shows: which, and photo, masks and outlines of each."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from unet.classes import Classes
from unet.data.resize import box_of, letterbox_box
from unet.data.shards import Prepared
from unet.pages.pictures import contour, data_uri, regions

GALLERY = 8
"""Pictures of each of the best, the median and the worst."""
PHOTO, LINES = 256, 600
"""Longest side of a photo and of the lines over it, in pixels."""
TRUTH, PREDICTION = ((86, 200, 255), 9), ((255, 138, 0), 5)
"""Colour and width of the outlines: blue and orange differ for colour-blind readers too, and where both run together
the narrow one lies inside the broad one."""


class ImageGroup(NamedTuple):
    """Rows of the records that are shown together."""

    title: str
    rows: list[int]


def gallery(records: pa.Table) -> list[ImageGroup]:
    """The best, median and worst images by their mean IoU, or all if there are few."""
    ranked = highest(records, "mean_iou")
    if len(ranked) <= 3 * GALLERY:
        return [ImageGroup("All, the best first", ranked)] if ranked else []
    middle = (len(ranked) - GALLERY) // 2
    return [
        ImageGroup("Worst", ranked[: -GALLERY - 1 : -1]),
        ImageGroup("Median", ranked[middle : middle + GALLERY]),
        ImageGroup("Best", ranked[:GALLERY]),
    ]


def highest(records: pa.Table, column: str) -> list[int]:
    """The rows with a value in a column, the highest first, equal ones by name."""
    values, names = records[column].to_pylist(), records["name"].to_pylist()
    return sorted((i for i, v in enumerate(values) if v is not None), key=lambda i: (-values[i], names[i]))


def pictures(
    prepared: Prepared, split: str, records: pa.Table, shown: Sequence[int], doubtful: Sequence[int]
) -> dict[int, dict]:
    """By row of the records: photo, outlines and masks as data URIs, and their position in a square frame."""
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
        shape = record["height"], record["width"]
        classes = prepared.manifest.class_infos if row in doubtful else None
        found[row] = _picture(image[inside], truth[inside], predicted[inside], shape, classes)
        found[row] |= {key: record[key] for key in ("name", "mean_iou", "doubt")}
        found[row]["iou"] = {name: record[f"iou_{name}"] for name in prepared.manifest.classes}
    return found


def _picture(
    image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, original: tuple[int, int], classes: Classes | None
) -> dict:
    """A photo in the shape of its original (height, width), with outlines; the regions of masks only with classes."""
    photo = Image.fromarray(image)
    photo.thumbnail((PHOTO, PHOTO), Image.Resampling.LANCZOS)
    top, left, height, width = letterbox_box(*original, LINES)
    shape = height, width
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
