"""What the project takes of Ray's private parts: on another version of Ray each test says in words what broke."""

import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ray_processes

from unet.cluster import internals, nodes

PACKAGE = Path(internals.__file__).resolve().parent.parent
PRIVATE = re.compile(r"ray[\w.]*\._|_internal\b|\b_private\b")
pytestmark = pytest.mark.versions


def check(holds: bool, what: str) -> None:
    import ray

    assert holds, f"Ray {ray.__version__}: {what}. Adapt unet/cluster/internals.py."


def test_private_calls_into_ray_stand_in_one_module():
    found = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(PRIVATE.search(line.partition("#")[0]) for line in file.read_text().splitlines())
    }
    assert found == {"cluster/internals.py"}


def test_looking_at_nodes_loads_no_ray_train():
    code = (
        "import sys, ray, unet.cluster.nodes, unet.cluster.session\n"
        "print([name for name in ('ray.train', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_free_resources_are_told_for_each_node(ray_cluster):
    import ray

    (node,) = ray.nodes()
    free = internals.free_resources()
    check(set(free) == {node["NodeID"]}, "available_resources_per_node() is not keyed by node id, in hex")
    check(0 <= free[node["NodeID"]].get("CPU", 0) <= 2, "available_resources_per_node() does not give a node's CPUs")


def test_draining_nodes_are_a_set_of_node_ids(ray_cluster):
    import ray

    state = ray._private.state.state
    check(hasattr(state, "get_draining_nodes"), "GlobalState.get_draining_nodes() is gone")
    check(isinstance(state.get_draining_nodes(), dict), "get_draining_nodes() does not give node ids with deadlines")
    assert internals.draining_nodes() == set()


def test_the_autoscaler_is_asked_what_it_does(ray_cluster):
    """Of a cluster that has none, and so says nothing: what it says is in `test_growing.py`."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    check(isinstance(DEBUG_AUTOSCALING_STATUS, str), "the older autoscaler's report has no name")
    assert not internals.autoscales()
    raw = internal_kv_get_gcs_client().get_cluster_status(timeout_s=5)
    check(isinstance(raw, bytes), "get_cluster_status() does not give the bytes of a GetClusterStatusReply")
    state = GetClusterStatusReply.FromString(raw).autoscaling_state
    check(
        hasattr(state, "infeasible_gang_resource_requests"),
        "an autoscaler's state does not tell the placement groups that no node can hold",
    )
    check(
        isinstance(state.last_seen_cluster_resource_state_version, int),
        "an autoscaler's state does not tell that it is one's",
    )
    assert not internals.is_out_of_reach("0" * 36)


def test_a_head_that_does_not_answer_is_told_from_one_that_refuses(ray_cluster):
    (head,) = ray_processes("gcs_server")
    head.suspend()
    try:
        assert internals._autoscaling_state() is None
    finally:
        head.resume()
    assert internals._autoscaling_state() is not None


def test_work_is_kept_off_a_node_that_no_longer_answers(ray_cluster, monkeypatch):
    """Ray takes the selector as it is meant: there is no other node here."""
    import ray

    assert nodes.away_from_silent() == {}
    (node,) = nodes.live_nodes()
    monkeypatch.setattr(nodes, "answers", lambda node: False)
    selector = nodes.away_from_silent()
    assert selector == {"ray.io/node-id": f"!in({node})"}
    here = {"ray.io/node-id": selector["ray.io/node-id"].removeprefix("!")}
    task = ray.remote(num_cpus=0)(lambda: "ran")
    assert ray.get(task.options(label_selector=here).remote()) == "ran"
    away = task.options(label_selector=selector).remote()
    assert ray.wait([away], timeout=1)[1] == [away]
    ray.cancel(away)


def test_the_address_of_a_started_cluster_is_read_from_its_record(tmp_path, monkeypatch):
    from ray._private import utils

    check(hasattr(utils, "get_ray_address_file"), "the file with the address of `ray start` has no name any more")
    record = tmp_path / "ray_current_cluster"
    monkeypatch.setattr(utils, "get_ray_address_file", lambda temp_dir: str(record))
    check(internals.recorded_address() is None, "read_ray_address() gives an address without a record")
    record.write_text("10.0.0.1:6379\n")
    check(internals.recorded_address() == "10.0.0.1:6379", "read_ray_address() does not give HOST:PORT")


def test_a_ray_that_starts_takes_the_port_of_its_agent_from_ray_params():
    import ray._private.worker as worker
    from ray._private import parameter

    known = parameter.RayParams
    check(
        "dashboard_agent_listen_port" in inspect.signature(known).parameters,
        "RayParams has no dashboard_agent_listen_port: each start may wait for a port that another Ray holds",
    )
    check(
        "ray._private.parameter.RayParams(" in inspect.getsource(worker.init),
        "ray.init() no longer makes RayParams by its module: the free port is not handed over",
    )
    with internals.any_agent_port():
        assert parameter.RayParams().dashboard_agent_listen_port == 0
    assert parameter.RayParams is known


def test_what_ray_prints_about_processes_goes_through_one_function(monkeypatch, capfd):
    import ray._private.worker as worker

    check(hasattr(worker, "print_to_stdstream"), "print_to_stdstream() is gone: paragraphs about dead workers are back")
    names = list(inspect.signature(worker.print_to_stdstream).parameters)
    check(names == ["data", "ignore_prefix"], f"print_to_stdstream() takes {names}")
    source = inspect.getsource(worker).replace(inspect.getsource(worker.print_to_stdstream), "")
    check("print_to_stdstream" in source, "nothing calls print_to_stdstream() by its name in the module")
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    internals.silence_deaths()
    worker.print_to_stdstream({"lines": ["a worker died"]}, ignore_prefix=False)
    assert capfd.readouterr() == ("", "")


def test_the_controller_calls_back_when_it_starts(capfd):
    from ray import cloudpickle
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller import controller

    hook = getattr(ControllerCallback, "after_controller_start", None)
    check(hook is not None, "ControllerCallback.after_controller_start() is gone: the driver cannot end a controller")
    names = list(inspect.signature(hook).parameters)
    check(names == ["self", "train_run_context"], f"after_controller_start() takes {names}")
    check(
        "after_controller_start" in inspect.getsource(controller),
        "the controller no longer calls after_controller_start()",
    )
    sent = pickle.loads(cloudpickle.dumps(internals.on_controller_start(lambda: print("started"))))
    sent.after_controller_start(None)
    assert capfd.readouterr().out == "started\n"


@pytest.mark.parametrize(
    ("name", "kind"), [("datasets", "DatasetsCallback"), ("placement group cleaner", "PlacementGroupCleanerCallback")]
)
def test_needless_callbacks_are_left_out(name, kind):
    from ray.train import RunConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    check(
        hasattr(DataParallelTrainer, "_create_default_callbacks"),
        "DataParallelTrainer._create_default_callbacks() is gone: each start makes needless processes",
    )
    check("self._create_default_callbacks()" in inspect.getsource(DataParallelTrainer.fit), "fit() does not call it")

    def kinds(without):
        trainer = internals.trainer(without, print, run_config=RunConfig(name="unused"))
        return [type(callback).__name__ for callback in trainer._create_default_callbacks()]

    every = kinds(set())
    check(kind in every, f"Ray Train has no {kind} by default: leaving it out is needless")
    assert kinds({name}) == [one for one in every if one != kind]
