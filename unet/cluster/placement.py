"""Equal processes on the nodes of a cluster: arithmetic on CPUs and GPUs, for every kind of job.

A process on a GPU needs both on one node, the GPU and its CPUs, so nodes without GPUs do not count for it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from unet.config import Device
from unet.errors import InputError

RESERVED_CPUS = 0.5
"""Left alone on each node for two reading tasks of 0.2 CPUs (`unet.data.ingest`); at most half of a small node."""
ROUNDING = 1e-6
"""By how many CPUs sums of Ray's floats may be off."""

Planned = TypeVar("Planned")


@dataclass(frozen=True)
class Node:
    """What Ray says a node has in all, and what of it is free."""

    cpus: float
    gpus: float = 0
    memory: float = math.inf
    object_store: float = math.inf
    free_cpus: float = 0
    free_gpus: float = 0


@dataclass(frozen=True)
class Placement:
    """Equal worker processes, and what each takes of the cluster.

    Attributes:
        cpus_per_worker: what Ray reserves.
        threads: TensorFlow threads of each worker.
        use_gpu: whether each worker gets one.
        why_cpus: why workers get no GPU, where there are some and they might have had them.
        reserved: CPUs of each node that workers leave alone, at most half of them.
    """

    num_workers: int
    cpus_per_worker: float
    threads: int
    use_gpu: bool
    why_cpus: str = field(default="", kw_only=True)
    reserved: float = field(default=RESERVED_CPUS, kw_only=True)

    def capacity(self, node: Node) -> int:
        """How many of the workers fit on the node if nothing else runs there."""
        return min(self.num_workers, fitting(node, self.cpus_per_worker, self.use_gpu, self.reserved))

    def shares_cores(self, nodes: list[Node]) -> bool:
        """Whether a node has fewer cores than its workers have threads."""
        return any(self.capacity(node) * self.threads > node.cpus for node in nodes)

    def room(self, nodes: list[Node], beside: float = 0) -> int:
        """How many such workers fit now beside other jobs, with `beside` CPUs left for tasks anywhere on the cluster.

        No node counts for more of them than it holds when idle, since its reserve may be among what is free.
        """
        count, free = 0, sum(node.free_cpus for node in nodes)
        for node in nodes:
            now = fitting(node, self.cpus_per_worker, self.use_gpu, self.reserved)
            now = min(now, int((node.free_cpus + ROUNDING) // self.cpus_per_worker))
            count += min(now, int(node.free_gpus)) if self.use_gpu else now
        while beside and count and free - count * self.cpus_per_worker < beside - ROUNDING:
            count -= 1
        return count


def place(hosts: list[Node], num_workers: int, use_gpu: bool, reserved: float = RESERVED_CPUS) -> Placement:
    """Workers with as many CPUs each as the hosts can give (`check_enough`), and a thread for each core of theirs."""
    cpus = _cpus_for_each(hosts, num_workers, use_gpu, reserved)
    found = Placement(num_workers, cpus, 1, use_gpu, reserved=reserved)
    cores = min(node.cpus // count for node in hosts if (count := found.capacity(node)))
    return replace(found, threads=max(1, int(cores)))


def fitting(node: Node, cpus: float, use_gpu: bool, reserved: float = RESERVED_CPUS) -> int:
    """How many processes with this many CPUs each fit on the node if nothing else runs there."""
    count = int((node.cpus - min(reserved, node.cpus / 2) + 1e-9) // cpus)
    return min(count, int(node.gpus)) if use_gpu else count


def _cpus_for_each(hosts: list[Node], processes: int, use_gpu: bool, reserved: float) -> float:
    candidates = {
        math.floor((node.cpus - min(reserved, node.cpus / 2)) / k * 1e4) / 1e4  # Ray counts in ten-thousandths
        for node in hosts
        for k in range(1, processes + 1)
    }
    return max(c for c in candidates if c > 0 and sum(fitting(n, c, use_gpu, reserved) for n in hosts) >= processes)


def on_device(device: Device, nodes: list[Node], planned: Callable[[bool], Planned]) -> tuple[Planned, str]:
    """What `planned` makes of the nodes with GPUs (True) or with CPUs only (False), as `--device` says.

    Returns:
        The plan; and why it has CPUs only, where there are GPUs and "auto" would have taken them.

    Raises:
        InputError: what `planned` raises; with "auto", on CPUs.
    """
    if device == "cpu" or (device == "auto" and not any(node.gpus >= 1 for node in nodes)):
        return planned(False), ""
    try:
        return planned(True), ""
    except InputError as error:
        if device == "gpu":
            raise
        return planned(False), str(error).partition(": ")[0]


def in_words(use_gpu: bool, why_cpus: str) -> str:
    """The device of a plan and what `on_device` says of it, for a table."""
    return "a GPU for each worker" if use_gpu else "CPUs" + (f" ({why_cpus})" if why_cpus else "")


def with_cpus(nodes: list[Node]) -> list[Node]:
    """The nodes on which processes can run at all.

    Raises:
        InputError: no node has CPUs.
    """
    if not any(node.cpus > 0 for node in nodes):
        raise InputError("The cluster has no CPUs yet: wait until its workers have joined (`ray status` shows them).")
    return [node for node in nodes if node.cpus > 0]


def most_workers(hosts: list[Node], use_gpu: bool) -> int:
    """How many workers the hosts could have at most: one for each of their GPUs, else for each CPU."""
    return sum(int(node.gpus) for node in hosts) if use_gpu else max(1, int(sum(node.cpus for node in hosts)))


def check_enough(hosts: list[Node], workers: int, use_gpu: bool) -> None:
    """Refuse more workers than the hosts could ever have.

    Raises:
        InputError: with how many would fit.
    """
    most = most_workers(hosts, use_gpu)
    if workers <= most:
        return
    if use_gpu:
        fewer = f"--num-workers {most}, or " if most else ""
        raise InputError(
            f"{workers} worker(s) need a GPU each, and the cluster has {most or 'none'}: give {fewer}--device cpu."
        )
    raise InputError(f"--num-workers {workers} is more than the cluster's {most} CPUs: at most {most} fit.")
