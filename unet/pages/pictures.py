"""Pictures inside a page: photos, what is drawn over them, and the heights of bars."""

import base64
import io
from functools import reduce

import numpy as np
from PIL import Image

from unet.classes import IGNORE, Classes

STRIPES = (141, 141, 141), (201, 201, 201)
"""What ignored pixels are drawn with."""


def data_uri(picture: Image.Image, kind: str, **options) -> str:
    """A picture as the `src` of an image; `kind` and options are those of Pillow's `save`."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def outlines(mask: np.ndarray, classes: Classes, shape: tuple[int, int]) -> Image.Image:
    """Draw the borders in a mask, uint8 (H, W), as a palette picture of `shape`, transparent inside the regions.

    Each class has its colour on its own side of a border; ignored pixels are striped.
    """
    ids, places = _enlarged(mask, shape)
    clear, striped = len(ids), len(ids) + 1
    drawn = np.where(_near_border(places, 7), places, clear)
    drawn = _with_stripes(drawn, places, ids, striped)
    return _palette(drawn, [*_tones(ids, classes), (0, 0, 0), *STRIPES], [255] * len(ids) + [0, 150, 150])


def contour(mask: np.ndarray, colour: tuple[int, int, int], width: int, shape: tuple[int, int]) -> Image.Image:
    """Draw the borders in a mask, uint8 (H, W), in one colour with a dark seam, as a palette picture of `shape`.

    `width` is the line's, odd, in pixels. Several such lines tell masks apart where `outlines` tells classes apart.
    Ignored pixels are striped.
    """
    ids, places = _enlarged(mask, shape)
    clear, seam, line, striped = range(4)
    drawn = np.where(_near_border(places, width + 2), seam, clear)
    drawn[_near_border(places, width)] = line
    drawn = _with_stripes(drawn, places, ids, striped)
    return _palette(drawn, [(0, 0, 0), (0, 0, 0), colour, *STRIPES], [0, 170, 255, 150, 150])


def regions(mask: np.ndarray, classes: Classes, shape: tuple[int, int]) -> Image.Image:
    """A mask, uint8 (H, W), in the colours of its classes, as an opaque palette picture of `shape`.

    Ignored pixels are striped.
    """
    ids, places = _enlarged(mask, shape)
    drawn = _with_stripes(places, places, ids, len(ids))
    return _palette(drawn, [*_tones(ids, classes), *STRIPES], [])


def _tones(ids: list[int], classes: Classes) -> list[tuple[int, int, int]]:
    return [(0, 0, 0) if index == IGNORE else classes[index].colour for index in ids]


def _with_stripes(drawn: np.ndarray, places: np.ndarray, ids: list[int], first: int) -> np.ndarray:
    """Entries of a palette, where pixels are ignored replaced by `first` and the one after it in turn."""
    if IGNORE not in ids:
        return drawn
    stripes = np.add.outer(*map(np.arange, places.shape)) // 8 % 2
    return np.where(places == ids.index(IGNORE), first + stripes, drawn)


def _palette(drawn: np.ndarray, tones: list[tuple[int, int, int]], opacities: list[int]) -> Image.Image:
    """A picture of palette entries; those without an opacity (0-255) are opaque."""
    picture = Image.fromarray(drawn.astype(np.uint8))
    picture.putpalette(np.array(tones, np.uint8).tobytes())
    if opacities:
        picture.info["transparency"] = bytes(opacities)
    return picture


def _near_border(places: np.ndarray, width: int) -> np.ndarray:
    """Whether a border between two regions lies within the odd `width` around each pixel, bool (H, W)."""
    return _of_square(np.maximum, places, width) != _of_square(np.minimum, places, width)


def _of_square(extreme: np.ufunc, places: np.ndarray, width: int) -> np.ndarray:
    """The extreme of the square of that width around each pixel (Pillow's filters take sixty times as long)."""
    for _ in range(2):  # one axis after the other
        padded = np.pad(places, ((width // 2, width // 2), (0, 0)), "edge")
        places = reduce(extreme, (padded[first : first + len(places)] for first in range(width))).T
    return places


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


def relative(counts: np.ndarray) -> list[float]:
    """Heights of bars in 0..1; a bar that is not empty stays visible."""
    heights = counts / max(counts.max(), 1)
    return np.where(counts > 0, np.maximum(heights, 0.04), 0).tolist()
