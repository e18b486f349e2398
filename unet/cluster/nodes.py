"""The nodes of the connected cluster."""

import socket
from collections.abc import Iterable

from unet.cluster import internals
from unet.cluster.placement import Node

ANSWER_SECONDS = 1.0
"""How long a node has to accept a connection."""
NAMED = 4
"""So many nodes are named in a sentence, of more the number."""


def cluster_nodes() -> list[Node]:
    """The nodes of the connected cluster that are alive and not announced to leave."""
    leaving, free, found = internals.draining_nodes(), internals.free_resources(), []
    for name, node in live_nodes().items():
        if name not in leaving:
            r, left = node["Resources"], free.get(name, {})
            sizes = (r.get("CPU", 0), r.get("GPU", 0), r["memory"], r["object_store_memory"])
            found.append(Node(*sizes, left.get("CPU", 0), left.get("GPU", 0)))
    return found


def live_nodes() -> dict[str, dict]:
    """What Ray says of the live nodes, by id; each is contacted, since Ray notices a lost one only after about 15 s."""
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and answers(node)}


def away_from_silent() -> dict[str, str]:
    """Ray's label selector for work that is to keep off nodes that no longer answer; {} where all do.

    Ray itself sends work to a silent node until it gives it up, after a minute, and waits for that work even longer.
    """
    import ray

    silent = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - live_nodes().keys()
    return {"ray.io/node-id": f"!in({','.join(sorted(silent))})"} if silent else {}


def answers(node: dict) -> bool:
    """Whether its part of Ray still accepts connections, at the address where the other nodes reach it too."""
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS):
            return True
    except OSError:
        return False


def named(nodes: Iterable[str]) -> str:
    """Such as "h1, h2, h3, h4 and 96 more"."""
    names = list(nodes)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def free_abandoned_places() -> None:
    """Release what the worker groups of this job's lost controllers reserved; call when no group is to stay alive.

    Ray's own cleaner misses the reservation of a controller that was lost while it started its workers.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(job) and group["state"] != "REMOVED":  # an id ends with that of the job
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))
