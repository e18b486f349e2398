"""Where the equal processes of a job fit on the nodes of a cluster: arithmetic on CPUs and GPUs.

A process on a GPU needs both on one node, the GPU and its CPUs, so nodes without GPUs do not count for it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from unet.config import Device
from unet.errors import InputError

RESERVED_CPUS = 0.5
"""Left on each node for two reading tasks of 0.2 CPUs (`unet.data.ingest`)."""

Planned = TypeVar("Planned")


@dataclass(frozen=True)
class Node:
    """What Ray says a node has in all, and what of it nobody holds."""

    cpus: float
    gpus: float = 0
    memory: float = math.inf
    object_store: float = math.inf
    free_cpus: float = 0
    free_gpus: float = 0


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
    """The nodes on which processes can be at all.

    Raises:
        InputError: no node has CPUs.
    """
    if not any(node.cpus > 0 for node in nodes):
        raise InputError("The cluster has no CPUs yet: wait until its workers have joined (`ray status` shows them).")
    return [node for node in nodes if node.cpus > 0]


def most_processes(hosts: list[Node], use_gpu: bool) -> int:
    """How many processes the hosts could have at most: one for each of their GPUs, else for each CPU."""
    return sum(int(node.gpus) for node in hosts) if use_gpu else max(1, int(sum(node.cpus for node in hosts)))


def check_enough(hosts: list[Node], workers: int, use_gpu: bool) -> None:
    """Refuse more workers than the hosts could ever have.

    Raises:
        InputError: with how many would fit.
    """
    most = most_processes(hosts, use_gpu)
    if workers <= most:
        return
    if use_gpu:
        fewer = f"--num-workers {most}, or " if most else ""
        raise InputError(
            f"{workers} worker(s) need a GPU each, and the cluster has {most or 'none'}: give {fewer}--device cpu."
        )
    raise InputError(f"--num-workers {workers} is more than the cluster's {most} CPUs: at most {most} fit.")


def reserve(node: Node) -> float:
    """CPUs of a node that a training or an evaluation leaves alone."""
    return min(RESERVED_CPUS, node.cpus / 2)


def cpus_for_each(
    hosts: list[Node], processes: int, use_gpu: bool, left_alone: Callable[[Node], float] = reserve
) -> float:
    """The most CPUs that each of `processes` can have, of which there are no more than `most_processes`."""
    candidates = {
        math.floor((node.cpus - left_alone(node)) / k * 1e4) / 1e4  # Ray counts in ten-thousandths
        for node in hosts
        for k in range(1, processes + 1)
    }
    enough = (c for c in candidates if c > 0 and sum(fits(n, c, use_gpu, left_alone) for n in hosts) >= processes)
    return max(enough)


def fits(node: Node, cpus: float, use_gpu: bool, left_alone: Callable[[Node], float] = reserve) -> int:
    """How many processes of so many CPUs fit on the node if nobody else is there."""
    count = int((node.cpus - left_alone(node) + 1e-9) // cpus)
    return min(count, int(node.gpus)) if use_gpu else count


def fits_now(node: Node, cpus: float, use_gpu: bool, left_alone: Callable[[Node], float] = reserve) -> int:
    """How many fit beside what others hold; what is free may hold what is to be left alone, and may lack it."""
    count = min(int((node.free_cpus + 1e-6) // cpus), fits(node, cpus, use_gpu, left_alone))
    return min(count, int(node.free_gpus)) if use_gpu else count
