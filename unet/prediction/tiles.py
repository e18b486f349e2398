"""Overlapping tiles of a photo, and how their predictions are blended into one picture without seams."""

from functools import cache

import numpy as np

Place = tuple[int, int]
"""(top, left) of a tile in the canvas, in pixels."""


@cache
def places(scale: int, size: int) -> tuple[Place, ...]:
    """Where tiles of side `size` cover a square canvas of `scale` times that side; neighbours overlap by half."""
    starts = range(0, (scale - 1) * size + 1, size // 2)
    return tuple((top, left) for top in starts for left in starts)


@cache
def weights(scale: int, size: int) -> np.ndarray:
    """float32 (tiles, size, size): a tile's weight at each of its pixels; over all tiles they sum to one everywhere.

    A raised cosine, so that a tile counts least at its edges, where the network sees least around a pixel.
    """
    slope = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    window, total = np.outer(slope, slope), np.zeros((scale * size, scale * size))
    for top, left in places(scale, size):
        total[top : top + size, left : left + size] += window
    shares = [window / total[top : top + size, left : left + size] for top, left in places(scale, size)]
    return np.array(shares, np.float32)


def cut(canvas: np.ndarray, scale: int) -> np.ndarray:
    """uint8 (tiles, S, S, 3) of a canvas (scale*S, scale*S, 3)."""
    size = len(canvas) // scale
    return np.stack([canvas[top : top + size, left : left + size] for top, left in places(scale, size)])


def blend(tiles: np.ndarray, scale: int) -> np.ndarray:
    """float32 (C, scale*S, scale*S) from the probabilities of each tile, float32 (tiles, C, S, S)."""
    size = tiles.shape[-1]
    canvas = np.zeros((tiles.shape[1], scale * size, scale * size), np.float32)
    for tile, weight, (top, left) in zip(tiles, weights(scale, size), places(scale, size), strict=True):
        canvas[:, top : top + size, left : left + size] += tile * weight
    return canvas
