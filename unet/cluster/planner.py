"""What a run asks of the cluster, compared with what there is, before anything starts."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

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
from unet.config import Device, TrainSettings, parse_bytes
from unet.data.streaming import STREAM_TASKS, task_bytes, tasks_beside
from unet.errors import InputError

READERS = 2
WORKER_BYTES = 0.8e9
"""A worker with TensorFlow loaded, before its first step (measured: 0.6 GB)."""


@dataclass(frozen=True)
class Plan:
    """How a run uses the cluster.

    Attributes:
        cpus_per_worker: what Ray reserves.
        threads: TensorFlow threads of each worker.
        use_gpu: whether each worker gets one.
        kept: whether training and validation are held in memory, else streamed.
        data_bytes: their size in memory.
        stream_bytes: object store that streaming may use.
        stream_tasks: streaming tasks at a time.
        why_cpus: why workers get no GPU, where there are some and they might have had them.
    """

    num_workers: int
    cpus_per_worker: float
    threads: int
    use_gpu: bool
    kept: bool
    data_bytes: int
    stream_bytes: int
    stream_tasks: int = STREAM_TASKS
    why_cpus: str = ""


def plan_now(
    settings: TrainSettings,
    nodes: list[Node],
    data_bytes: int,
    together: int = 1,
    held: int = 0,
    device: Device | None = None,
) -> Plan | None:
    """The plan for as many workers as there is room for now; None if not even the least find room.

    Elastic or not, a worker gets what it would have beside the most that the nodes could hold, so that others can
    join it. `held` workers have their places already. `device` is that of the settings, if no other is given.

    Raises:
        InputError: not even empty nodes would hold the least.
    """
    counts = settings.worker_counts

    def largest(use_gpu: bool) -> Plan:
        for workers in reversed(counts[1:]):
            with contextlib.suppress(InputError):
                return _plan(settings, nodes, data_bytes, together, workers, use_gpu)
        return _plan(settings, nodes, data_bytes, together, counts[0], use_gpu)

    most, why = on_device(device or settings.compute.device, nodes, largest)
    places = sum(fits_now(node, most.cpus_per_worker, most.use_gpu) for node in nodes) + held
    fit = [workers for workers in counts if workers <= min(places, most.num_workers)]
    return replace(most, num_workers=fit[-1], why_cpus=why) if fit else None


def plan(settings: TrainSettings, nodes: list[Node], data_bytes: int, together: int = 1) -> Plan:
    """Fit the settings, with their least workers, to the nodes, where `together` such trainings run at a time.

    Raises:
        InputError: it would not fit or would wait for ever; with the settings that would fit.
    """
    compute = settings.compute

    def planned(use_gpu: bool) -> Plan:
        return _plan(settings, nodes, data_bytes, together, compute.least_workers, use_gpu)

    found, why = on_device(compute.device, nodes, planned)
    return replace(found, why_cpus=why)


def _plan(
    settings: TrainSettings, nodes: list[Node], data_bytes: int, together: int, workers: int, use_gpu: bool
) -> Plan:
    """`plan` for so many workers a training, on nodes with GPUs or on CPUs."""
    hosts, processes = with_cpus(nodes), workers * together
    check_enough(hosts, processes if use_gpu else workers, use_gpu)
    cpus = cpus_for_each(hosts, processes, use_gpu)
    on_host = {node: min(count, processes) for node in hosts if (count := fits(node, cpus, use_gpu))}
    cores = int(min(node.cpus // count for node, count in on_host.items()))
    share = math.ceil(settings.training.batch_size / workers)
    each = worker_bytes(settings, share, use_gpu)
    _check_memory(settings, on_host, each)
    memory, store = min(n.memory for n in on_host), min(n.object_store for n in on_host)
    limit = settings.data.memory_budget
    budget = parse_bytes(limit) if limit else memory / 4
    kept = data_bytes <= min(budget, 0.6 * store)
    task = together * task_bytes(settings.data.image_size, settings.training.batch_size)
    beside = [STREAM_TASKS if kept else tasks_beside(n * each, node.memory, task) for node, n in on_host.items()]
    return Plan(
        num_workers=workers,
        cpus_per_worker=cpus,
        threads=settings.compute.threads or max(1, cores),
        use_gpu=use_gpu,
        kept=kept,
        data_bytes=data_bytes,
        stream_bytes=int(min(max(budget, 256e6), 0.5 * store)),
        stream_tasks=min(beside),
    )


def _check_memory(settings: TrainSettings, on_host: dict[Node, int], each: float) -> None:
    """Refuse workers of so many bytes each that would not fit into a node's memory.

    Raises:
        InputError: with a batch that would fit.
    """
    node, workers = max(on_host.items(), key=lambda item: item[1] * each / item[0].memory)
    need = workers * each
    if need > node.memory:
        batch = int(settings.training.batch_size * node.memory / need * 0.8)
        raise InputError(
            f"{workers} workers of a node need about {need / 1e9:.1f} GB, the node has {node.memory / 1e9:.1f} GB: "
            f"try --batch-size {max(1, batch)}."
        )


def worker_bytes(settings: TrainSettings, share: int, use_gpu: bool = False) -> float:
    """An estimate of a worker's peak memory: TensorFlow, four copies of the weights, activations of its share.

    The activations of a GPU are in a memory of its own, of which Ray knows nothing.
    """
    model, side = settings.model, settings.data.image_size
    filters = [model.base_filters * 2**level for level in range(model.depth + 1)]
    weights = sum(27 * f * f for f in filters) * 4  # both paths of a level hold about 27 f² numbers
    # About 12 maps of a level's size and filters live until the backward pass (measured at 16 and 64 filters).
    activations = sum(12 * f * (side / 2**level) ** 2 for level, f in enumerate(filters)) * 4
    return WORKER_BYTES + 4 * weights + (0 if use_gpu else share * activations)


def plan_trials(
    settings: TrainSettings, nodes: list[Node], data_bytes: int, at_most: int | None = None
) -> tuple[Plan, int]:
    """Fit as many such trainings beside each other as CPUs, GPUs and memory allow, and no more than `at_most`.

    Raises:
        InputError: not even one fits; with the settings that would.
    """
    workers = settings.compute.least_workers

    def planned(use_gpu: bool) -> tuple[Plan, int]:
        together = max(1, most_processes(with_cpus(nodes), use_gpu) // workers)
        together = min(together, at_most or together)

        def plan_of(trials: int) -> Plan:
            return _plan(settings, nodes, data_bytes, trials, workers, use_gpu)

        found, together = _most(plan_of, together)
        if not found.kept and together > READERS * len(nodes):  # each trial that streams has readers of its own
            found, together = _most(plan_of, READERS * len(nodes))
        return found, together

    (found, together), why = on_device(settings.compute.device, nodes, planned)
    return replace(found, why_cpus=why), together


def _most(plan_of: Callable[[int], Plan], limit: int) -> tuple[Plan, int]:
    """The plan for as many as fit, at most `limit`, and their number: where many fit, fewer do.

    Raises:
        InputError: not even one fits.
    """
    with contextlib.suppress(InputError):
        return plan_of(limit), limit
    found, fits, too_many = plan_of(1), 1, limit
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        try:
            found, fits = plan_of(middle), middle
        except InputError:
            too_many = middle
    return found, fits
