"""Nodes that an autoscaler brings: what a job asks for, and how it waits.

Why: docs/decisions.md#what-a-job-waits-for-is-a-placement-group
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self, TypeVar

from unet.cluster import internals
from unet.cluster.planner import worker_bytes
from unet.config import TrainSettings
from unet.errors import InputError

BRING_SECONDS = 1800
"""How long an autoscaler may take for nodes: a cloud starts a machine in minutes, and may have none for a while."""
START_SECONDS = 60
"""How long an autoscaler may take to say its first word: KubeRay starts it beside a head that takes jobs already."""
LOOK_SECONDS = 1.0

Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Needs:
    """The least that a job can work with, as an autoscaler is asked for it.

    Attributes:
        workers: processes, which may share nodes.
        cpus: of each.
        gpu: whether each needs one.
        memory: bytes of each.
        beside: CPUs for tasks, on any node.
    """

    workers: int
    cpus: int = 1
    gpu: bool = False
    memory: float = 0
    beside: float = 0

    @property
    def bundles(self) -> list[dict[str, float]]:
        each = {"CPU": float(self.cpus)} | ({"GPU": 1.0} if self.gpu else {})
        each |= {"memory": float(math.ceil(self.memory))} if self.memory else {}
        return [each] * self.workers + ([{"CPU": self.beside}] if self.beside else [])

    def __str__(self):
        parts = [f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"] + ["a GPU"] * self.gpu
        parts += [f"{self.memory / 1e9:.1f} GB"] if self.memory else []
        each = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
        return f"{self.workers} workers with {each} each" if self.workers > 1 else f"a worker with {each}"


def needs_of(settings: TrainSettings) -> Needs:
    """What a training needs with its fewest workers. With `--device auto` any CPUs will do."""
    compute = settings.compute
    gpu = compute.device == "gpu"
    return Needs(compute.least_workers, compute.threads or 1, gpu, worker_memory(settings, compute.least_workers, gpu))


def worker_memory(settings: TrainSettings, workers: int, use_gpu: bool) -> float:
    """Bytes that each of so many workers needs, as the planner counts them."""
    return worker_bytes(settings, math.ceil(settings.training.batch_size / workers), use_gpu)


class Demand:
    """What is asked of an autoscaler, until it is there: nodes of that size, beside what other jobs hold.

    It ends with a `with` block, if not before. `apart`: each worker by itself, so that some may come without others.
    """

    def __init__(self, needs: Needs, apart: bool = False):
        from ray.util.placement_group import placement_group

        self._groups = [placement_group(of) for of in ([[one] for one in needs.bundles] if apart else [needs.bundles])]

    def held(self) -> int:
        """How many of the parts have come; they hold their room until `withdraw`."""
        return sum(group.wait(0.01) for group in self._groups)

    def is_met(self) -> bool:
        """Whether the room was there, at some time; it is free from then on."""
        if self.held() == len(self._groups):
            self.withdraw()
        return not self._groups

    def is_out_of_reach(self) -> bool:
        """Whether the autoscaler may not start what would hold it."""
        return any(internals.is_out_of_reach(group.id.hex()) for group in self._groups)

    def withdraw(self) -> None:
        from ray.util.placement_group import remove_placement_group

        while self._groups:
            remove_placement_group(self._groups.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.withdraw()


def when_grown(take: Callable[[], Taken], needs: Needs, waiting: Callable[[str], object], whole: bool = False) -> Taken:
    """What `take` gives; where it refuses and the cluster grows on demand, once it has grown.

    Where what was needed has come and `take` still refuses, as on nodes that differ or beside other jobs, more is asked
    for, until it takes or nothing more can come.

    Args:
        take: gives what is wanted, or raises InputError.
        needs: what it would do with.
        waiting: gets a line of text, again and again, that says for what and since when.
        whole: on a cluster that grows, ask before taking what is there, so that nobody has less than was needed.

    Raises:
        InputError: what `take` raises, with a word about the autoscaler where that may not start such nodes, or has
            not for half an hour.
    """
    refusal = None
    if not (whole and internals.autoscales()):
        try:
            return take()
        except InputError as error:
            refusal = error
    if refusal and not _grows(waiting):
        raise refusal
    began, since = time.monotonic(), time.strftime("%H:%M:%S")
    while True:
        why_not = _wait(needs, began, lambda what: waiting(f"waiting since {since} for the autoscaler to bring {what}"))
        try:
            return take()
        except InputError as error:
            if why_not:
                raise InputError(f"{error} {why_not}") from None
        needs = replace(needs, workers=needs.workers + 1)


def _grows(waiting: Callable[[str], object]) -> bool:
    """Whether the cluster grows on demand; an autoscaler that is just starting is waited for."""
    began = time.monotonic()
    while (found := internals.autoscales()) is None and time.monotonic() - began < START_SECONDS:
        waiting("waiting for the autoscaler to start")
        time.sleep(LOOK_SECONDS)
    return bool(found)


def _wait(needs: Needs, began: float, waiting: Callable[[str], object]) -> str:
    """Ask for what is needed until it is there; else a sentence that says why it does not come."""
    with Demand(needs) as demand:
        while not demand.is_met():
            if demand.is_out_of_reach():
                return f"No nodes that the cluster's autoscaler may start hold {needs}."
            if time.monotonic() - began > BRING_SECONDS:
                return (
                    f"The cluster's autoscaler has brought no room for {needs} in {BRING_SECONDS // 60} minutes: "
                    "`ray status` says what it tries."
                )
            waiting(f"room for {needs}")
            time.sleep(LOOK_SECONDS)
    return ""
