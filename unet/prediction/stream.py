"""Photos through the cluster: one execution of Ray Data whose blocks are groups of photos."""

import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from unet.cluster.placement import Placement
from unet.cluster.session import silenced
from unet.config.use import PredictPart
from unet.data.packed import packed, unpacked
from unet.models.trained import TrainedModel
from unet.prediction.stages import Predictor, Work, read, write

GROUP_PHOTOS, GROUP_BYTES, GROUP_OUTPUT_BYTES = 32, 2**23, 2**26
"""What a task takes at a time, at most: photos, bytes of their files, bytes of the network's output."""
TASK_CPUS = 0.5
"""Of a task that reads or writes: as many run as there are CPUs beside the networks', which are the other half."""
RETRIES = 3
"""Of a task whose process died: a photo that kills its process every time must not be retried for ever."""


def groups(sizes: np.ndarray, most: int) -> list[int]:
    """Where each group of photos begins, of files of these bytes: at most `most` photos, a large one by itself."""
    starts, photos, held = [], most, 0
    for place, size in enumerate(sizes.tolist()):
        if photos == most or held + size > GROUP_BYTES:
            starts.append(place)
            photos = held = 0
        photos, held = photos + 1, held + size
    return starts


def predicted(
    photos: pa.Table, work: Work, trained: TrainedModel, workers: Placement, part: PredictPart, debug: bool = False
) -> Iterator[pa.Table]:
    """The rows of each group of photos once its predictions are written, in any order."""
    # A few groups for each core, so that none waits long for the last.
    most = min(GROUP_PHOTOS, math.ceil(len(photos) / (4 * workers.num_workers * workers.threads)))
    most = max(1, min(most, GROUP_OUTPUT_BYTES // work.output_bytes))
    starts = groups(photos["size"].to_numpy(), most)
    ends, listed, model = [*starts[1:], len(photos)], ray.put(photos), ray.put(trained)

    def read_group(block: pa.Table) -> pa.Table:
        group = block["id"][0].as_py()
        return packed(read(ray.get(listed).slice(starts[group], ends[group] - starts[group]), group, work))

    class Predicting(Predictor):
        def __init__(self):
            super().__init__(ray.get(model), workers.threads, part.batch_size, part.tta, workers.use_gpu)

        def __call__(self, row: pa.Table) -> pa.Table:
            return packed(super().__call__(unpacked(row)))

    how: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    tasks = how | {"num_cpus": TASK_CPUS, "max_retries": RETRIES}
    network = {
        "compute": ray.data.ActorPoolStrategy(size=workers.num_workers),
        "num_cpus": workers.cpus_per_worker,
        "num_gpus": int(workers.use_gpu),
    }
    with warnings.catch_warnings():
        # Without max_retries Ray Data starts a task that dies again for ever, and no named parameter says so.
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = (
            ray.data.range(len(starts), override_num_blocks=len(starts))
            .map_batches(read_group, **tasks)
            .map_batches(Predicting, **how | network)
            .map_batches(lambda row: write(unpacked(row), work), **tasks)
        )
    dataset.context.target_max_block_size = None  # a group stays a block, whatever its size
    dataset.context.enable_progress_bars = False
    dataset.context.raise_original_map_exception = True  # else it says only that there was one
    if not debug:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a failed task is reported in one line of ours
    stream = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    with silenced(debug):  # Ray's core warns about how Ray Data makes its actors
        first = next(stream)
    yield first
    yield from stream
