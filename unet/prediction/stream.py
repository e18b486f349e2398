"""Photos through the cluster: one execution of Ray Data whose blocks are groups of photos."""

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray

from unet.config.use import PredictPart
from unet.errors import InputError
from unet.prediction.stages import Predictor, Work, read, write
from unet.session import silenced
from unet.trained import TrainedModel
from unet.training.resources import Node, check_free, free_cpus

GROUP_PHOTOS, GROUP_BYTES, GROUP_OUTPUT_BYTES = 32, 2**23, 2**26
"""What a task takes at a time, at most: photos, bytes of their files, bytes that the network says of them."""
TASK_CPUS = 0.5
"""Of a task that reads or writes: there are as many as CPUs beside the networks, which hold the other half."""
THREADS = 2
"""Of a process that predicts, if nothing else is asked for: it needs 0.6 GB, whatever its threads."""
RETRIES = 3
"""Of a task whose process died: a photo that kills its process each time must come to an end."""


@dataclass(frozen=True)
class Plan:
    """How many processes predict, with how many threads, and what of the cluster each holds."""

    workers: int
    threads: int
    cpus: float
    gpus: int


def plan(nodes: list[Node], asked: int | None) -> Plan:
    """Fit the processes that predict to the nodes: they hold half of the CPUs, tasks that read and write the rest.

    Raises:
        InputError: more are asked for than there are CPUs, or others hold them.
    """
    nodes = [node for node in nodes if node.cpus > 0]
    if not nodes:
        raise InputError("The cluster has no CPUs yet: wait until its workers have joined (`ray status` shows them).")
    cores, gpus = int(sum(node.cpus for node in nodes)), int(sum(node.gpus for node in nodes))
    workers = asked or gpus or max(1, cores // THREADS)
    if workers > max(1, cores):
        raise InputError(f"--num-workers {workers} is more than the cluster's {cores} CPUs: at most {cores} fit.")
    on_node, cpus = math.ceil(workers / len(nodes)), min(node.cpus for node in nodes)
    each = math.floor(cpus / 2 / on_node * 1e4) / 1e4  # Ray counts in ten-thousandths
    check_free(workers, each, free_cpus(workers * each + TASK_CPUS) - TASK_CPUS)
    return Plan(workers, max(1, int(cpus) // on_node), each, int(gpus >= workers))


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
    photos: pa.Table, work: Work, trained: TrainedModel, fitted: Plan, part: PredictPart, debug: bool = False
) -> Iterator[pa.Table]:
    """The rows of each group of photos once its predictions are written, in any order."""
    # A few groups for each core, so that none waits long for the last.
    most = min(GROUP_PHOTOS, math.ceil(len(photos) / (4 * fitted.workers * fitted.threads)))
    most = max(1, min(most, GROUP_OUTPUT_BYTES // work.output_bytes))
    starts = groups(photos["size"].to_numpy(), most)
    ends, listed, model = [*starts[1:], len(photos)], ray.put(photos), ray.put(trained)

    def read_group(block: pa.Table) -> pa.Table:
        group = block["id"][0].as_py()
        return read(ray.get(listed).slice(starts[group], ends[group] - starts[group]), group, work)

    class Predicting(Predictor):
        def __init__(self):
            super().__init__(ray.get(model), fitted.threads, part.batch_size, part.tta)

    how = {"batch_size": None, "batch_format": "pyarrow"}
    tasks = how | {"num_cpus": TASK_CPUS, "max_retries": RETRIES}
    pool = ray.data.ActorPoolStrategy(size=fitted.workers)
    with warnings.catch_warnings():
        # Without max_retries Ray Data starts a task that dies again for ever, and no named parameter says so.
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = (
            ray.data.range(len(starts), override_num_blocks=len(starts))
            .map_batches(read_group, **tasks)
            .map_batches(Predicting, compute=pool, num_cpus=fitted.cpus, num_gpus=fitted.gpus, **how)
            .map_batches(lambda rows: write(rows, work), **tasks)
        )
    dataset.context.target_max_block_size = None  # a group stays a block, whatever its size
    dataset.context.enable_progress_bars = False
    dataset.context.raise_original_map_exception = True  # else it says only that there was one
    if not debug:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a failed task is one line of ours
    stream = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    with silenced(debug):  # Ray's core warns about how Ray Data makes its actors
        first = next(stream)
    yield first
    yield from stream
