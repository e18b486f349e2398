"""Photos through the cluster: one execution of Ray Data whose blocks are groups of photos."""

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import ray

from unet.cluster.nodes import cluster_nodes
from unet.cluster.placement import (
    Node,
    check_enough,
    cpus_for_each,
    fits,
    fits_now,
    most_processes,
    on_device,
    with_cpus,
)
from unet.cluster.room import check_free, check_free_gpus, free_cpus
from unet.cluster.session import silenced
from unet.config import Device
from unet.config.use import PredictPart
from unet.data.packed import packed, unpacked
from unet.errors import InputError
from unet.models.trained import TrainedModel
from unet.prediction.stages import Predictor, Work, read, write

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
    """How many processes predict, with how many threads, and what of the cluster each holds.

    `why_cpus` says why they get no GPU, where there are some and they might have had them.
    """

    workers: int
    threads: int
    cpus: float
    use_gpu: bool
    why_cpus: str = ""


def plan(nodes: list[Node], asked: int | None, device: Device = "auto") -> Plan:
    """Fit the processes that predict to the nodes: they hold half of the CPUs, tasks that read and write the rest.

    Raises:
        InputError: more are asked for than there are CPUs or GPUs.
    """
    found, why = on_device(device, nodes, lambda use_gpu: _plan(nodes, asked, use_gpu))
    return replace(found, why_cpus=why)


def _plan(nodes: list[Node], asked: int | None, use_gpu: bool) -> Plan:
    hosts = with_cpus(nodes)
    most = most_processes(hosts, use_gpu)
    workers = asked or max(1, most if use_gpu else most // THREADS)
    check_enough(hosts, workers, use_gpu)
    cpus = cpus_for_each(hosts, workers, use_gpu, _half)
    on_host = [(node, min(count, workers)) for node in hosts if (count := fits(node, cpus, use_gpu, _half))]
    return Plan(workers, max(1, int(min(node.cpus // count for node, count in on_host))), cpus, use_gpu)


def _half(node: Node) -> float:
    return node.cpus / 2


def check_room(fitted: Plan) -> None:
    """Refuse what would wait for another job, giving what just ended a moment.

    Raises:
        InputError: with how many would fit.
    """
    check_free(fitted.workers, fitted.cpus, free_cpus(fitted.workers * fitted.cpus + TASK_CPUS) - TASK_CPUS)
    if not fitted.use_gpu:
        return
    nodes = cluster_nodes()
    check_free_gpus(fitted.workers, nodes)
    if places_now(fitted, nodes) < fitted.workers:
        raise InputError(
            f"No node has a free GPU and {fitted.cpus:g} free CPUs for each of {fitted.workers} processes: wait for "
            "other jobs, or give fewer --num-workers, or --device cpu."
        )


def places_now(fitted: Plan, nodes: list[Node]) -> int:
    """How many of the planned processes find room beside what others hold, node by node."""
    return sum(fits_now(node, fitted.cpus, fitted.use_gpu, _half) for node in nodes)


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
        return packed(read(ray.get(listed).slice(starts[group], ends[group] - starts[group]), group, work))

    class Predicting(Predictor):
        def __init__(self):
            super().__init__(ray.get(model), fitted.threads, part.batch_size, part.tta, fitted.use_gpu)

        def __call__(self, row: pa.Table) -> pa.Table:
            return packed(super().__call__(unpacked(row)))

    how = {"batch_size": 1, "batch_format": "pyarrow"}
    tasks = how | {"num_cpus": TASK_CPUS, "max_retries": RETRIES}
    pool = ray.data.ActorPoolStrategy(size=fitted.workers)
    with warnings.catch_warnings():
        # Without max_retries Ray Data starts a task that dies again for ever, and no named parameter says so.
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = (
            ray.data.range(len(starts), override_num_blocks=len(starts))
            .map_batches(read_group, **tasks)
            .map_batches(Predicting, compute=pool, num_cpus=fitted.cpus, num_gpus=int(fitted.use_gpu), **how)
            .map_batches(lambda row: write(unpacked(row), work), **tasks)
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
