"""A look at prepared data: one HTML page, without scripts or anything from the network.

The page shows what a person checks before training: what the data are, how classes, breeds and photo sizes are spread,
a contact sheet, the samples most likely to be wrong, and what was left out, repaired or doubted on the way.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from unet.classes import Classes
from unet.data.manifest import SPLITS, Manifest
from unet.data.resize import Resize, box_of
from unet.data.shards import Prepared
from unet.pages.numbers import percent, signed
from unet.pages.pictures import data_uri, outlines, relative
from unet.pages.render import render

SHEET = {"train": 12, "val": 6, "test": 6}
"""Pictures of the contact sheet by split."""
OFFENDERS = 12
"""Most pictures of a group of offenders."""
LONGEST = 200
"""Rows of a table or names of a list before the rest is only counted."""
PHOTO, LINES = 224, 360
"""Sides of a square photo and of the outlines over it, in pixels."""


def data_report(prepared: Prepared) -> str:
    """The whole page, as text that encodes to UTF-8. Reads the chunks of the samples it shows, one at a time."""
    manifest, classes = prepared.manifest, prepared.manifest.class_infos
    samples = Samples.of(prepared.samples(), manifest.image_size, manifest.resize)
    sheet = {split: samples.rows(split)[:count] for split, count in SHEET.items()}
    groups = offenders(samples, classes)
    shown = {row for rows in sheet.values() for row in rows} | {row for group in groups for row, _ in group.rows}
    return render(
        "data/preparing/look.html.jinja",
        manifest=manifest,
        classes=classes,
        splits=[split for split in SPLITS if manifest.counts[split]],
        samples=samples,
        total=len(samples.names),
        class_rows=class_rows(samples, classes),
        breeds=breed_rows(samples),
        sizes=photo_sizes(samples, manifest.image_size) if samples.names else None,
        sheet=sheet,
        groups=groups,
        edges=edge_histogram(samples.mask_fit),
        pictures=_pictures(prepared, samples, shown),
        found={name: manifest.kinds(name).total() for name in ("left_out", "repaired", "warnings")},
        left_out_kinds=manifest.kinds("left_out").most_common(),
        repairs=_repairs(manifest),
        warnings=sorted(manifest.warnings, key=lambda item: item["name"] != ""),
        longest=LONGEST,
    )


@dataclass(frozen=True)
class Samples:
    """The columns of `samples.parquet` for N samples of C classes.

    Attributes:
        names, splits, breeds: N strings each; a breed is "" if unknown.
        heights, widths: of the photos before they were resized, int32 (N,).
        boxes: where photos lie in the square, the rest being padding: top, left, height, width, int64 (N, 4).
        pixels: of each class, int64 (N, C).
        ignored: pixels without a class inside the photo, int64 (N,).
        mask_fit: float64 (N,), NaN where a mask has no border.
    """

    names: list[str]
    splits: np.ndarray
    breeds: list[str]
    heights: np.ndarray
    widths: np.ndarray
    boxes: np.ndarray
    pixels: np.ndarray
    ignored: np.ndarray
    mask_fit: np.ndarray

    @classmethod
    def of(cls, table: pa.Table, image_size: int, resize: Resize) -> "Samples":
        heights, widths, ignored, mask_fit = (
            table.column(name).to_numpy() for name in ("original_height", "original_width", "ignored", "mask_fit")
        )
        box = box_of(heights.astype(np.int64), widths.astype(np.int64), image_size, resize)
        boxes = np.stack(np.broadcast_arrays(*box, heights)[:4], axis=1)
        counts = table.column("pixels").combine_chunks()
        return cls(
            names=table.column("name").to_pylist(),
            splits=np.array(table.column("split").to_pylist(), object),
            breeds=table.column("breed").to_pylist(),
            heights=heights,
            widths=widths,
            boxes=boxes,
            pixels=counts.flatten().to_numpy().reshape(len(table), counts.type.list_size),
            ignored=ignored - (image_size**2 - boxes[:, 2] * boxes[:, 3]),
            mask_fit=mask_fit,
        )

    def rows(self, split: str) -> list[int]:
        """The rows of a split, in canonical order."""
        return np.flatnonzero(self.splits == split).tolist()

    @cached_property
    def shares(self) -> np.ndarray:
        """Each class's share of the pixels that have a class, float64 (N, C)."""
        return self.pixels / np.maximum(self.pixels.sum(axis=1, keepdims=True), 1)


def class_rows(samples: Samples, classes: Classes) -> list[dict]:
    """A row for each class: its share of the labelled pixels and the samples that show it, by split, and its spread."""
    rows = []
    for index, item in enumerate(classes):
        by_split = {}
        for split in SPLITS:
            counts = samples.pixels[samples.splits == split]
            share = counts[:, index].sum() / max(counts.sum(), 1)
            by_split[split] = {"share": float(share), "present": int((counts[:, index] > 0).sum())}
        present = samples.shares[samples.pixels[:, index] > 0, index]
        heights = np.histogram(present, bins=25, range=(0, 1))[0]
        rows.append({"item": item, "by_split": by_split, "spread": relative(heights)})
    return rows


def breed_rows(samples: Samples) -> list[dict]:
    """A row for each breed, the most frequent first: its samples by split; none if no breed is known."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for breed, split in zip(samples.breeds, samples.splits, strict=True):
        found[breed][split] += 1
    if not any(found):
        return []
    rows = [{"name": breed, "total": sum(counts.values()), "by_split": counts} for breed, counts in found.items()]
    return sorted(rows, key=lambda row: (-row["total"], row["name"]))


def photo_sizes(samples: Samples, image_size: int) -> dict:
    """Where photos lie by width and height, on logarithmic axes of one scale, and what stands out in numbers."""
    widths, heights = samples.widths, samples.heights
    low = np.floor(4 * np.log2(min(widths.min(), heights.min()))) / 4 - 0.1
    high = np.ceil(4 * np.log2(max(widths.max(), heights.max()))) / 4 + 0.1
    grid = np.rint(np.log2(np.stack([widths, heights], axis=1)) * 10).astype(int)
    _, cell, counts = np.unique(grid, axis=0, return_inverse=True, return_counts=True)
    middle = [np.bincount(cell.ravel(), side) / counts for side in (widths, heights)]
    across, down = ((np.log2(side) - low) / (high - low) for side in middle)
    radius = np.sqrt(counts / counts.max())
    order = np.argsort(-counts)
    steps = (10, 20, 50) if high - low > 3 else (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)
    ticks = [step * 10**power for power in range(5) for step in steps if low <= np.log2(step * 10**power) <= high]
    area, aspect = widths.astype(np.int64) * heights, np.maximum(widths / heights, heights / widths)
    return {
        "bubbles": [
            {"x": across[i], "y": down[i], "r": radius[i], "n": int(counts[i]), "w": middle[0][i], "h": middle[1][i]}
            for i in order
        ],
        "ticks": [(tick, (np.log2(tick) - low) / (high - low)) for tick in ticks],
        "smallest": _size(samples, area.argmin()),
        "largest": _size(samples, area.argmax()),
        "longest": _size(samples, aspect.argmax()),
        "median": f"{np.median(widths):.0f} × {np.median(heights):.0f}",
        "landscape": int((widths > heights).sum()),
        "square": int((widths == heights).sum()),
        "portrait": int((widths < heights).sum()),
        "aspect": float(aspect.max()),
        "enlarged": int((np.minimum(widths, heights) < image_size).sum()),
    }


def _size(samples: Samples, row: int) -> tuple[str, str]:
    return f"{samples.widths[row]} × {samples.heights[row]}", samples.names[row]


class FindingGroup(NamedTuple):
    """Samples worth a second look for one reason; `rows` are (row of `Samples`, the number that put it there)."""

    reason: str
    found: int | None
    rows: list[tuple[int, str]]


def offenders(samples: Samples, classes: Classes) -> list[FindingGroup]:
    """The groups that are not empty; `found` counts those that are more than the end of a ranking."""
    single = np.flatnonzero(samples.shares.max(axis=1, initial=0) == 1)
    unfit = np.argsort(samples.mask_fit)[: np.isfinite(samples.mask_fit).sum()]
    ignored = samples.ignored / (samples.boxes[:, 2] * samples.boxes[:, 3])
    gaps = np.argsort(-ignored, kind="stable")[: (ignored > 0).sum()]
    groups = [
        FindingGroup("unfit", None, [(row, f"mask fit {signed(samples.mask_fit[row])}") for row in unfit[:OFFENDERS]]),
        FindingGroup(
            "single",
            len(single),
            [(row, _share(samples, classes, row, samples.shares[row].argmax())) for row in single[:OFFENDERS]],
        ),
        FindingGroup("least", None, _extremes(samples, classes, 1)),
        FindingGroup("most", None, _extremes(samples, classes, -1)),
        FindingGroup("ignored", len(gaps), [(row, f"ignored {percent(ignored[row])}") for row in gaps[:OFFENDERS]]),
    ]
    return [group for group in groups if group.rows]


def _extremes(samples: Samples, classes: Classes, sign: int) -> list[tuple[int, str]]:
    """The samples with the least (sign 1) or most (-1) of each class, of many classes the most extreme ones."""
    found = []
    for index in range(len(classes)):
        shares = samples.shares[:, index]
        rows = np.flatnonzero((shares > 0) & (shares < 1))
        chosen = rows[np.argsort(sign * shares[rows], kind="stable")][: max(1, OFFENDERS // len(classes))]
        found += [(sign * shares[row], row, index) for row in chosen]
    if len(found) > OFFENDERS:
        found = sorted(found)[:OFFENDERS]
    return [(row, _share(samples, classes, row, index)) for _, row, index in found]


def _share(samples: Samples, classes: Classes, row: int, index: int) -> str:
    return f"{classes[index].name} {percent(samples.shares[row, index])}"


def edge_histogram(scores: np.ndarray) -> dict | None:
    """How mask fits spread, float64 (N,), NaN left out: bars, the range they cover, and where zero lies in it."""
    scores = scores[np.isfinite(scores)]
    if len(scores) == 0:
        return None
    low, high = min(scores.min(), 0), max(scores.max(), 1)
    bars = np.histogram(scores, bins=60, range=(low, high))[0]
    return {
        "bars": relative(bars),
        "low": float(low),
        "high": float(high),
        "zero": float(-low / (high - low)),
        "median": float(np.median(scores)),
        "below": int((scores < 0).sum()),
    }


def _pictures(prepared: Prepared, samples: Samples, shown: set[int]) -> dict[int, dict]:
    """By row of `samples`: the photo and the outlines over it as data URIs, and where it lies in the square."""
    found = {}
    for split in SPLITS:
        rows = samples.rows(split)
        for place, image, mask in prepared.pick(split, [row - rows[0] for row in rows if row in shown]):
            row = rows[place]
            found[row] = _picture(image, mask, samples.boxes[row], prepared.manifest.class_infos)
    return found


def _picture(image: np.ndarray, mask: np.ndarray, box: np.ndarray, classes: Classes) -> dict:
    size, (top, left, height, width) = len(mask), box
    inside = slice(top, top + height), slice(left, left + width)
    photo = Image.fromarray(image[inside])
    photo.thumbnail((PHOTO, PHOTO), Image.Resampling.LANCZOS)
    lines = outlines(mask[inside], classes, tuple(max(1, round(LINES * side / size)) for side in (height, width)))
    return {
        "photo": data_uri(photo, "jpeg", quality=85),
        "lines": data_uri(lines, "png", optimize=True),
        "box": [f"{100 * side / size:.2f}%" for side in (top, left, height, width)],
    }


def _repairs(manifest: Manifest) -> list[tuple[str, int, list[str]]]:
    """Each repair, the most frequent first: how many samples it concerns, and the names of those that are listed."""
    names = defaultdict(list)
    for item in manifest.repaired:
        names[item["repair"]].append(item["name"])
    return [(repair, count, names[repair]) for repair, count in manifest.kinds("repaired").most_common()]
