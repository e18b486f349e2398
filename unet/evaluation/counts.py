"""Exact confusion counts of many images, only the cells that are not zero: of C * C an image has few."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

CELLS = pa.list_(pa.struct([("cell", pa.int32()), ("pixels", pa.int64())]))
"""An image's counts in a table: each cell (true class * C + predicted class) that holds pixels, and how many."""


def cells_of(confusion: np.ndarray) -> list[dict]:
    """A value of the type `CELLS`, of int64 (C, C) counts, row = truth, column = predicted."""
    confusion = confusion.reshape(-1)
    found = np.flatnonzero(confusion)
    pairs = zip(found.tolist(), confusion[found].tolist(), strict=True)
    return [{"cell": cell, "pixels": pixels} for cell, pixels in pairs]


@dataclass(frozen=True)
class Counts:
    """The counts of N images of C classes, as M cells.

    Attributes:
        images, classes: N and C.
        image: int64 (M,) in 0..N-1.
        cell: int64 (M,), true class * C + predicted class.
        pixels: int64 (M,).
    """

    images: int
    classes: int
    image: np.ndarray
    cell: np.ndarray
    pixels: np.ndarray

    @classmethod
    def of_column(cls, column: pa.ChunkedArray, classes: int) -> "Counts":
        """Of a column of `CELLS` without nulls, one row per image."""
        lists = pa.array([], CELLS) if len(column) == 0 else column.combine_chunks()
        image, cells = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy()), lists.flatten()
        cell, pixels = (cells.field(name).to_numpy(zero_copy_only=False) for name in ("cell", "pixels"))
        return cls(len(lists), classes, image, cell.astype(np.int64), pixels)

    @classmethod
    def of_matrices(cls, confusions: np.ndarray) -> "Counts":
        """Of int64 (N, C, C), row = truth, column = predicted."""
        images, classes = confusions.shape[:2]
        flat = confusions.reshape(images, classes**2)
        image, cell = np.nonzero(flat)
        return cls(images, classes, image, cell, flat[image, cell])

    def __len__(self) -> int:
        return self.images

    def matrices(self) -> np.ndarray:
        """int64 (N, C, C): all cells, mostly zeros."""
        found = np.zeros((self.images, self.classes**2), np.int64)
        found[self.image, self.cell] = self.pixels
        return found.reshape(-1, self.classes, self.classes)

    def total(self) -> np.ndarray:
        """int64 (C, C), summed over the images."""
        found = np.zeros(self.classes**2, np.int64)
        np.add.at(found, self.cell, self.pixels)
        return found.reshape(self.classes, self.classes)

    def sums(self) -> np.ndarray:
        """What the scores are computed from, int64 (N, 3, C): true positives, true pixels, predicted pixels."""
        found = np.zeros((self.images, 3, self.classes), np.int64)
        truth, predicted = np.divmod(self.cell, self.classes)
        hits = truth == predicted
        np.add.at(found[:, 0], (self.image[hits], truth[hits]), self.pixels[hits])
        np.add.at(found[:, 1], (self.image, truth), self.pixels)
        np.add.at(found[:, 2], (self.image, predicted), self.pixels)
        return found

    def where(self, inside: np.ndarray) -> "Counts":
        """Those of the images for which bool (N,) is set."""
        kept, number = inside[self.image], np.cumsum(inside) - 1
        image = number[self.image[kept]]
        return Counts(int(inside.sum()), self.classes, image, self.cell[kept], self.pixels[kept])
