"""How many processes score at a time, and what each asks of Ray."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from unet.data.streaming import DATA_CPUS
from unet.errors import InputError
from unet.training.resources import Node, cluster_nodes, cpus_per_worker


@dataclass(frozen=True)
class Pool:
    """Processes of one TensorFlow thread each.

    Attributes:
        processes: their number.
        cpus: what each asks of Ray.
        use_gpu: whether each gets one.
        readers: reading tasks at a time, which ask for `DATA_CPUS` each.
    """

    processes: int
    cpus: float
    use_gpu: bool
    readers: int


def plan_pool(nodes: list[Node], wanted: int | None, process_bytes: float) -> Pool:
    """As many processes as the nodes have CPUs (or GPUs), or as are wanted, with room for the reading tasks.

    Raises:
        InputError: the cluster could never hold what is wanted.
    """
    cores, gpus = int(sum(n.cpus for n in nodes)), int(sum(n.gpus for n in nodes))
    if not any(n.cpus > 0 for n in nodes):
        raise InputError("The cluster has no CPUs yet: wait until its workers have joined (`ray status` shows them).")
    memory = sum(int(n.memory // process_bytes) if n.memory < float("inf") else cores for n in nodes if n.cpus > 0)
    most = max(1, min(gpus or cores, cores))
    if wanted and wanted > most:
        raise InputError(f"--num-workers {wanted} is more than the cluster holds: at most {most} fit.")
    if memory < (wanted or 1):
        raise InputError(
            f"{wanted or 1} processes need about {process_bytes / 1e9:.1f} GB each, and the cluster has room for "
            f"{memory}: " + (f"give --num-workers {memory}." if memory else "use machines with more memory.")
        )
    processes = wanted or min(most, memory)
    return Pool(processes, cpus_per_worker([n.cpus for n in nodes], processes), gpus > 0, 2 * len(nodes))


def reduced(pool: Pool, nodes: list[Node]) -> Pool | None:
    """The pool that what nobody holds now has room for, with a reading task; None if there is none."""
    count = sum(_places(node, pool) for node in nodes)
    free = sum(node.free_cpus for node in nodes)
    while count and free - count * pool.cpus < DATA_CPUS - 1e-6:
        count -= 1
    return Pool(min(count, pool.processes), pool.cpus, pool.use_gpu, pool.readers) if count else None


def _places(node: Node, pool: Pool) -> int:
    cpus = int((node.free_cpus + 1e-6) // pool.cpus)
    return min(cpus, int(node.free_gpus)) if pool.use_gpu else cpus


def take_pool(wanted: int | None, process_bytes: float, say: Callable[[str], None]) -> Pool:
    """The pool for now, giving what just ended a moment to hand back its CPUs; `say` hears that it is a smaller one.

    Raises:
        InputError: the cluster cannot hold it, or others hold all of its CPUs.
    """
    for _ in range(40):
        nodes = cluster_nodes()
        pool = plan_pool(nodes, wanted, process_bytes)
        found = reduced(pool, nodes)
        if found == pool:
            return pool
        time.sleep(0.25)
    free = sum(node.free_cpus for node in nodes)
    if found is None:
        raise InputError(
            f"A process that scores needs {pool.cpus:g} CPUs and {DATA_CPUS:g} to read, and other jobs on the cluster "
            f"leave {free:g}: wait for them, or stop them (`ray job stop`)."
        )
    say(f"Other jobs leave {free:g} CPUs: {found.processes} instead of {pool.processes} processes.")
    return found
