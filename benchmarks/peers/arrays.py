"""A prepared folder as arrays in memory, and a test score, for scripts that share no code with the project."""

import argparse
import glob
import time

import numpy as np
import pyarrow.parquet as pq


def arguments(description: str | None, filters: int) -> argparse.Namespace:
    """What a peer is told on its command line; `filters` is the default width of its first level."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("minutes", type=float)
    parser.add_argument("--filters", type=int, default=filters)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, S, S, 3) and masks uint8 (N, S, S; 255 belongs to no class) of a prepared folder."""
    tables = [
        pq.read_table(path, columns=["image", "mask"]) for path in sorted(glob.glob(f"{folder}/{split}-*.parquet"))
    ]
    images, masks = ([row for table in tables for row in table[name].to_pylist()] for name in ("image", "mask"))
    flat = [np.stack([np.frombuffer(row, np.uint8) for row in rows]) for rows in (images, masks)]
    side = round(flat[1].shape[1] ** 0.5)
    return flat[0].reshape(-1, side, side, 3), flat[1].reshape(-1, side, side)


def mean_iou(predict, images: np.ndarray, masks: np.ndarray, classes: int = 3, batch: int = 64) -> float:
    """Of the class ids that `predict` gives for a batch of images, counted over all of them."""
    counts = np.zeros((classes, classes), np.int64)
    for first in range(0, len(images), batch):
        truth, found = masks[first : first + batch].astype(np.int64), predict(images[first : first + batch])
        cells = (truth * classes + found)[truth < classes]
        counts += np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    hits = np.diag(counts)
    return float(np.mean(hits / (counts.sum(0) + counts.sum(1) - hits)))


class Clock:
    """Seconds since it was made."""

    def __init__(self):
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began
