"""Room for a job's processes beside what others hold: taken as soon as it is there, or refused in a sentence."""

import time
from typing import NoReturn

from unet.cluster.nodes import cluster_nodes
from unet.cluster.placement import Node, fits_now
from unet.cluster.planner import Plan, plan, plan_now
from unet.config import TrainSettings
from unet.errors import InputError


def take_room(settings: TrainSettings, data_bytes: int) -> Plan:
    """The plan for now, giving what just ended a moment to hand back its CPUs.

    Raises:
        InputError: others hold them; with how many workers would fit.
    """
    for _ in range(40):
        nodes = cluster_nodes()
        if found := plan_now(settings, nodes, data_bytes):
            return found
        time.sleep(0.25)
    least = plan(settings, nodes, data_bytes)
    _refuse_held(least, nodes)


def take_places(plan: Plan, wanted: int) -> int:
    """How many workers of a plan nobody keeps from starting, at most `wanted`; what just ended gets a moment.

    Raises:
        InputError: others leave too little for the workers of one training.
    """
    for _ in range(40):
        nodes = cluster_nodes()
        places = sum(fits_now(node, plan.cpus_per_worker, plan.use_gpu) for node in nodes)
        if places >= wanted:
            return wanted
        time.sleep(0.25)
    if places < plan.num_workers:
        _refuse_held(plan, nodes)
    return places


def _refuse_held(plan: Plan, nodes: list[Node]) -> NoReturn:
    """Raise `InputError`: others hold what the workers of a plan need."""
    if plan.use_gpu:
        check_free_gpus(plan.num_workers, nodes)
    check_free(plan.num_workers, plan.cpus_per_worker, sum(node.free_cpus for node in nodes))
    both = "a free GPU and " if plan.use_gpu else ""
    raise InputError(
        f"No node has {both}{plan.cpus_per_worker:g} free CPUs for each of {plan.num_workers} workers: wait for other "
        "jobs, or give fewer --num-workers."
    )


def free_cpus(need: float) -> float:
    """CPUs that nobody holds, giving what just ended a moment to hand back its own."""
    import ray

    for _ in range(40):
        free = ray.available_resources().get("CPU", 0)
        if free + 1e-6 >= need:
            break
        time.sleep(0.25)
    return free


def check_free(num_workers: int, cpus_per_worker: float, available_cpus: float) -> None:
    """Refuse what would wait for another job's CPUs.

    Raises:
        InputError: with how many workers would fit now.
    """
    fits = int((available_cpus + 1e-6) // cpus_per_worker)
    if fits < num_workers:
        raise InputError(
            f"{num_workers} workers need {num_workers * cpus_per_worker:g} CPUs, but other jobs on the cluster leave "
            f"{available_cpus:g} free: wait for them"
            + (f", or give --num-workers {fits}." if fits else ", or stop them (`ray job stop`).")
        )


def check_free_gpus(workers: int, nodes: list[Node]) -> None:
    """Refuse what would wait for another job's GPUs.

    Raises:
        InputError: with how many workers would fit now.
    """
    free = sum(int(node.free_gpus) for node in nodes)
    if free < workers:
        fewer = f", give --num-workers {free}" if free else ""
        raise InputError(
            f"{workers} worker(s) need a GPU each, but other jobs on the cluster leave {free} free: wait for them"
            f"{fewer}, or give --device cpu."
        )
