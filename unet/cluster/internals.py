"""Every call into what Ray keeps to itself: all that another version of Ray may break, each with its reason.

`tests/test_internals.py` says in words what broke. Ray Train takes a second to import and brings pandas, so it is
loaded only where its parts are asked for.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

Needless = Literal["datasets", "placement group cleaner"]
"""Callbacks of Ray Train, each of which starts a process."""


def free_resources() -> dict[str, dict[str, float]]:
    """By node id: the free amount of each resource. Ray's public call gives only the sum over all nodes."""
    import ray

    return ray._private.state.available_resources_per_node()


def draining_nodes() -> set[str]:
    """The ids of nodes whose end is announced, such as a spot machine that is being reclaimed.

    It is what Ray Train's own watcher asks. The public form, `get_preemption_info`, makes the workers wait for each
    other.
    """
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def autoscales() -> bool | None:
    """Whether something brings the cluster nodes as they are asked for: `ray up`, KubeRay. No public call says so.

    The older autoscaler (`RAY_UP_enable_autoscaler_v2=0`) writes down which nodes it manages. Nodes of today's have the
    name of a group, but so have KubeRay's without one: it has to have told its state, too. One that only looks on tells
    it as well where nodes have such names, and then that whatever is asked for is out of reach.

    Returns:
        None where nodes have such names and no autoscaler has said a word: one that starts needs some seconds for it.
    """
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}").get("autoscaler_report") or {}
    if _can_grow(report.get("active_nodes") or {}):
        return True
    labels = [node.get("Labels") or {} for node in ray.nodes() if node["Alive"]]
    if not _can_grow(of["ray.io/node-group"] for of in labels if "ray.io/node-group" in of):
        return False
    state = _autoscaling_state()
    return True if state is not None and state.last_seen_cluster_resource_state_version else None


def _can_grow(kinds: Iterable[str]) -> bool:
    """Whether nodes of such types are brought by an autoscaler.

    One that only looks on knows nodes by their ids (`node_…`); machines that are there already (`local.cluster.node`,
    provider `local`) are all started at once.
    """
    return any(not kind.startswith(("node_", "local.")) for kind in kinds)


def is_out_of_reach(placement_group: str) -> bool:
    """Whether the autoscaler says that no nodes which it may bring hold this placement group; the older one never says.

    `ray status` shows as much in words.
    """
    state = _autoscaling_state()
    asked = state.infeasible_gang_resource_requests if state is not None else []
    return any(placement_group in one.details for one in asked)


def _autoscaling_state() -> Any:
    """What today's autoscaler last told the head (`AutoscalingState` in `autoscaler.proto`); None: no answer."""
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]  # not in its stub
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    try:
        status = internal_kv_get_gcs_client().get_cluster_status(timeout_s=5)
    except (ray.exceptions.RpcError, ray.exceptions.GetTimeoutError):
        return None
    return GetClusterStatusReply.FromString(status).autoscaling_state


def recorded_address() -> str | None:
    """HOST:PORT of the cluster that `ray start` left a record of on this machine; None without one.

    The public "auto" takes any cluster of the machine, another job's too, with which this one would end.
    """
    from ray._private.utils import read_ray_address

    return read_ray_address() or None


@contextlib.contextmanager
def any_agent_port() -> Iterator[None]:
    """A Ray that starts within the block has its node's agent listen on a free port.

    `ray.init` cannot change the fixed one. Where another Ray of the machine has it, or an agent whose driver was
    killed, which lives a minute longer, every start would wait for it for more than three seconds.
    """
    from ray._private import parameter

    known = parameter.RayParams
    free = functools.partial(known, dashboard_agent_listen_port=0)
    parameter.RayParams = free  # type: ignore[misc, assignment]  # a class, of which Ray only makes one object
    try:
        yield
    finally:
        parameter.RayParams = known  # type: ignore[misc]


def silence_deaths() -> None:
    """Keep Ray from printing a paragraph about each process that died, for which it has no setting: ours is a line."""
    import ray

    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None


def on_controller_start(call: Callable[[], object]) -> "ControllerCallback":
    """A callback of Ray Train that calls `call` in the controller when it starts: public callbacks see only workers."""
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class OnStart(ControllerCallback):
        def after_controller_start(self, train_run_context) -> None:
            call()

    return OnStart()


def trainer(without: set[Needless], *args: Any, **kwargs: Any) -> "DataParallelTrainer":
    """Ray Train's `DataParallelTrainer(*args, **kwargs)` without some of its callbacks, for which it has no setting."""
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    kinds = {"datasets": DatasetsCallback, "placement group cleaner": PlacementGroupCleanerCallback}
    left_out = tuple(kinds[name] for name in without)

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self):
            return [one for one in super()._create_default_callbacks() if not isinstance(one, left_out)]

    return Trainer(*args, **kwargs)
