"""What a run asks of the cluster, compared with what there is, before anything starts."""

import math
import os
import shutil
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

from unet.config import TrainSettings, parse_bytes
from unet.data.shards import Prepared
from unet.errors import InputError
from unet.storage import Folder
from unet.training.arrays import weight_shapes

READERS = 2
RESERVED_CPUS = 0.5
"""Left on each node for two reading tasks of 0.2 CPUs (`unet.data.ingest`)."""
ANSWER_SECONDS = 1.0
"""How long a node has to take a connection."""
WORKER_BYTES = 0.8e9
"""A worker with TensorFlow loaded, before its first step (measured: 0.6 GB)."""


@dataclass(frozen=True)
class Node:
    """What Ray says a node has in all, and what of it nobody holds."""

    cpus: float
    gpus: float = 0
    memory: float = math.inf
    object_store: float = math.inf
    free_cpus: float = 0
    free_gpus: float = 0


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
    """

    num_workers: int
    cpus_per_worker: float
    threads: int
    use_gpu: bool
    kept: bool
    data_bytes: int
    stream_bytes: int


def cluster_nodes() -> list[Node]:
    """The nodes of the connected cluster that live and are to stay."""
    import ray

    leaving, found = draining_nodes(), []
    # What of each node is free Ray tells by no public call; only the sum of all.
    free = ray._private.state.available_resources_per_node()
    for name, node in live_nodes().items():
        if name not in leaving:
            r, left = node["Resources"], free.get(name, {})
            sizes = (r.get("CPU", 0), r.get("GPU", 0), r["memory"], r["object_store_memory"])
            found.append(Node(*sizes, left.get("CPU", 0), left.get("GPU", 0)))
    return found


def live_nodes() -> dict[str, dict]:
    """What Ray says of the nodes that live, by id; each is asked, since Ray misses a lost one only after 15 s or so."""
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and _answers(node)}


def _answers(node: dict) -> bool:
    """Whether its part of Ray still listens, where every other node of the cluster must reach it too."""
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS):
            return True
    except OSError:
        return False


def draining_nodes() -> set[str]:
    """The ids of nodes whose end is announced: a spot machine that is called back."""
    import ray

    # What Ray Train's own watcher asks. Its public form, `get_preemption_info`, makes the workers wait for each other.
    return set(ray._private.state.state.get_draining_nodes())


def free_abandoned_places() -> None:
    """Give back what the groups of this job's lost controllers reserved; call when none of them is to live.

    Ray's own cleaner does not know the places of a controller that was lost while it started its workers.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(job) and group["state"] != "REMOVED":  # an id ends with that of the job
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def plan_now(
    settings: TrainSettings, nodes: list[Node], data_bytes: int, together: int = 1, held: int = 0
) -> Plan | None:
    """The plan for as many workers as there is room for now; None if not even the least find room.

    Elastic or not, a worker gets what it would have beside the most that the nodes could hold, so that others can
    join it. `held` workers have their places already.

    Raises:
        InputError: not even empty nodes would hold the least.
    """
    counts = settings.worker_counts
    while True:
        try:
            most = plan(settings, nodes, data_bytes, together, counts[-1])
            break
        except InputError:
            if len(counts) == 1:
                raise
            counts = counts[:-1]
    places = sum(_places(node, most) for node in nodes) + held
    fit = [workers for workers in counts if workers <= places]
    return replace(most, num_workers=fit[-1]) if fit else None


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
    check_free(least.num_workers, least.cpus_per_worker, sum(node.free_cpus for node in nodes))
    raise InputError(
        f"No node has {least.cpus_per_worker:g} free CPUs for each of {least.num_workers} workers: wait for other "
        "jobs, or give fewer --num-workers."
    )


def _places(node: Node, plan: Plan) -> int:
    # What is free may hold the reserve, and may lack it where readers are at work.
    cpus = min(int((node.free_cpus + 1e-6) // plan.cpus_per_worker), _fits(node.cpus, plan.cpus_per_worker))
    return min(cpus, int(node.free_gpus)) if plan.use_gpu else cpus


def plan(
    settings: TrainSettings, nodes: list[Node], data_bytes: int, together: int = 1, workers: int | None = None
) -> Plan:
    """Fit the settings to the nodes, where `together` such trainings run at a time (trials of a sweep).

    `workers` is their number, by default the least that the settings allow.

    Raises:
        InputError: it would not fit or would wait for ever; with the settings that would fit.
    """
    workers = workers or settings.compute.least_workers
    cores = int(sum(n.cpus for n in nodes))
    if not any(n.cpus > 0 for n in nodes):
        raise InputError("The cluster has no CPUs yet: wait until its workers have joined (`ray status` shows them).")
    if workers > max(1, cores):
        raise InputError(f"--num-workers {workers} is more than the cluster's {cores} CPUs: at most {cores} fit.")
    processes = workers * together
    cpus = cpus_per_worker([n.cpus for n in nodes], processes)
    hosts = [n for n in nodes if _fits(n.cpus, cpus)]
    on_host = max(min(_fits(n.cpus, cpus), processes) for n in hosts)
    cores = int(min(n.cpus // min(_fits(n.cpus, cpus), processes) for n in hosts))
    threads = settings.compute.threads or max(1, cores)
    share = math.ceil(settings.training.batch_size / workers)
    need, memory = on_host * worker_bytes(settings, share), min(n.memory for n in hosts)
    if need > memory:
        fits = int(settings.training.batch_size * memory / need * 0.8)
        raise InputError(
            f"{on_host} workers of a node need about {need / 1e9:.1f} GB, the node has {memory / 1e9:.1f} GB: "
            f"try --batch-size {max(1, fits)}."
        )
    store = min(n.object_store for n in hosts)
    limit = settings.data.memory_budget
    budget = parse_bytes(limit) if limit else min(n.memory for n in hosts) / 4
    return Plan(
        num_workers=workers,
        cpus_per_worker=cpus,
        threads=threads,
        use_gpu=sum(int(n.gpus) for n in nodes) >= processes,
        kept=data_bytes <= min(budget, 0.6 * store),
        data_bytes=data_bytes,
        stream_bytes=int(min(max(budget, 256e6), 0.5 * store)),
    )


def worker_bytes(settings: TrainSettings, share: int) -> float:
    """An estimate of a worker's peak memory: TensorFlow, four copies of the weights, activations of its share."""
    model, side = settings.model, settings.data.image_size
    filters = [model.base_filters * 2**level for level in range(model.depth + 1)]
    weights = sum(27 * f * f for f in filters) * 4  # both paths of a level hold about 27 f² numbers
    # About 12 maps of a level's size and filters live until the backward pass (measured at 16 and 64 filters).
    activations = sum(12 * f * (side / 2**level) ** 2 for level, f in enumerate(filters)) * 4
    return WORKER_BYTES + 4 * weights + share * activations


def plan_trials(
    settings: TrainSettings, nodes: list[Node], data_bytes: int, at_most: int | None = None
) -> tuple[Plan, int]:
    """Fit as many such trainings beside each other as CPUs, GPUs and memory allow, and no more than `at_most`.

    Raises:
        InputError: not even one fits; with the settings that would.
    """
    workers, cpus, gpus = (
        settings.compute.least_workers,
        int(sum(n.cpus for n in nodes)),
        int(sum(n.gpus for n in nodes)),
    )
    together = max(1, (gpus if gpus >= workers else cpus) // workers)
    together = min(together, at_most or together)
    while True:
        try:
            found = plan(settings, nodes, data_bytes, together)
            if found.kept or together <= READERS * len(nodes):
                return found, together
            together = READERS * len(nodes)  # each trial that streams has readers of its own
        except InputError:
            if together == 1:
                raise
            together -= 1


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


def check_writable(storage: Folder, flag: str = "--storage-path") -> None:
    """Refuse a local place that cannot be written; `flag` gives another.

    Raises:
        InputError: with what to do.
    """
    place = _existing(storage)
    if place and not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise InputError(f"Cannot write to {storage}: give another {flag}, or change who may write there.")


def check_disk(settings: TrainSettings, storage: Folder, parameters: int, runs: int = 1) -> None:
    """Refuse runs whose checkpoints would not fit on a local disk.

    Raises:
        InputError: with what is needed and what is free.
    """
    place = _existing(storage)
    if place is None:
        return
    # Weights and two moments of Adam; the best, the last, and the one being written; the packaged model.
    need, free = runs * parameters * 12 * (settings.run.keep_checkpoints + 2) + 100e6, shutil.disk_usage(place).free
    if need > free:
        raise InputError(
            f"The checkpoints need about {need / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free: "
            "make room, or give another --storage-path."
        )


def check_samples(settings: TrainSettings, prepared: Prepared) -> dict[str, int]:
    """How many samples of each split the run uses.

    Raises:
        InputError: a split that training needs is empty.
    """
    counts = dict(prepared.manifest.counts)
    for split in ("train", "val"):
        if not counts[split]:
            raise InputError(
                f"{prepared.folder} has no {split} samples: give more samples or other lists, or prepare "
                "them with another --val-fraction."
            )
    if settings.data.limit_train:
        counts["train"] = min(counts["train"], settings.data.limit_train)
    return counts


def count_parameters(image_channels: int, base_filters: int, depth: int, num_classes: int) -> int:
    """The number of weights of the U-Net, without building it."""
    return sum(map(math.prod, weight_shapes(base_filters, depth, num_classes, image_channels).values()))


def _existing(storage: Folder) -> Path | None:
    """The nearest folder above a local storage path that exists already."""
    if not storage.is_local:
        return None
    return next(p for p in [Path(storage.path), *Path(storage.path).parents] if os.path.exists(p))


def cpus_per_worker(node_cpus: list[float], workers: int) -> float:
    """The most that each of `workers` can have, with the reserve of every node left alone."""
    candidates = {
        math.floor((cpus - _reserve(cpus)) / k * 1e4) / 1e4  # Ray counts in ten-thousandths
        for cpus in node_cpus
        for k in range(1, workers + 1)
        if cpus > 0
    }
    return max(c for c in candidates if c > 0 and sum(_fits(cpus, c) for cpus in node_cpus) >= workers)


def _fits(node_cpus: float, cpus_per_worker: float) -> int:
    return int((node_cpus - _reserve(node_cpus) + 1e-9) // cpus_per_worker)


def _reserve(node_cpus: float) -> float:
    return min(RESERVED_CPUS, node_cpus / 2)
