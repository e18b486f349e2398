"""Masks in the colours of their classes, over photos and on their own, and pictures inside a page."""

import base64
import io
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from unet.borders import near_change
from unet.classes import IGNORE, Classes, ClassInfo

Colour = tuple[int, int, int]

STRIPES: tuple[Colour, Colour] = (141, 141, 141), (201, 201, 201)
"""What ignored pixels are drawn with."""
OPACITY, IGNORED_OPACITY = 141 / 255, 225 / 255
"""Of the colours of classes and of the stripes, over a photo."""
PALE, CONTRAST = 60, 0.75
"""Brightness and contrast of a photo under colours: a ginger cat must not pass for the colour of its class."""


def overlay(grey: np.ndarray, ids: np.ndarray, classes: Sequence[ClassInfo], edged: bool = False) -> Image.Image:
    """The colours of the classes over a pale grey photo, in RGB; `grey` and `ids` are uint8 (H, W).

    `edged` gives each region an edge of its full colour, which keeps it sharp where its translucent colour would melt
    into the photo. Ignored pixels are striped.
    """
    table, light, full = _blended(tuple(info.colour for info in classes))
    height, width = ids.shape
    edges = near_change(ids, 1) if edged else None
    picture, rows = Image.new("RGB", (width, height)), max(1, 2**20 // width)
    for first in range(0, height, rows):
        part = slice(first, first + rows)
        keys = ids[part].astype(np.uint16)
        keys <<= 8
        keys |= grey[part]
        pixels = table.take(keys)
        if (ignored := ids[part] == IGNORE).any():
            ignored &= _stripes(ignored.shape, first) == 1
            pixels[ignored] = light[grey[part][ignored]]
        if edges is not None:
            pixels[edges[part]] = full[ids[part][edges[part]]]
        picture.paste(Image.frombuffer("RGB", pixels.shape[::-1], pixels, "raw", "RGBX", 0, 1), (0, first))
    return picture


@lru_cache(maxsize=4)
def _blended(colours: tuple[Colour, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RGBX pixels as uint32: by id * 256 + grey value (65536,), light stripes by grey value, full colours by id."""
    pale = PALE + CONTRAST * np.arange(256)[:, None]

    def over(colour: np.ndarray, opacity: float) -> np.ndarray:
        blended = np.zeros((*np.broadcast_shapes(colour.shape[:-1], (256,)), 4), np.uint8)
        blended[..., :3] = np.round((1 - opacity) * pale + opacity * colour)
        return blended.view(np.uint32).reshape(-1)

    tones = np.zeros((256, 1, 3))
    tones[: len(colours), 0] = colours
    table = over(tones, OPACITY)
    dark, light = (over(np.array(stripe), IGNORED_OPACITY) for stripe in STRIPES)
    table[IGNORE * 256 :] = dark
    full = np.zeros((256, 4), np.uint8)
    full[:, :3], full[IGNORE, :3] = tones[:, 0], STRIPES[0]
    return table, light, full.view(np.uint32).reshape(-1)


def _stripes(shape: tuple[int, ...], first: int = 0) -> np.ndarray:
    """Diagonal stripes, 0 and 1 in turn, int64 (H, W), of rows that begin at `first`."""
    return np.add.outer(np.arange(first, first + shape[0]), np.arange(shape[1])) // 8 % 2


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
    drawn = np.where(near_change(places, 3), places, clear)
    drawn = _with_stripes(drawn, places, ids, striped)
    return _palette(drawn, [*_tones(ids, classes), (0, 0, 0), *STRIPES], [255] * len(ids) + [0, 150, 150])


def contour(mask: np.ndarray, colour: Colour, width: int, shape: tuple[int, int]) -> Image.Image:
    """Draw the borders in a mask, uint8 (H, W), in one colour with a dark seam, as a palette picture of `shape`.

    `width` is the line's, odd, in pixels. Several such lines tell masks apart where `outlines` tells classes apart.
    Ignored pixels are striped.
    """
    ids, places = _enlarged(mask, shape)
    clear, seam, line, striped = range(4)
    drawn = np.where(near_change(places, width // 2 + 1), seam, clear)
    drawn[near_change(places, width // 2)] = line
    drawn = _with_stripes(drawn, places, ids, striped)
    return _palette(drawn, [(0, 0, 0), (0, 0, 0), colour, *STRIPES], [0, 170, 255, 150, 150])


def regions(mask: np.ndarray, classes: Classes, shape: tuple[int, int]) -> Image.Image:
    """A mask, uint8 (H, W), in the colours of its classes, as an opaque palette picture of `shape`.

    Ignored pixels are striped.
    """
    ids, places = _enlarged(mask, shape)
    drawn = _with_stripes(places, places, ids, len(ids))
    return _palette(drawn, [*_tones(ids, classes), *STRIPES], [])


def _tones(ids: list[int], classes: Classes) -> list[Colour]:
    return [(0, 0, 0) if index == IGNORE else classes[index].colour for index in ids]


def _with_stripes(drawn: np.ndarray, places: np.ndarray, ids: list[int], first: int) -> np.ndarray:
    """Entries of a palette, where pixels are ignored replaced by `first` and the one after it in turn."""
    if IGNORE not in ids:
        return drawn
    return np.where(places == ids.index(IGNORE), first + _stripes(places.shape), drawn)


def _palette(drawn: np.ndarray, tones: list[Colour], opacities: list[int]) -> Image.Image:
    """A picture of palette entries; those without an opacity (0-255) are opaque."""
    picture = Image.fromarray(drawn.astype(np.uint8))
    picture.putpalette(np.array(tones, np.uint8).tobytes())
    if opacities:
        picture.info["transparency"] = bytes(opacities)
    return picture


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
