"""A small sweep on two CPUs: it ends by itself, ranks its trials, and leaves nothing behind."""

import csv
import json
import time

import mlflow
import psutil
import pytest
import yaml
from conftest import TINY, job, read_json

FLAGS = [
    f"--{k.replace('_', '-')}={v}" for k, v in (TINY | {"epochs": 2}).items() if k not in ("base_filters", "dropout")
]


@pytest.fixture(scope="module")
def swept(ray_cluster, storage, packed, tmp_path_factory):
    space = tmp_path_factory.mktemp("space") / "small.yaml"
    space.write_text("dropout: {uniform: [0.0, 0.3]}\nbase_filters: {choice: [2, 4]}\n")
    flags = [f"--data={packed}", f"--storage-path={storage}", "--run-name=swept", f"--space={space}", "--num-samples=3"]
    address = {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    done = job("tune", *FLAGS, *flags, env=address, timeout=400)
    assert done.returncode == 0, done.stdout
    return storage / "swept", done.stdout


def test_every_trial_is_ranked_and_the_best_can_be_trained(swept):
    folder, output = swept
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    scores = [float(r["best_val_mean_iou"]) for r in rows]
    assert len(rows) == 3 and scores == sorted(scores, reverse=True)
    assert {r["end"] for r in rows} <= {"finished", "pruned"} and "finished" in {r["end"] for r in rows}
    assert [json.loads(line)["trial"] for line in (folder / "trials.jsonl").read_text().splitlines()] == [
        r["trial"] for r in rows
    ]
    best = yaml.safe_load((folder / "best_config.yaml").read_text())
    assert best["base_filters"] == int(rows[0]["base_filters"]) and best["dropout"] == float(rows[0]["dropout"])
    assert best["epochs"] == 2 and "storage_path" not in best
    refused = job("train", f"--config={folder}/best_config.yaml", "--num-workers=99")  # read whole, then refused
    assert refused.returncode == 2 and "--num-workers 99" in refused.stdout
    summary = read_json(folder / "summary.json")
    assert summary["status"] == "finished" and summary["best_trial"] == rows[0]["trial"]
    assert f"{folder}/best_config.yaml" in output and "Traceback" not in output
    # A row's score is what the trial's own run says.
    for row in rows:
        lines = [json.loads(line) for line in (folder / row["trial"] / "metrics.jsonl").read_text().splitlines()]
        assert max(r["val_mean_iou"] for r in lines) == float(row["best_val_mean_iou"])


def test_mlflow_has_a_parent_and_a_child_a_trial(swept, storage):
    folder, _ = swept
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    parent = client.get_run(read_json(folder / "summary.json")["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(children) == 3 and {c.info.status for c in children} == {"FINISHED"}
    assert {c.data.tags["end"] for c in children} <= {"finished", "pruned"}
    assert all({"val_mean_iou", "val_iou_pet", "best_val_mean_iou"} <= set(c.data.metrics) for c in children)
    assert len({c.data.params["dropout"] for c in children}) == 3


def test_nothing_is_left_behind(swept):
    import ray
    from ray.util.state import list_actors, list_placement_groups

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        alive = [
            a
            for a in list_actors(filters=[("state", "=", "ALIVE")])
            if "Train" in a.class_name or "trial" in a.class_name
        ]
        held = [p for p in list_placement_groups() if p.state != "REMOVED"]
        training = [
            p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])
        ]
        if not (alive or held or training) and ray.available_resources().get("CPU") == 2:
            break
        time.sleep(0.5)
    assert not alive and not held and not training
    assert ray.available_resources()["CPU"] == 2
