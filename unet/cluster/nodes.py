"""The nodes of the connected cluster."""

import socket

from unet.cluster.placement import Node

ANSWER_SECONDS = 1.0
"""How long a node has to take a connection."""


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
