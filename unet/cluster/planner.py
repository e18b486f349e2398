"""What a job asks of the cluster, compared with what there is, before anything starts.

Every job has equal processes (`unet.cluster.placement`). Training holds its data in memory or streams them; a sweep has
several trainings beside each other; scoring and prediction leave CPUs to tasks that read and write.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from unet.cluster.placement import Node, Placement, check_enough, most_workers, on_device, place, with_cpus
from unet.config import Device, TrainSettings, parse_bytes
from unet.data.streaming import STREAM_TASKS, task_bytes, tasks_beside
from unet.errors import InputError
from unet.recipe.networks import describe

READERS = 2
"""Reading tasks on a node at a time."""
PREDICTING_THREADS = 2
"""Of a process that predicts, if no other number is asked for: it needs 0.6 GB, whatever its threads."""
WORKER_BYTES = 0.8e9
"""A worker with TensorFlow loaded, before its first step (measured: 0.6 GB)."""


@dataclass(frozen=True)
class Plan(Placement):
    """How a run uses the cluster.

    Attributes:
        kept: whether training and validation are held in memory, else streamed.
        data_bytes: their size in memory.
        stream_bytes: object store that streaming may use.
        stream_tasks: streaming tasks at a time.
    """

    kept: bool
    data_bytes: int
    stream_bytes: int
    stream_tasks: int = STREAM_TASKS


def plan_now(
    settings: TrainSettings,
    nodes: list[Node],
    data_bytes: int,
    together: int = 1,
    held: int = 0,
    device: Device | None = None,
) -> Plan | None:
    """The plan for as many workers as there is room for now; None if there is not even room for the fewest.

    Elastic or not, a worker gets what it would have beside the most that the nodes could hold, so that others can
    join it; an elastic run adds no workers whose `--threads` would share cores. `held` workers hold their CPUs
    already. `device` is that of the settings, if no other is given.

    Raises:
        InputError: not even idle nodes would hold the fewest.
    """
    counts = settings.worker_counts

    def largest(use_gpu: bool) -> Plan:
        for workers in reversed(counts[1:]):
            with contextlib.suppress(InputError):
                found = _plan(settings, nodes, data_bytes, together, workers, use_gpu)
                if use_gpu or not settings.compute.threads or not found.shares_cores(nodes):
                    return found
        return _plan(settings, nodes, data_bytes, together, counts[0], use_gpu)

    most, why = on_device(device or settings.compute.device, nodes, largest)
    room = most.room(nodes) + held
    fit = [workers for workers in counts if workers <= min(room, most.num_workers)]
    return replace(most, num_workers=fit[-1], why_cpus=why) if fit else None


def plan(settings: TrainSettings, nodes: list[Node], data_bytes: int, together: int = 1) -> Plan:
    """Fit the settings, with their fewest workers, to the nodes, where `together` such trainings run at a time.

    Raises:
        InputError: they would never fit; with the settings that would.
    """
    compute = settings.compute

    def planned(use_gpu: bool) -> Plan:
        return _plan(settings, nodes, data_bytes, together, compute.least_workers, use_gpu)

    found, why = on_device(compute.device, nodes, planned)
    return replace(found, why_cpus=why)


def _plan(
    settings: TrainSettings, nodes: list[Node], data_bytes: int, together: int, workers: int, use_gpu: bool
) -> Plan:
    """`plan` for this many workers in each training, on nodes with GPUs or on CPUs."""
    hosts, processes = with_cpus(nodes), workers * together
    check_enough(hosts, processes if use_gpu else workers, use_gpu)
    placed = place(hosts, processes, use_gpu)
    on_host = {node: count for node in hosts if (count := placed.capacity(node))}
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
        cpus_per_worker=placed.cpus_per_worker,
        threads=settings.compute.threads or placed.threads,
        use_gpu=use_gpu,
        kept=kept,
        data_bytes=data_bytes,
        stream_bytes=int(min(max(budget, 256e6), 0.5 * store)),
        stream_tasks=min(beside),
    )


def _check_memory(settings: TrainSettings, on_host: dict[Node, int], each: float) -> None:
    """Refuse workers that need `each` bytes where a node's memory would not hold its share of them.

    Raises:
        InputError: with a batch that would fit.
    """
    node, workers = max(on_host.items(), key=lambda item: item[1] * each / item[0].memory)
    need = workers * each
    if need > node.memory:
        batch = int(settings.training.batch_size * node.memory / need * 0.8)
        raise InputError(
            f"The {workers} workers of a node need about {need / 1e9:.1f} GB, and it has {node.memory / 1e9:.1f} GB: "
            f"try --batch-size {max(1, batch)}."
        )


def worker_bytes(settings: TrainSettings, share: int, use_gpu: bool = False) -> float:
    """An estimate of a worker's peak memory: TensorFlow, copies of the weights, activations of its share.

    On a GPU the activations are in the GPU's own memory, of which Ray knows nothing.
    """
    network = describe(settings.model, 1)  # the classes are not known before the data, and hardly count
    # What all layers give lives until the backward pass, and some of it twice (measured at 16 and 64 filters).
    activations = 1.3 * network.activations * settings.data.image_size**2 * 4
    # Weights, gradients and what the optimizer remembers; a checkpoint is made in memory beside them. An average is
    # kept, written into the checkpoint, and scored in a network of its own.
    copies = (7 + 3 * (settings.optimizer.ema_decay > 0)) * network.parameters * 4
    return WORKER_BYTES + copies + (0 if use_gpu else share * activations)


def plan_trials(
    settings: TrainSettings, nodes: list[Node], data_bytes: int, at_most: int | None = None
) -> tuple[Plan, int]:
    """Fit as many such trainings beside each other as CPUs, GPUs and memory allow, at most `at_most`.

    Raises:
        InputError: not even one fits; with the settings that would.
    """
    workers = settings.compute.least_workers

    def planned(use_gpu: bool) -> tuple[Plan, int]:
        together = max(1, most_workers(with_cpus(nodes), use_gpu) // workers)
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
    """The plan for as many as fit, at most `limit`, and their number: wherever many fit, fewer do too.

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


def plan_scoring(nodes: list[Node], asked: int | None, worker_bytes: float, device: Device = "auto") -> Placement:
    """As many processes of one thread each as CPUs (or GPUs) and memory allow, or as are asked for.

    Raises:
        InputError: the cluster could never hold what is asked for.
    """

    def planned(use_gpu: bool) -> Placement:
        hosts = with_cpus(nodes)
        check_enough(hosts, asked or 1, use_gpu)
        most = most_workers(hosts, use_gpu)
        in_memory = sum(int(min(n.memory / worker_bytes, n.gpus if use_gpu else most)) for n in hosts)
        if in_memory < (asked or 1):
            raise InputError(
                f"{_processes(asked or 1)} about {worker_bytes / 1e9:.1f} GB each, and the cluster's memory holds "
                f"{in_memory}: " + (f"give --num-workers {in_memory}." if in_memory else "use nodes with more memory.")
            )
        # An image's numbers depend on the number of threads: one, wherever it is scored.
        return replace(place(hosts, asked or min(most, in_memory), use_gpu), threads=1)

    found, why = on_device(device, nodes, planned)
    return replace(found, why_cpus=why)


def _processes(count: int) -> str:
    return "1 process needs" if count == 1 else f"{count} processes need"


def plan_prediction(nodes: list[Node], asked: int | None, device: Device = "auto") -> Placement:
    """Processes that predict: they hold half of the CPUs, and tasks that read and write take the other half.

    Raises:
        InputError: more are asked for than there are CPUs or GPUs.
    """

    def planned(use_gpu: bool) -> Placement:
        hosts = with_cpus(nodes)
        most = most_workers(hosts, use_gpu)
        workers = asked or max(1, most if use_gpu else most // PREDICTING_THREADS)
        check_enough(hosts, workers, use_gpu)
        # Half of each node is left alone while the CPUs are shared out; the tasks may then run on any node.
        return replace(place(hosts, workers, use_gpu, reserved=math.inf), reserved=0)

    found, why = on_device(device, nodes, planned)
    return replace(found, why_cpus=why)
