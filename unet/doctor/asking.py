"""Calls that become futures, of a thread or of an actor on a node, and what becomes of those that do not answer."""

import contextlib
import functools
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

from unet.cluster import internals
from unet.cluster.nodes import answers
from unet.doctor.examiner import Examiner
from unet.doctor.facts import RayNode, Trouble
from unet.errors import first_line, own_words
from unet.secrets import without_secrets

MOST_LETTERS = 400
"""Of the reason that a library gives."""
UNEXPECTED = 2
"""Of Ray's reasons why a node ended (`NodeDeathInfo` in `common.proto`): it was neither stopped nor drained."""
Ask = Callable[..., Future]
"""Calls a method of an `Examiner`: takes its name and its arguments."""
Asked = dict[str, dict[str, Future]]
"""By node: what is asked of it, by name."""


def in_thread(call: Callable[..., Any], *arguments: Any) -> Future:
    """A call in a thread that keeps no process from ending: a storage may never answer."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def here(storage: str, scratch: str) -> Ask:
    """An `Examiner` in this process."""
    examiner = Examiner(storage, scratch, in_cluster=False)
    return lambda method, *arguments: in_thread(getattr(examiner, method), *arguments)


@contextlib.contextmanager
def on_nodes(nodes: dict[str, RayNode], storage: str, scratch: str) -> Iterator[dict[str, Ask]]:
    """An `Examiner` on each node that accepts connections; it takes no CPU, so that a full cluster has room for it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote(num_cpus=0, max_restarts=0)(Examiner)
    actors = {}
    for name, node in nodes.items():
        if node.answers:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            placed = remote.options(scheduling_strategy=there, max_concurrency=10)  # it is asked all at once
            actors[name] = placed.remote(storage, scratch, in_cluster=True)
    try:
        yield {name: functools.partial(_call, actor) for name, actor in actors.items()}
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _call(actor: Any, method: str, *arguments: Any) -> Future:
    return getattr(actor, method).remote(*arguments).future()


def ray_nodes() -> dict[str, RayNode]:
    """The live nodes by host name, or by address where two have one name."""
    import ray

    leaving, free = internals.draining_nodes(), internals.free_resources()
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerHostname"])
    names = Counter(node["NodeManagerHostname"] for node in alive)
    addresses = Counter(node["NodeManagerAddress"] for node in alive)
    answering = {node["NodeID"]: in_thread(answers, node) for node in alive}
    found = {}
    for node in alive:
        identity, name, address = node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"]
        if names[name] > 1:
            name = address if addresses[address] == 1 else f"{address}:{node['NodeManagerPort']}"
        has = node["Resources"]
        found[name] = RayNode(
            id=identity,
            address=address,
            answers=answering[identity].result(),
            cpus=has.get("CPU", 0),
            gpus=has.get("GPU", 0),
            memory=has.get("memory", 0),
            object_store=has.get("object_store_memory", 0),
            free_cpus=free.get(identity, {}).get("CPU", 0),
            leaving=identity in leaving,
        )
    return found


def lost_nodes() -> dict[str, str]:
    """Why nodes ended that were not told to, by host name, unless one of that name is there again."""
    import ray

    nodes = ray.nodes()
    there = {node["NodeManagerHostname"] for node in nodes if node["Alive"]}
    ended = {node["NodeManagerHostname"]: node for node in nodes if node.get("DeathReason") == UNEXPECTED}
    return {name: node.get("DeathReasonMessage") or "it ended" for name, node in ended.items() if name not in there}


def gather(asked: Asked, until: float) -> dict[str, dict[str, Any]]:
    """The answers that are there at that time of `time.monotonic`, and of the others why not."""
    wait([future for futures in asked.values() for future in futures.values()], max(0, until - time.monotonic()))
    return {name: {what: answer(future) for what, future in futures.items()} for name, futures in asked.items()}


def answer(future: Future) -> Any:
    """What a call gave, or a `Trouble`."""
    if not future.done():
        return Trouble("no answer in time")
    error = future.exception()
    return future.result() if error is None else Trouble(_words(error))


def _words(error: BaseException) -> str:
    """The reason of an error, where Ray wraps those of its actors in paragraphs."""
    cause = error
    while not _is_of(cause, "unet") and (inner := getattr(cause, "cause", None) or cause.__cause__):
        cause = inner
    if _is_of(cause, "unet"):
        words = str(cause)
    elif _is_of(cause, "ray"):
        raised = re.findall(r"^(?:\w+\.)*\w+(?:Error|Exception): .+$", str(error), re.MULTILINE)
        words = own_words(str(error)) or (raised[-1] if raised else first_line(error))
    else:
        words = f"{type(cause).__name__}: {first_line(cause)}"
    return without_secrets(words)[:MOST_LETTERS].rstrip(".")


def _is_of(error: BaseException, package: str) -> bool:
    return type(error).__module__.startswith(f"{package}.")
