"""Nodes that an autoscaler brings: what a job asks for, and how it waits.

Why: docs/decisions.md#what-a-job-waits-for-is-a-placement-group
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from unet.cluster import internals
from unet.config import TrainSettings
from unet.errors import InputError

BRING_SECONDS = 1800
"""How long an autoscaler may take for nodes: a cloud starts a machine in minutes, and may have none for a while."""
LOOK_SECONDS = 1.0

Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Needs:
    """The least that a job can work with, as an autoscaler is asked for it.

    Attributes:
        workers: processes, which may share nodes.
        cpus: of each.
        gpu: whether each needs one.
        beside: CPUs for tasks, on any node.
    """

    workers: int
    cpus: int = 1
    gpu: bool = False
    beside: float = 0

    @property
    def bundles(self) -> list[dict[str, float]]:
        each = {"CPU": float(self.cpus)} | ({"GPU": 1.0} if self.gpu else {})
        return [each] * self.workers + ([{"CPU": self.beside}] if self.beside else [])

    def __str__(self):
        gpu = " and a GPU" if self.gpu else ""
        each = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}{gpu}"
        return f"{self.workers} workers with {each} each" if self.workers > 1 else f"a worker with {each}"


def needs_of(settings: TrainSettings) -> Needs:
    """What a training needs with its fewest workers. With `--device auto` any CPUs will do."""
    compute = settings.compute
    return Needs(compute.least_workers, compute.threads or 1, compute.device == "gpu")


class Demand:
    """What is asked of an autoscaler, until it is there: nodes of that size, beside what other jobs hold."""

    def __init__(self, needs: Needs):
        from ray.util.placement_group import placement_group

        self._group = placement_group(needs.bundles)

    def is_met(self) -> bool:
        """Whether the room was there, at some time; it is free from then on."""
        if self._group is not None and self._group.wait(0.01):
            self.withdraw()
        return self._group is None

    def is_out_of_reach(self) -> bool:
        """Whether the autoscaler may not start what would hold it."""
        return self._group is not None and internals.is_out_of_reach(self._group.id.hex())

    def withdraw(self) -> None:
        from ray.util.placement_group import remove_placement_group

        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


@contextlib.contextmanager
def demanded(needs: Needs) -> Iterator[Demand | None]:
    """A demand for the duration of the block; None on a cluster that does not grow."""
    demand = Demand(needs) if internals.autoscales() else None
    try:
        yield demand
    finally:
        if demand:
            demand.withdraw()


def when_grown(take: Callable[[], Taken], needs: Needs, waiting: Callable[[str], object]) -> Taken:
    """What `take` gives; where it refuses and the cluster grows on demand, once it has grown.

    `waiting` gets a line of text, again and again, that says for what and since when.

    Raises:
        InputError: what `take` raises, with a word about the autoscaler where that may not start such nodes, or has
            not for half an hour.
    """
    try:
        return take()
    except InputError as error:
        if not internals.autoscales():
            raise
        refusal = error
    began, since = time.monotonic(), time.strftime("%H:%M:%S")
    with demanded(needs) as demand:
        while demand and not demand.is_met():
            if demand.is_out_of_reach():
                raise InputError(f"{refusal} No nodes that the cluster's autoscaler may start hold {needs}.")
            if time.monotonic() - began > BRING_SECONDS:
                raise InputError(
                    f"{refusal} The cluster's autoscaler has brought no room for {needs} in {BRING_SECONDS // 60} "
                    "minutes: `ray status` says what it tries."
                )
            waiting(f"waiting since {since} for the autoscaler to bring room for {needs}")
            time.sleep(LOOK_SECONDS)
    return take()
