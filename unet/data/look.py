"""A look at prepared data: one HTML page, without scripts or anything from the network.

The page shows what a person checks before training: what the data are, how classes, breeds and photo sizes are spread,
a contact sheet, the samples most likely to be wrong, and what was left out, repaired or doubted on the way.
"""

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image, ImageFilter

from unet.classes import IGNORE, Classes
from unet.data.order import CHUNK
from unet.data.resize import Resize, box_of
from unet.data.shards import SPLITS, Prepared, pixels

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
    environment = Environment(
        loader=PackageLoader("unet.data", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "signed": signed, "rgb": _rgb, "breakable": _breakable}
    environment.filters["thousands"] = "{:,}".format
    page = environment.get_template("look.html.jinja").render(
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
        left_out_kinds=Counter(item["problem"] for item in manifest.left_out).most_common(),
        repairs=_repairs(manifest.repaired),
        warnings=sorted(manifest.warnings, key=lambda item: item["name"] != ""),
        longest=LONGEST,
    )
    # A file name that is no UTF-8 reaches Python as lone surrogates, which no file can be written with.
    return page.encode(errors="backslashreplace").decode()


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
    """A row a class: its share of the classified pixels and the samples that show it by split, and how it spreads."""
    rows = []
    for index, item in enumerate(classes):
        by_split = {}
        for split in SPLITS:
            counts = samples.pixels[samples.splits == split]
            share = counts[:, index].sum() / max(counts.sum(), 1)
            by_split[split] = {"share": float(share), "present": int((counts[:, index] > 0).sum())}
        present = samples.shares[samples.pixels[:, index] > 0, index]
        heights = np.histogram(present, bins=25, range=(0, 1))[0]
        rows.append({"item": item, "by_split": by_split, "spread": _relative(heights)})
    return rows


def breed_rows(samples: Samples) -> list[dict]:
    """A row a breed, the most frequent first: its samples by split; none if no breed is known."""
    found = defaultdict(Counter)
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


class Group(NamedTuple):
    """Samples worth a second look for one reason; `rows` are (row of `Samples`, the number that put it there)."""

    reason: str
    found: int | None
    rows: list[tuple[int, str]]


def offenders(samples: Samples, classes: Classes) -> list[Group]:
    """The groups that are not empty; `found` counts those that are no mere end of a ranking."""
    single = np.flatnonzero(samples.shares.max(axis=1, initial=0) == 1)
    unfit = np.argsort(samples.mask_fit)[: np.isfinite(samples.mask_fit).sum()]
    ignored = samples.ignored / (samples.boxes[:, 2] * samples.boxes[:, 3])
    gaps = np.argsort(-ignored, kind="stable")[: (ignored > 0).sum()]
    groups = [
        Group("unfit", None, [(row, f"mask fit {signed(samples.mask_fit[row])}") for row in unfit[:OFFENDERS]]),
        Group(
            "single",
            len(single),
            [(row, _share(samples, classes, row, samples.shares[row].argmax())) for row in single[:OFFENDERS]],
        ),
        Group("least", None, _extremes(samples, classes, 1)),
        Group("most", None, _extremes(samples, classes, -1)),
        Group("ignored", len(gaps), [(row, f"ignored {percent(ignored[row])}") for row in gaps[:OFFENDERS]]),
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
        "bars": _relative(bars),
        "low": float(low),
        "high": float(high),
        "zero": float(-low / (high - low)),
        "median": float(np.median(scores)),
        "below": int((scores < 0).sum()),
    }


def percent(share: float) -> str:
    """Return a share such as 0.123 as "12.3 %"; rounding never makes some into none or nearly all into all."""
    if share in (0, 1):
        number = f"{100 * share:.0f}"
    else:
        number = f"{100 * share:.1f}"
        number = {"0.0": "<0.1", "100.0": ">99.9"}.get(number, number)
    return f"{number}\N{NO-BREAK SPACE}%"


def outlines(mask: np.ndarray, classes: Classes, shape: tuple[int, int]) -> Image.Image:
    """Draw the borders in a mask, uint8 (H, W), as a palette picture of `shape`, transparent inside the regions.

    Each class has its colour on its own side of a border; ignored pixels are striped.
    """
    ids, places = _enlarged(mask, shape)
    picture = Image.fromarray(places)
    highest, lowest = (np.asarray(picture.filter(kind(7))) for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    clear, striped = len(ids), len(ids) + 1
    drawn = np.where(highest != lowest, places, clear)
    if IGNORE in ids:
        stripes = np.add.outer(*map(np.arange, shape)) // 8 % 2
        drawn = np.where(places == ids.index(IGNORE), striped + stripes, drawn)
    tones = [(0, 0, 0) if index == IGNORE else classes[index].colour for index in ids]
    drawn = Image.fromarray(drawn.astype(np.uint8))
    drawn.putpalette(np.array([*tones, (0, 0, 0), (141, 141, 141), (201, 201, 201)], np.uint8).tobytes())
    drawn.info["transparency"] = bytes([255] * len(ids) + [0, 150, 150])
    return drawn


def _enlarged(mask: np.ndarray, shape: tuple[int, int]) -> tuple[list[int], np.ndarray]:
    """The ids in a mask (the most frequent) and, at each pixel of a picture of `shape`, the place of its id, uint8."""
    values, counts = np.unique(mask, return_counts=True)
    # A palette holds 256 colours, three of which are not of classes.
    ids = sorted(values[np.argsort(-counts, kind="stable")[:253]].tolist())
    best, places = np.full(shape, -1, np.int16), np.zeros(shape, np.uint8)
    for place, index in enumerate(ids):
        # Bilinear weights of each class, compared, give borders without the steps of the mask's pixels.
        region = Image.fromarray(np.uint8(mask == index) * 255)
        weight = np.asarray(region.resize(shape[::-1], Image.Resampling.BILINEAR), np.int16)
        places[weight > best] = place
        best = np.maximum(best, weight)
    return ids, places


def _pictures(prepared: Prepared, samples: Samples, shown: Iterable[int]) -> dict[int, dict]:
    """By row of `samples`: the photo and the outlines over it as data URIs, and where it lies in the square."""
    size = prepared.manifest.image_size
    first = {split: samples.rows(split)[:1] for split in SPLITS}
    chunks = defaultdict(list)
    for row in sorted(shown):
        chunk, place = divmod(row - first[samples.splits[row]][0], CHUNK)
        chunks[samples.splits[row], chunk].append((row, place))
    found = {}
    for (split, chunk), wanted in chunks.items():
        table = prepared.read_chunk(split, chunk)
        images, masks = pixels(table.column("image"), (size, size, 3)), pixels(table.column("mask"), (size, size))
        for row, place in wanted:
            found[row] = _picture(images[place], masks[place], samples.boxes[row], prepared.manifest.class_infos)
    return found


def _picture(image: np.ndarray, mask: np.ndarray, box: np.ndarray, classes: Classes) -> dict:
    size, (top, left, height, width) = len(mask), box
    inside = slice(top, top + height), slice(left, left + width)
    photo = Image.fromarray(image[inside])
    photo.thumbnail((PHOTO, PHOTO), Image.Resampling.LANCZOS)
    lines = outlines(mask[inside], classes, tuple(max(1, round(LINES * side / size)) for side in (height, width)))
    return {
        "photo": _uri(photo, "jpeg", quality=85),
        "lines": _uri(lines, "png", optimize=True),
        "box": [f"{100 * side / size:.2f}%" for side in (top, left, height, width)],
    }


def _uri(picture: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _repairs(repaired: Sequence[dict]) -> list[tuple[str, list[str]]]:
    """The names of the samples that each repair mended, the most frequent repair first."""
    found = defaultdict(list)
    for item in repaired:
        found[item["repair"]].append(item["name"])
    return sorted(found.items(), key=lambda pair: -len(pair[1]))


def _relative(counts: np.ndarray) -> list[float]:
    """Heights of bars in 0..1; a bar that is not empty stays visible."""
    heights = counts / max(counts.max(), 1)
    return np.where(counts > 0, np.maximum(heights, 0.04), 0).tolist()


def _rgb(colour: tuple[int, int, int]) -> str:
    return "rgb({:d} {:d} {:d})".format(*colour)


def signed(number: float) -> str:
    return f"{number:.2f}".replace("-", "−")


def _breakable(name: str) -> Markup:
    """A name as HTML that may break after its underscores."""
    return Markup(str(escape(name)).replace("_", "_<wbr>"))
