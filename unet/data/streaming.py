"""What streaming needs of a node: how many tasks read ahead, and the memory of each."""

import math

from unet.data.order import CHUNK, sample_bytes, window_of
from unet.errors import InputError
from unet.pages.numbers import gigabytes

DATA_CPUS = 0.2
"""What a reading task asks of Ray: reading hardly computes, and the workers need the cores."""
STREAM_TASKS = 2
"""Streaming tasks at a time: the one whose blocks are used and the next. Each holds a window in memory."""
PROCESS_BYTES = 0.25e9
"""A process of Ray that reads Parquet, before its first chunk (measured: 0.2 GB)."""


def task_bytes(image_size: int, batch_size: int) -> float:
    """An estimate of a streaming task's peak memory: a window, a chunk that is being decoded, a batch on its way.

    Measured: 0.83 GB at 512 px and a batch of 16, 0.92 GB at one of 64.
    """
    samples = (window_of(image_size) + 1) * CHUNK + 3 * batch_size
    return PROCESS_BYTES + samples * sample_bytes(image_size)


def tasks_beside(workers: float, memory: float, each: float) -> int:
    """How many streaming tasks of `each` bytes at a time a node has memory for, beside what its workers need.

    Raises:
        InputError: there is not enough for one.
    """
    fit = STREAM_TASKS if math.isinf(memory) else min(STREAM_TASKS, int((memory - workers) // each))
    if fit < 1:
        raise InputError(
            f"The workers of a node need about {gigabytes(workers)} and the task that streams the data to them "
            f"{gigabytes(each)}, but the node has {gigabytes(memory)}: give a smaller --batch-size or --image-size, "
            "fewer --num-workers, or nodes with more memory."
        )
    return fit
