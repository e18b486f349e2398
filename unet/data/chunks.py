"""Rows of images and masks, copied out of the chunks that hold them."""

from typing import Protocol

import numpy as np
import pyarrow as pa

from unet.classes import IGNORE
from unet.data.order import CHUNK, PADDING
from unet.data.shards import Prepared, pixels

Pixels = tuple[np.ndarray, np.ndarray]
"""Images, uint8 (N, S, S, 3), and masks, uint8 (N, S, S)."""


class Chunks(Protocol):
    """The pixels of chunks by their place in the canonical order."""

    def __getitem__(self, chunk: int, /) -> Pixels: ...


class LazyChunks:
    """Chunks, each read when a row of it is first asked for and released when all its wanted rows were.

    `wanted` are canonical indices, each to be asked for once. With `check`, the chunks' pixels are compared with the
    digests of when they were prepared.
    """

    def __init__(self, prepared: Prepared, split: str, wanted: np.ndarray, check: bool = True):
        self._split, self._size = split, prepared.manifest.image_size
        self._read: dict[int, Pixels] = {}
        self._load = prepared.read_checked if check else prepared.read_chunk
        self._left = dict(
            zip(*(found.tolist() for found in np.unique(wanted // CHUNK, return_counts=True)), strict=True)
        )

    def __getitem__(self, chunk: int) -> Pixels:
        if chunk not in self._read:
            self._read[chunk] = arrays(self._load(self._split, chunk), self._size)
        self._left[chunk] -= 1
        return self._read[chunk] if self._left[chunk] else self._read.pop(chunk)


def arrays(table: pa.Table, size: int) -> Pixels:
    return pixels(table["image"], (size, size, 3)), pixels(table["mask"], (size, size))


def gather(indices: np.ndarray, chunks: Chunks, size: int) -> Pixels:
    """The rows of canonical indices, copied out of their chunks; padding rows are black and ignored."""
    images = np.empty((len(indices), size, size, 3), np.uint8)
    masks = np.empty((len(indices), size, size), np.uint8)
    for row, index in enumerate(indices.tolist()):
        if index == PADDING:
            images[row], masks[row] = 0, IGNORE
        else:
            chunk_images, chunk_masks = chunks[index // CHUNK]
            images[row], masks[row] = chunk_images[index % CHUNK], chunk_masks[index % CHUNK]
    return images, masks
