"""A cluster that begins without workers: jobs wait for what its autoscaler brings, and let go of it."""

import contextlib
import json
import sys
import time

import pytest
from conftest import ROOT, TINY, read_json
from hosts import Hosts

LEGACY = ("auth", "docker", "file_mounts")
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
MORE = ["10.77.0.101", "10.77.0.102"]
"""Addresses for the nodes that come."""
SEEN = """
import json, ray
from unet.cluster import internals
ray.init(logging_level="ERROR", log_to_driver=False)
print("seen", internals.autoscales(), sum(node["Alive"] for node in ray.nodes()))
"""
"""Whether the cluster grows, and how many nodes it has."""
IMPATIENT = """
import sys
from unet.commands.train import main
from unet.supervise import supervisor
supervisor.GROW_SECONDS = 5.0
sys.exit(main())
"""
"""A training that makes room for more workers as soon as it is there."""


def cluster_file(address: str) -> dict:
    """A head without CPUs, and up to two nodes by `growing_nodes`, which go when idle for 12 s.

    Each has two CPUs, and memory for one worker.
    """
    empty = {name: {} for name in LEGACY} | {f"{name}_commands": [] for name in COMMANDS}
    kinds = {
        "head.kind": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 2, "memory": 1_200_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    }
    provider = {"type": "external", "module": "growing_nodes.GrowingNodes", "address": address}
    provider |= {"head_type": "head.kind", "disable_node_updaters": True, "free": MORE}
    return empty | {
        **{"cluster_name": "growing", "max_workers": 2, "idle_timeout_minutes": 0.2, "head_node_type": "head.kind"},
        **{"provider": provider, "available_node_types": kinds, "cluster_synced_files": [], "rsync_exclude": []},
        **{"rsync_filter": [], "file_mounts_sync_continuously": False},
    }


@contextlib.contextmanager
def growing(folder, version: int):
    """The head of such a cluster, with the autoscaler of this version: 2 is that of today."""
    with Hosts(folder, cpus=()) as hosts:
        config = folder / "cluster.json"
        config.write_text(json.dumps(cluster_file(hosts.joined["RAY_ADDRESS"])))
        known = {"RAY_CLOUD_INSTANCE_ID": "head", "RAY_NODE_TYPE_NAME": "head.kind"} if version == 2 else {}
        known |= {"RAY_enable_autoscaler_v2": str(version - 1), "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        known["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
        head = hosts.add()
        for address in MORE:
            head.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
        head.start_ray(f"--autoscaling-config={config}", cpus=0, env=known)
        hosts.nodes()
        wait_until(head, hosts.joined, "seen True 1")  # the older one writes down what it manages every few seconds
        yield head, hosts.joined


def wait_until(head, joined, words: str) -> None:
    deadline = time.monotonic() + 180
    while words not in (said := head.run(sys.executable, "-c", SEEN, env=joined).stdout):
        assert time.monotonic() < deadline, said
        time.sleep(1)


@pytest.mark.cluster
@pytest.mark.parametrize("version", [2, 1])
def test_a_job_waits_for_what_an_autoscaler_brings(tmp_path, packed, version):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | {"epochs": 1}).items()]
    flags += [f"--data={packed}", f"--storage-path={tmp_path / 'runs'}", "--num-workers=2", "--run-name=grown"]
    with growing(tmp_path, version) as (head, joined):
        done = head.run(sys.executable, "jobs/train.py", *flags, env=joined)
        assert done.returncode == 0, done.stdout
        assert "for the autoscaler to bring room for 2 workers with 1 CPU and 0.8 GB each" in done.stdout
        summary = read_json(tmp_path / "runs" / "grown" / "summary.json")
        assert summary["status"] == "finished"
        wait_until(head, joined, "seen True 1")  # nothing is asked for any more
        if version == 2:  # the older one does not say so, and is waited for
            more = ("--num-workers=5", "--run-name=more")
            refused = head.run(sys.executable, "jobs/train.py", *flags, *more, env=joined)
            assert refused.returncode == 2, refused.stdout
            assert "may start hold 5 workers with 1 CPU and 0.8 GB each." in refused.stdout


@pytest.mark.cluster
@pytest.mark.parametrize("version", [2, 1])
def test_an_elastic_run_has_an_autoscaler_bring_more(tmp_path, packed, version):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | {"epochs": 1000}).items()]
    flags += [f"--data={packed}", f"--storage-path={tmp_path / 'runs'}", "--num-workers=1:2", "--run-name=grown"]
    with growing(tmp_path, version) as (head, joined):
        done = head.run(sys.executable, "-c", IMPATIENT, *flags, "--minutes=1.5", env=joined)
        assert done.returncode == 0, done.stdout
        summary = read_json(tmp_path / "runs" / "grown" / "summary.json")
        (grown,) = summary["restart_log"]
        assert grown["workers"] == 2 and "room for 2 workers" in grown["reason"]
        wait_until(head, joined, "seen True 1")


@pytest.mark.cluster
def test_where_kuberay_only_names_its_pods_a_job_is_refused_at_once(tmp_path, packed):
    """`enableInTreeAutoscaling: false`: the head's own autoscaler looks on, and says that it can bring nothing."""
    named = {"RAY_CLOUD_INSTANCE_ID": "head", "RAY_NODE_TYPE_NAME": "headgroup", "RAY_enable_autoscaler_v2": "1"}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    flags += [f"--data={packed}", f"--storage-path={tmp_path / 'runs'}"]
    with Hosts(tmp_path, cpus=()) as hosts:
        head = hosts.add()
        head.start_ray(cpus=0, env=named | {"AUTOSCALER_UPDATE_INTERVAL_S": "1"})
        hosts.nodes()
        refused = head.run(sys.executable, "jobs/train.py", *flags, env=hosts.joined)
    assert refused.returncode == 2, refused.stdout
    assert "The cluster has no CPUs yet" in refused.stdout and "may start hold a worker with 1 CPU" in refused.stdout
