"""Room for a job's processes beside other jobs: taken as soon as it is there, or refused in a sentence."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NoReturn, TypeVar

from unet.cluster.demand import Needs, needs_of, when_grown
from unet.cluster.nodes import cluster_nodes
from unet.cluster.placement import ROUNDING, Node, Placement
from unet.cluster.planner import Plan, plan, plan_now
from unet.config import TrainSettings
from unet.errors import InputError

LOOKS, LOOK_SECONDS = 40, 0.25
"""How often, and how far apart, the nodes are looked at before room is refused."""

Workers = TypeVar("Workers", bound=Placement)


def take_room(settings: TrainSettings, data_bytes: int, waiting: Callable[[str], object]) -> Plan:
    """The plan of a training for now; `waiting` is told what an autoscaler is waited for.

    Where that brings nodes, each worker gets its own cores for `--threads`, whatever idles there already.

    Raises:
        InputError: other jobs hold what it needs; with how many workers would fit.
    """

    def now() -> Plan:
        for nodes in _looks():
            if found := plan_now(settings, nodes, data_bytes):
                return found
        refuse_held(plan(settings, nodes, data_bytes), nodes)

    return when_grown(now, needs_of(settings), waiting, whole=settings.compute.threads is not None)


def take_places(plan: Plan, wanted: int, needs: Needs, waiting: Callable[[str], object]) -> int:
    """How many workers of a sweep's plan there is room for now, at most `wanted`.

    Raises:
        InputError: other jobs leave too little for the workers of one training.
    """

    def now() -> int:
        return take(lambda nodes: replace(plan, num_workers=wanted), least=plan.num_workers).num_workers

    return when_grown(now, needs, waiting)


def take(
    planned: Callable[[list[Node]], Workers],
    beside: float = 0,
    least: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Workers:
    """What is planned for the nodes, or as many of its workers as there is room for now.

    Args:
        planned: makes the plan for the nodes of the moment.
        beside: CPUs left for tasks, anywhere on the cluster.
        least: fewest workers that are of use (default: all).
        say: gets a sentence where there are fewer than planned.

    Raises:
        InputError: other jobs hold what the fewest workers need.
    """
    for nodes in _looks():
        wanted = planned(nodes)
        room = min(wanted.num_workers, wanted.room(nodes, beside))
        if room == wanted.num_workers:
            return wanted
    if room < (least := least or wanted.num_workers):
        refuse_held(replace(wanted, num_workers=least), nodes, beside)
    gpus = f" and {_free_gpus(nodes)} GPUs" if wanted.use_gpu else ""
    say(f"Other jobs leave {_free_cpus(nodes):g} CPUs{gpus} free: {room} of {wanted.num_workers} workers start.")
    return replace(wanted, num_workers=room)


def _looks() -> Iterator[list[Node]]:
    """The nodes of the moment, again and again: what just ended needs a moment to hand back its CPUs."""
    for look in range(LOOKS):
        if look:
            time.sleep(LOOK_SECONDS)
        yield cluster_nodes()


def refuse_held(wanted: Placement, nodes: list[Node], beside: float = 0) -> NoReturn:
    """Refuse workers, with `beside` CPUs for tasks, that would wait for other jobs.

    Raises:
        InputError: with how many would fit now.
    """
    count, cpus, free = wanted.num_workers, wanted.cpus_per_worker, _free_cpus(nodes)
    need = "1 worker needs" if count == 1 else f"{count} workers need"
    if wanted.use_gpu and (gpus := _free_gpus(nodes)) < count:
        fewer = f", give --num-workers {gpus}" if gpus else ""
        raise InputError(
            f"{need} a GPU each, but other jobs on the cluster leave {gpus} free: wait for them{fewer}, or give "
            "--device cpu."
        )
    fit = max(0, int((free - beside + ROUNDING) // cpus))
    if fit < count:
        tasks = f" and {beside:g} for tasks" if beside else ""
        fewer = f"give --num-workers {fit}." if fit else "stop them (`ray job stop`)."
        raise InputError(
            f"{need} {count * cpus:g} CPUs{tasks}, but other jobs on the cluster leave {free:g} free: wait for them, "
            f"or {fewer}"
        )
    both, otherwise = ("a free GPU and ", ", or --device cpu") if wanted.use_gpu else ("", "")
    workers = "the worker" if count == 1 else f"each of {count} workers"
    raise InputError(
        f"There is no node with {both}{cpus:g} free CPUs for {workers}: wait for other jobs, or give fewer "
        f"--num-workers{otherwise}."
    )


def _free_cpus(nodes: list[Node]) -> float:
    return sum(node.free_cpus for node in nodes)


def _free_gpus(nodes: list[Node]) -> int:
    return sum(int(node.free_gpus) for node in nodes)
