"""How many processes score at a time, and what each asks of Ray."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from unet.cluster.nodes import cluster_nodes
from unet.cluster.placement import Node, check_enough, cpus_for_each, fits_now, most_processes, on_device, with_cpus
from unet.cluster.room import check_free_gpus
from unet.config import Device
from unet.data.streaming import DATA_CPUS
from unet.errors import InputError


@dataclass(frozen=True)
class Pool:
    """Processes of one TensorFlow thread each.

    Attributes:
        processes: their number.
        cpus: what each asks of Ray.
        use_gpu: whether each gets one.
        readers: reading tasks at a time, which ask for `DATA_CPUS` each.
        why_cpus: why they get no GPU, where there are some and they might have had them.
    """

    processes: int
    cpus: float
    use_gpu: bool
    readers: int
    why_cpus: str = ""


def plan_pool(nodes: list[Node], wanted: int | None, process_bytes: float, device: Device = "auto") -> Pool:
    """As many processes as the nodes have CPUs (or GPUs), or as are wanted, with room for the reading tasks.

    Raises:
        InputError: the cluster could never hold what is wanted.
    """
    pool, why = on_device(device, nodes, lambda use_gpu: _plan_pool(nodes, wanted, process_bytes, use_gpu))
    return replace(pool, why_cpus=why)


def _plan_pool(nodes: list[Node], wanted: int | None, process_bytes: float, use_gpu: bool) -> Pool:
    hosts = with_cpus(nodes)
    check_enough(hosts, wanted or 1, use_gpu)
    most = most_processes(hosts, use_gpu)
    memory = sum(_held_by(node, process_bytes, int(node.gpus) if use_gpu else most) for node in hosts)
    if memory < (wanted or 1):
        raise InputError(
            f"{wanted or 1} processes need about {process_bytes / 1e9:.1f} GB each, and the cluster has room for "
            f"{memory}: " + (f"give --num-workers {memory}." if memory else "use machines with more memory.")
        )
    processes = wanted or min(most, memory)
    return Pool(processes, cpus_for_each(hosts, processes, use_gpu), use_gpu, 2 * len(nodes))


def _held_by(node: Node, process_bytes: float, most: int) -> int:
    """How many processes a node's memory holds, at most `most`."""
    return int(min(node.memory / process_bytes, most))


def reduced(pool: Pool, nodes: list[Node]) -> Pool | None:
    """The pool that what nobody holds now has room for, with a reading task; None if there is none."""
    count = sum(fits_now(node, pool.cpus, pool.use_gpu) for node in nodes)
    free = sum(node.free_cpus for node in nodes)
    while count and free - count * pool.cpus < DATA_CPUS - 1e-6:
        count -= 1
    return replace(pool, processes=min(count, pool.processes)) if count else None


def take_pool(wanted: int | None, process_bytes: float, say: Callable[[str], None], device: Device = "auto") -> Pool:
    """The pool for now, giving what just ended a moment to hand back its CPUs; `say` hears that it is a smaller one.

    Raises:
        InputError: the cluster cannot hold it, or others hold all of its CPUs.
    """
    for _ in range(40):
        nodes = cluster_nodes()
        pool = plan_pool(nodes, wanted, process_bytes, device)
        found = reduced(pool, nodes)
        if found == pool:
            return pool
        time.sleep(0.25)
    free = sum(node.free_cpus for node in nodes)
    if found is None:
        if pool.use_gpu:
            check_free_gpus(1, nodes)
        raise InputError(
            f"A process that scores needs {pool.cpus:g} CPUs and {DATA_CPUS:g} to read, and other jobs on the cluster "
            f"leave {free:g}: wait for them, or stop them (`ray job stop`)."
        )
    gpus = f" and {sum(int(node.free_gpus) for node in nodes)} GPUs" if pool.use_gpu else ""
    say(f"Other jobs leave {free:g} CPUs{gpus}: {found.processes} instead of {pool.processes} processes.")
    return found
