"""Random left-right flips, drawn anew each epoch from a stateless stream."""

import numpy as np


def flips(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Whether each sample (by canonical index) is mirrored in this epoch: bool (len(indices),).

    Keyed by (seed, epoch, sample), so it does not matter who draws it, when, or beside which other samples.
    """
    # The counter sets this stream apart from the one that orders the epoch under the same key.
    key = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1]).random_raw()
    return (_mix(indices.astype(np.uint64) ^ np.uint64(key)) >> np.uint64(63)).astype(bool)


def mirror(images: np.ndarray, masks: np.ndarray, flipped: np.ndarray) -> None:
    """Mirror the flagged samples in place: images (N, H, W, 3), masks (N, H, W), flipped bool (N,)."""
    for row in np.flatnonzero(flipped):
        image = images[row].copy()
        for band in range(image.shape[-1]):  # NumPy moves single bytes four times as fast as pixels of three
            images[row, ..., band] = image[:, ::-1, band]
    masks[flipped] = masks[flipped, :, ::-1]


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood, 2014): every output bit depends on every input bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
