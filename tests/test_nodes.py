"""A cluster whose nodes are called back, join and are lost while a run goes on."""

import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import RAY, TINY, free_ports, job, read_json, weights_of
from test_run import start_job, wait_for

FLAGS = TINY | {"base_filters": 4, "grad_shards": 2, "threads": 1, "epochs": 150}


def epochs_of(folder: Path) -> int:
    return (folder / "metrics.jsonl").read_text().count("\n") if (folder / "metrics.jsonl").exists() else 0


@pytest.mark.slow
def test_a_run_goes_on_through_nodes_that_come_and_go(tmp_path, packed):
    """A node called back is left with a checkpoint, a new one is used, a lost one is done without: the same weights."""
    from ray.cluster_utils import Cluster

    flags = [f"--{k.replace('_', '-')}={v}" for k, v in FLAGS.items()] + [
        f"--data={packed}",
        f"--storage-path={tmp_path}",
    ]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "dashboard_port": free_ports()[0]})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        process = start_job(*flags, "--num-workers=1:2", "--run-name=moving", RAY_ADDRESS=cluster.address)
        folder = tmp_path / "moving"

        def workers():
            log = read_json(folder / "summary.json").get("restart_log") or [{"workers": 2}]
            return [entry["workers"] for entry in log]

        def more_epochs(count=2):
            before = epochs_of(folder)
            wait_for(lambda: epochs_of(folder) >= before + count or process.poll() is not None, 240)
            assert process.poll() is None, process.communicate()[0]

        more_epochs()
        reason = [
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            "spot",
            "--deadline-remaining-seconds",
            "60",
        ]
        drain = [*RAY, "drain-node", "--address", cluster.address]
        subprocess.run([*drain, "--node-id", second.node_id, *reason], check=True, capture_output=True)
        wait_for(lambda: workers() == [1], 120)
        more_epochs()
        third = cluster.add_node(num_cpus=1)
        wait_for(lambda: workers() == [1, 2], 240)
        more_epochs()
        cluster.remove_node(third, allow_graceful=False)
        wait_for(lambda: workers() == [1, 2, 1], 240)
        output = process.communicate(timeout=400)[0]
        assert process.returncode == 0, output
        assert "1 of 2 nodes are being shut down (node_0 (" in output and "room for 2 workers: saving" in output
        log = read_json(folder / "summary.json")["restart_log"]
        assert log[2]["reason"].endswith(f"; 1 of 2 nodes lost: node_0 ({socket.gethostname()})"), log
        plain = job("train", *flags, "--num-workers=1", "--run-name=still", env={"RAY_ADDRESS": cluster.address})
        assert plain.returncode == 0, plain.stdout
    finally:
        cluster.shutdown()
    last = sorted(p.name for p in (folder / "checkpoints").iterdir())[-1]
    one, other = weights_of(folder, last), weights_of(tmp_path / "still", last)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)
