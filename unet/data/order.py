"""The order of training: which sample stands where in an epoch, a pure function of (seed, epoch).

The canonical order of a split is by the hash of the sample's name; a chunk is 256 samples of it, one Parquet row
group. An epoch shuffles the chunks, then the samples inside windows of as many chunks as `WINDOW_BYTES` hold, so the
same order can be held in memory or streamed from disk with one window in hand. A global batch is a slice of the order;
worker r takes its consecutive share of it. Nothing here knows of files, Ray or TensorFlow.

Why: docs/decisions.md#a-window-of-268-mb
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CHUNK = 256
WINDOW_BYTES = 2**28
"""Memory that the pixels of a window may take."""
PADDING = -1
"""The index that fills a short last batch; its pixels count nowhere."""


def sample_bytes(image_size: int) -> int:
    """Memory that the pixels of a sample take: a photo of three bands and a mask, uint8."""
    return image_size**2 * 4


def window_of(image_size: int) -> int:
    """The chunks of a window: 16 at 128 px, and at least one, which is more than `WINDOW_BYTES` beyond 512 px."""
    return max(1, WINDOW_BYTES // (CHUNK * sample_bytes(image_size)))


def epoch_order(samples: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """The canonical indices 0..samples-1 in the order of training of one epoch: int64 (samples,).

    `window` is in chunks.
    """
    generator = _generator(seed, epoch)
    chunks = generator.permutation(_chunks(samples))
    pieces = []
    for first in range(0, len(chunks), window):
        indices = np.concatenate([chunk_indices(chunk, samples) for chunk in chunks[first : first + window]])
        pieces.append(generator.permutation(indices))
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def window_ends(samples: int, seed: int, epoch: int, window: int) -> list[int]:
    """Where the windows of that order end, in samples; the last at `samples`."""
    chunks = _generator(seed, epoch).permutation(_chunks(samples))
    # The split's last chunk may be short, and stands anywhere.
    ends = np.cumsum(np.minimum(CHUNK, samples - chunks * CHUNK))
    return [*ends[window - 1 : -1 : window].tolist(), samples]


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, epoch]))


def _chunks(samples: int) -> int:
    return -(-samples // CHUNK)


def chunk_indices(chunk: int, samples: int) -> np.ndarray:
    """The canonical indices of one chunk; the last chunk of a split may be short."""
    return np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, samples), dtype=np.int64)


@dataclass(frozen=True)
class BatchPlan:
    """How an ordered list of samples falls into global batches, and these into the shares of the workers.

    Attributes:
        samples: the number of samples in an epoch.
        batch_size: the global batch.
        world_size: the number of workers.
    """

    samples: int
    batch_size: int
    world_size: int

    @property
    def steps(self) -> int:
        """The number of global batches in an epoch; the last may be short."""
        return -(-self.samples // self.batch_size)

    @property
    def share(self) -> int:
        """The rows every worker receives at every step, padding included."""
        return -(-self.batch_size // self.world_size)

    def shares(self, order: np.ndarray, first_step: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """(step in the epoch, int64 (world_size, share)) from `first_step` on: the indices of each worker's rows.

        The rows that a batch does not fill are `PADDING`: those of the last batch, and where the workers do not
        divide the batch.
        """
        for step in range(first_step, self.steps):
            batch = np.full(self.share * self.world_size, PADDING, np.int64)
            taken = order[step * self.batch_size : (step + 1) * self.batch_size]
            batch[: len(taken)] = taken
            yield step, batch.reshape(self.world_size, self.share)
