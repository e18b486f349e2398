"""Real sweeps on two CPUs: killed and continued, compared with plain trainings, and nothing left behind."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import mlflow
import numpy as np
import psutil
import pytest
import yaml
from conftest import ROOT, TINY, job, read_json, train, weights_of

EPOCHS = 9
KILLS = int(os.environ.get("UNET_SWEEP_KILLS", "1"))
"""How often the driver of the sweep is killed; `make kill-test` does it three times."""
FLAGS = {k: v for k, v in TINY.items() if k not in ("base_filters", "dropout", "learning_rate")} | {"epochs": EPOCHS}
SPACE = "dropout: {uniform: [0.05, 0.3]}\nbase_filters: {choice: [4, 8]}\nlearning_rate: {loguniform: [0.001, 0.01]}\n"


def flags_of(**values) -> list[str]:
    return [f"--{k.replace('_', '-')}={v}" for k, v in values.items()]


def rows_of(folder) -> list[dict]:
    """The ledger, read without the project's code."""
    path = folder / "trials.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def metrics_of(folder, trial: str) -> list[dict]:
    return [json.loads(line) for line in (folder / trial / "metrics.jsonl").read_text().splitlines()]


def children_of(storage, folder):
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    parent = client.get_run(read_json(folder / "summary.json")["mlflow_run_id"])
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    return client, parent, client.search_runs([parent.info.experiment_id], query)


@pytest.fixture(scope="module")
def space_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("space") / "small.yaml"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="module")
def swept(ray_cluster, storage, packed, space_file, tmp_path_factory):
    """A sweep of six trials whose driver is killed, anywhere in wall time, then runs to its end.

    Its folder, the output of all starts, and what had ended at each kill.
    """
    log = tmp_path_factory.mktemp("log") / "output.txt"
    flags = flags_of(**FLAGS, data=packed, storage_path=storage, run_name="swept", space=space_file, num_samples=6)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    folder, command, ended = storage / "swept", [sys.executable, str(ROOT / "jobs" / "tune.py"), *flags], []
    for _ in range(KILLS):
        known = {r.get("pid") for r in rows_of(folder)} | {None}
        with log.open("a") as output:
            pipes = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = subprocess.Popen(command, env=environment, **pipes)
        deadline = time.monotonic() + 240
        # Not before this start's own trials are under way, then at a moment nobody chose.
        while {r.get("pid") for r in rows_of(folder)} <= known and process.poll() is None:
            assert time.monotonic() < deadline, rows_of(folder)
            time.sleep(0.1)
        time.sleep(random.uniform(0, 1.5))
        if process.poll() is None:  # else the sweep had ended already
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done = [r for r in rows_of(folder) if r["end"] in ("finished", "pruned")]
        ended.append({r["trial"]: (r, (folder / r["trial"] / "metrics.jsonl").read_bytes()) for r in done})
    last = job("tune", *flags, env={"RAY_ADDRESS": environment["RAY_ADDRESS"]}, timeout=400)
    assert last.returncode == 0, last.stdout
    return folder, log.read_text() + last.stdout, ended


@pytest.mark.versions
def test_kills_of_the_driver_cost_no_ended_trial(swept, storage):
    folder, _, ended = swept
    rows = {r["trial"]: r for r in rows_of(folder)}
    assert list(rows) == [f"trial-{i:03d}" for i in range(1, 7)]
    for before in ended:
        for trial, (row, metrics) in before.items():
            same = {k: v for k, v in row.items() if k not in ("mlflow_run_id", "sent")}
            assert same.items() <= rows[trial].items(), "an ended trial was touched again"
            if trial != read_json(folder / "summary.json")["best_trial"]:  # which is opened once more to be scored
                assert (folder / trial / "metrics.jsonl").read_bytes() == metrics
    for trial in rows:
        epochs = [line["epoch"] for line in metrics_of(folder, trial)]
        assert epochs == list(range(1, len(epochs) + 1)) and len(epochs) == rows[trial]["epochs"]
    client, _, children = children_of(storage, folder)
    assert sorted(c.data.tags["trial"] for c in children) == list(rows)
    for child in children:
        steps = [m.step for m in client.get_metric_history(child.info.run_id, "val/mean_iou")]
        assert steps == list(range(1, rows[child.data.tags["trial"]]["epochs"] + 1))


@pytest.mark.versions
def test_trials_are_ranked_and_the_best_can_be_trained(swept):
    folder, output, _ = swept
    table = list(csv.DictReader((folder / "sweep.csv").open()))
    scores = [float(r["val/best_mean_iou"]) for r in table]
    assert len(table) == 6 and scores == sorted(scores, reverse=True)
    for row in table:  # a row's score is what the trial's own run says
        assert max(line["val/mean_iou"] for line in metrics_of(folder, row["trial"])) == float(row["val/best_mean_iou"])
    assert {r["end"] for r in table} == {"finished", "pruned"}
    assert all(int(r["epochs"]) == EPOCHS for r in table if r["end"] == "finished")
    assert all(int(r["epochs"]) in (1, 3) for r in table if r["end"] == "pruned")
    best = yaml.safe_load((folder / "best_config.yaml").read_text())
    assert best["base_filters"] == int(table[0]["base_filters"]) and best["dropout"] == float(table[0]["dropout"])
    assert best["epochs"] == EPOCHS and "storage_path" not in best
    refused = job("train", f"--config={folder}/best_config.yaml", "--num-workers=99")  # read whole, then refused
    assert refused.returncode == 2 and "--num-workers 99" in refused.stdout
    summary = read_json(folder / "summary.json")
    assert summary["status"] == "finished" and summary["best_trial"] == table[0]["trial"]
    saved = sum(EPOCHS - int(r["epochs"]) for r in table)
    assert summary["trial_epochs_saved"] == saved > 0 and f"{saved} of {6 * EPOCHS} trial-epochs" in output
    assert f"{folder}/best_config.yaml" in output and "Traceback" not in output and "\x1b" not in output
    assert {"scores_over_time.png", "settings.png", "space.yaml"} <= {p.name for p in folder.iterdir()}
    assert not (folder / ".tune").exists()


def test_a_trial_is_the_training_that_its_settings_mean(swept, ray_cluster, storage, packed):
    """Killed and continued, in a warm process, after other trials: bit for bit what `jobs/train.py` does."""
    folder, _, _ = swept
    finished = [r for r in rows_of(folder) if r["end"] == "finished"]
    row = max(finished, key=lambda r: int(r["trial"][-3:]))  # the last to start: its process had others before
    train(storage, packed, run_name="as_in_the_sweep", as_trial=True, num_workers=1, epochs=EPOCHS, **row["settings"])
    last = sorted(p.name for p in (storage / "as_in_the_sweep" / "checkpoints").iterdir())[-1]
    plain, trial = weights_of(storage / "as_in_the_sweep", last), weights_of(folder / row["trial"], last)
    assert plain.keys() == trial.keys() and all(np.array_equal(plain[k], trial[k]) for k in plain)
    scores = [line["val/mean_iou"] for line in metrics_of(folder, row["trial"])]
    assert [line["val/mean_iou"] for line in metrics_of(storage, "as_in_the_sweep")] == scores


@pytest.mark.versions
def test_mlflow_has_a_parent_and_a_child_a_trial(swept, storage):
    folder, _, _ = swept
    client, parent, children = children_of(storage, folder)
    assert parent.info.status == "FINISHED"
    assert "dropout 0.05…0.3" in parent.data.params["searched"] and "dropout" not in parent.data.params
    assert {c.info.status for c in children} == {"FINISHED"}
    assert {c.data.tags["end"] for c in children} == {"finished", "pruned"}
    assert all(
        {"val/mean_iou", "val/iou/pet", "val/best_mean_iou", "val/best_epoch"} <= set(c.data.metrics) for c in children
    )
    assert len({c.data.params["dropout"] for c in children}) == 6
    summary = read_json(folder / "summary.json")
    best = next(c for c in children if c.data.tags["trial"] == summary["best_trial"])
    assert (
        parent.data.tags["best_run_id"] == best.info.run_id
        and summary["model_uri"] == f"runs:/{best.info.run_id}/model"
    )
    assert parent.data.metrics["val/best_mean_iou"] == best.data.metrics["val/best_mean_iou"]
    # Test is scored once, for the chosen trial.
    assert [c for c in children if "test/mean_iou" in c.data.metrics] == [best]
    assert parent.data.metrics["test/mean_iou"] == best.data.metrics["test/mean_iou"] == summary["test"]["mean_iou"]
    assert {a.path for a in client.list_artifacts(best.info.run_id)} >= {"best_checkpoint", "gallery.png"}
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {
        "sweep.csv",
        "best_config.yaml",
        "settings.png",
    }


@pytest.mark.slow
def test_a_finished_sweep_says_so_and_is_extended(swept, ray_cluster, storage):
    """The same flags again answer at once; --extend adds a trial, registers the best, and touches no other."""
    folder, _, _ = swept
    before = rows_of(folder)
    address = {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    again = job("tune", "--resume=swept", f"--storage-path={storage}", env=address)
    assert again.returncode == 0 and "is finished (6 trials" in again.stdout and "--extend" in again.stdout
    refused = job("tune", "--resume=swept", f"--storage-path={storage}", "--epochs=3", env=address)
    assert refused.returncode == 2 and f"--epochs (was {EPOCHS}, is 3)" in refused.stdout
    flags = ["--resume=swept", f"--storage-path={storage}", "--extend=1", "--register=pets"]
    more = job("tune", *flags, env=address, timeout=400)
    assert more.returncode == 0, more.stdout
    rows = rows_of(folder)
    assert len(rows) == 7 and [r["settings"] for r in rows[:6]] == [r["settings"] for r in before]
    assert [(r["end"], r["epochs"], r["seconds"]) for r in rows[:6]] == [
        (r["end"], r["epochs"], r["seconds"]) for r in before
    ]
    assert rows[6]["settings"] not in [r["settings"] for r in before]
    loaded = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db").get_model_version("pets", "1")
    best = next(r for r in rows if r["trial"] == read_json(folder / "summary.json")["best_trial"])
    assert loaded.run_id == best["mlflow_run_id"]
    mlflow.set_tracking_uri(f"sqlite:///{storage}/mlflow.db")
    masks = mlflow.pyfunc.load_model("models:/pets/1").predict(np.zeros((1, 40, 48, 3), np.uint8))
    assert masks.shape == (1, 40, 48) and masks.dtype == np.uint8


def sweep(storage, data, **changes) -> dict:
    """Sweep in this process, on the session's cluster; the summary."""
    from unet.config import TuneSettings, unflat
    from unet.terminal import Display
    from unet.tuning.runner import run_sweep
    from unet.tuning.sweep import open_sweep

    values = FLAGS | {"storage_path": str(storage), "data": str(data)} | changes
    return run_sweep(open_sweep(unflat(TuneSettings, values)), Display(quiet=True))


@pytest.mark.slow
def test_a_lost_process_is_replaced_and_a_diverging_trial_does_not_sink_the_sweep(
    ray_cluster, storage, packed, tmp_path
):
    (tmp_path / "grid.yaml").write_text("learning_rate: {choice: [0.005, 1.0e+30]}\ndropout: {choice: [0.1]}\n")
    folder = storage / "hurt"

    def kill_one():
        while not any(r.get("pid") and r["epochs"] >= 2 for r in epochs_now(folder)):
            time.sleep(0.02)
        psutil.Process(epochs_now(folder)[0]["pid"]).kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    summary = sweep(
        storage, packed, run_name="hurt", space=str(tmp_path / "grid.yaml"), search="grid", scheduler="none"
    )
    killer.join(5)
    assert not killer.is_alive()
    good, bad = rows_of(folder)
    assert (bad["end"], bad["val/best_mean_iou"]) == ("failed", None) and "stopped being finite" in bad["reason"]
    assert bad["tries"] == 1, "what diverges would diverge again"
    assert (good["end"], good["epochs"], good["tries"]) == ("finished", EPOCHS, 2)
    assert [line["epoch"] for line in metrics_of(folder, good["trial"])] == list(range(1, EPOCHS + 1))
    assert summary["best_trial"] == good["trial"]
    _, _, children = children_of(storage, folder)
    assert {c.data.tags["trial"]: c.info.status for c in children} == {"trial-001": "FINISHED", "trial-002": "FAILED"}


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_the_time_ends_it(ray_cluster, storage, packed, space_file):
    """Ctrl-C saves the trials under way and marks all runs; continued, they go on until the minutes are over."""
    flags = flags_of(data=packed, storage_path=storage, space=space_file, num_samples=2, scheduler="none")
    flags += flags_of(**FLAGS | {"epochs": 100_000}, run_name="paused")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    folder, command = storage / "paused", [sys.executable, str(ROOT / "jobs" / "tune.py"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    while len([r for r in epochs_now(folder) if r["epochs"] >= 2]) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 130 and "--resume paused" in output and "Traceback" not in output, output
    before = epochs_now(folder)
    assert read_json(folder / "summary.json")["status"] == "stopped"
    assert [(r["end"], r["reason"]) for r in before] == [("stopped", "stopped by the user")] * 2
    _, parent, children = children_of(storage, folder)
    assert [r.info.status for r in (parent, *children)] == ["KILLED"] * 3
    for row in before:  # saved at the step, not at the epoch's end
        last = sorted((folder / row["trial"] / "checkpoints").glob("step_*"))[-1]
        assert read_json(last / "state.json")["step"] >= metrics_of(folder, row["trial"])[-1]["step"]

    done = job("tune", "--resume=paused", f"--storage-path={storage}", "--minutes=0.4", env=environment, timeout=400)
    assert done.returncode == 0, done.stdout
    after = epochs_now(folder)
    assert [r["trial"] for r in after] == [r["trial"] for r in before]
    assert all(a["epochs"] > b["epochs"] and a["end"] == "stopped" for a, b in zip(after, before, strict=True))
    assert {r["reason"] for r in after} == {"the time limit was reached"}
    summary = read_json(folder / "summary.json")
    assert summary["status"] == "finished" and summary["test"]["images"] == 21
    for row in after:  # the chosen one is scored as it is, not trained on
        epochs = [line["epoch"] for line in metrics_of(folder, row["trial"])]
        assert epochs == list(range(1, row["epochs"] + 1))
    _, parent, children = children_of(storage, folder)
    assert len(children) == 2 and parent.info.status == "FINISHED"


def epochs_now(folder) -> list[dict]:
    """The ledger's rows with the epochs that the trials' runs have by now."""
    rows = rows_of(folder)
    for row in rows:
        path = folder / row["trial"] / "metrics.jsonl"
        row["epochs"] = len(path.read_text().splitlines()) if path.exists() else 0
    return rows


@pytest.mark.slow
def test_pbt_moves_weights_and_settings_between_trials(ray_cluster, storage, packed):
    sweep(storage, packed, run_name="pbt", space="pbt", scheduler="pbt", num_samples=3, base_filters=4, grace_epochs=2)
    rows = rows_of(storage / "pbt")
    assert [(r["end"], r["epochs"]) for r in rows] == [("finished", EPOCHS)] * 3
    rates = {
        r["trial"]: [line["train/learning_rate"] for line in metrics_of(storage / "pbt", r["trial"])] for r in rows
    }
    assert any(len(set(values)) > 1 for values in rates.values()), "no learning rate changed in flight"
    for row in rows:
        assert rates[row["trial"]][-1] == pytest.approx(row["settings"]["learning_rate"])
        assert 3e-4 <= row["settings"]["learning_rate"] <= 1e-2 and 0.05 <= row["settings"]["dropout"] <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_trials_begin_with_what_an_earlier_model_knows(trained, storage, packed, tmp_path, workers):
    """At a rate of almost nothing they score what it does."""
    _, before = trained
    (tmp_path / "rates.yaml").write_text("learning_rate: {choice: [1.0e-9, 2.0e-9]}\n")
    changes = {"init_from": "trained", "base_filters": TINY["base_filters"], "dropout": 0.0, "epochs": 1}
    changes |= {"run_name": f"known-{workers}", "num_workers": workers, "space": str(tmp_path / "rates.yaml")}
    sweep(storage, packed, search="grid", scheduler="none", **changes)
    rows = rows_of(storage / f"known-{workers}")
    assert [row["end"] for row in rows] == ["finished"] * 2, rows
    assert [row["val/best_mean_iou"] for row in rows] == pytest.approx([before["val"]["mean_iou"]] * 2, abs=1e-3)


@pytest.mark.slow
def test_trials_of_two_workers_run_through_the_trainer(ray_cluster, storage, packed, space_file):
    flags = flags_of(**FLAGS | {"epochs": 2}, data=packed, storage_path=storage, run_name="groups", space=space_file)
    address = {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    done = job("tune", *flags, "--num-samples=2", "--num-workers=2", env=address, timeout=400)
    assert done.returncode == 0, done.stdout
    rows = rows_of(storage / "groups")
    ends = [(r["end"], r["epochs"]) for r in rows]
    assert len(rows) == 2 and set(ends) <= {("finished", 2), ("pruned", 1)} and ("finished", 2) in ends
    for row in rows:
        scores = [line["val/mean_iou"] for line in metrics_of(storage / "groups", row["trial"])]
        assert row["val/best_mean_iou"] == max(scores[: row["epochs"]])
    _, parent, children = children_of(storage, storage / "groups")
    assert parent.info.status == "FINISHED" and len(children) == 2
    assert {c.data.params["num_workers"] for c in children} == {"2"}


def test_nothing_is_left_behind(swept, storage):
    import ray
    from ray.util.state import list_actors, list_placement_groups

    names = ("Train", "trial", "Trial", "DriverLink")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        actors = list_actors(filters=[("state", "=", "ALIVE")])
        alive = [a for a in actors if any(name in a.class_name for name in names)]
        held = [p for p in list_placement_groups() if p.state != "REMOVED"]
        pids = {r["pid"] for sweep in storage.glob("*/trials.jsonl") for r in rows_of(sweep.parent) if r.get("pid")}
        commands = {p.pid: " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])}
        training = [c for pid, c in commands.items() if str(storage) in c or (pid in pids and "Trial" in c)]
        if not (alive or held or training) and ray.available_resources().get("CPU") == 2:
            break
        time.sleep(0.5)
    assert not alive and not held and not training
    assert ray.available_resources()["CPU"] == 2
