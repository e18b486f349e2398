"""Probabilities at a photo's own size, without TensorFlow: the same numbers as `unet.prediction.resizing`.

Each step is done in float32 and in the order of TensorFlow's `resize` (bilinear, half-pixel centres, no antialiasing),
a band of rows at a time, so that a photo of 100 megapixels needs no more memory than a small one.
"""

from collections.abc import Iterator

import numpy as np

BAND_BYTES = 2**20
"""About the size of a band of probabilities: it stays in a core's cache."""


def bands(probabilities: np.ndarray, height: int, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 (C, rows, width)) of float32 (C, h, w) enlarged to (height, width), from top to bottom."""
    classes, old_height, old_width = probabilities.shape
    (left, right, across), (upper, lower, down) = _axis(old_width, width), _axis(old_height, height)
    rows = max(1, BAND_BYTES // (4 * classes * width))
    for first in range(0, height, rows):
        band = slice(first, first + rows)
        top = upper[first]
        wide = _between(probabilities[:, top : lower[band][-1] + 1], left, right, across, 2)
        yield first, _between(wide, upper[band] - top, lower[band] - top, down[band, None], 1)


def likeliest(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of float32 (C, rows, width): the likeliest class, uint8 (rows, width), the first of equals; and its value."""
    highest, ids = planes[0], np.zeros(planes.shape[1:], np.uint8)
    for index in range(1, len(planes)):
        ids = np.where(planes[index] > highest, np.uint8(index), ids)
        highest = np.maximum(highest, planes[index])
    return ids, highest


def _axis(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` positions: the two of `old` that it lies between, and how far it is from the first."""
    scale = np.float32(old) / np.float32(new)
    place = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    first = np.floor(place)
    lower = np.maximum(first, 0).astype(np.intp)
    return lower, np.minimum(first.astype(np.intp) + 1, old - 1), place - first


def _between(planes: np.ndarray, first: np.ndarray, second: np.ndarray, share: np.ndarray, axis: int) -> np.ndarray:
    found, other = planes.take(first, axis), planes.take(second, axis)
    other -= found
    other *= share
    found += other
    return found
