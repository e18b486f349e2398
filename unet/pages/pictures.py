"""Pictures inside a page: photos, what is drawn over them, and the heights of bars."""

import base64
import io

import numpy as np
from PIL import Image, ImageFilter

from unet.classes import IGNORE, Classes


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
    if IGNORE in ids:
        stripes = np.add.outer(*map(np.arange, shape)) // 8 % 2
        drawn = np.where(places == ids.index(IGNORE), striped + stripes, drawn)
    tones = [(0, 0, 0) if index == IGNORE else classes[index].colour for index in ids]
    drawn = Image.fromarray(drawn.astype(np.uint8))
    drawn.putpalette(np.array([*tones, (0, 0, 0), (141, 141, 141), (201, 201, 201)], np.uint8).tobytes())
    drawn.info["transparency"] = bytes([255] * len(ids) + [0, 150, 150])
    return drawn


def _near_border(places: np.ndarray, width: int) -> np.ndarray:
    """Whether a border between two regions lies within the odd `width` around each pixel, bool (H, W)."""
    picture = Image.fromarray(places)
    highest, lowest = (picture.filter(kind(width)) for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    return np.asarray(highest) != np.asarray(lowest)


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
