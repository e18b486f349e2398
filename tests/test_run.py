"""A whole run on two workers: its folder, scores, MLflow and packaged model; repeating, stopping, continuing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, TINY, read_json, train, weights_of
from PIL import Image
from test_board import events_of, scalars_of

from unet.data.manifest import Manifest
from unet.errors import InputError, RunFailed
from unet.runs.run import locked
from unet.storage import Folder

CLASSES = ("pet", "background", "outline")
SCORES = {f"{kind}/{name}" for kind in ("iou", "dice") for name in CLASSES} | {
    "loss",
    "accuracy",
    "mean_iou",
    "mean_dice",
}


def test_the_folder_holds_what_the_design_says(trained):
    folder, summary = trained
    assert read_json(folder / "summary.json") == summary
    assert summary["status"] == "finished" and summary["run_name"] == "trained" and summary["restarts"] == 0
    assert summary["seconds_to_first_step"] > 0 and summary["images_per_second"] > 0
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["base_filters"] == 8 and config["run_name"] == "trained" and config["seed"] == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 11))
    steps = -(-read_manifest(summary, folder)["counts"]["train"] // TINY["batch_size"])
    assert [line["step"] for line in lines] == [steps * epoch for epoch in range(1, 11)]
    expected = {f"val/{s}" for s in SCORES} | {"train/loss", "train/learning_rate", "speed/images_per_second"}
    assert expected | {"speed/data_wait_fraction", "val/best_mean_iou", "val/best_epoch", "time"} <= set(lines[-1])
    best = max(lines, key=lambda line: line["val/mean_iou"])
    assert summary["best_epoch"] == best["epoch"] == lines[-1]["val/best_epoch"]
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert f"step_{lines[-1]['step']:08d}" in kept and summary["best_checkpoint"].split("/")[1] in kept
    assert all((folder / "checkpoints" / k / "COMMIT").exists() for k in kept)
    for picture in ("training_curves.png", "confusion_test.png", "gallery.png"):
        Image.open(folder / picture).verify()


def read_manifest(summary, folder):
    (manifest,) = [
        m
        for m in map(read_json, (folder.parent / "data").glob("*/manifest.json"))
        if m["data_digest"] == summary["data_digest"]
    ]
    return manifest


def rows_of(folder, summary, split):
    for manifest in (folder.parent / "data").glob("*/manifest.json"):
        if read_json(manifest)["data_digest"] == summary["data_digest"]:
            rows = [
                r for f in read_json(manifest)["files"][split] for r in pq.read_table(manifest.parent / f).to_pylist()
            ]
    images = np.stack([np.frombuffer(r["image"], np.uint8).reshape(32, 32, 3) for r in rows])
    return images, np.stack([np.frombuffer(r["mask"], np.uint8).reshape(32, 32) for r in rows])


def oracle_network(folder, checkpoint):
    """The network written down again with plain Keras layers, and the checkpoint's weights, read by Keras."""
    layers = keras.layers

    def block(x, filters):
        return layers.Conv2D(filters, 3, padding="same", activation="relu")(
            layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        )

    inputs = layers.Input((32, 32, 3))
    first = block(inputs, 8)
    second = block(layers.MaxPooling2D()(first), 16)
    x = block(layers.MaxPooling2D()(second), 32)
    x = layers.Conv2DTranspose(16, 3, strides=2, padding="same")(x)
    x = block(layers.Concatenate()([x, second]), 16)
    x = layers.Conv2DTranspose(8, 3, strides=2, padding="same")(x)
    x = block(layers.Concatenate()([x, first]), 8)
    model = keras.Model(inputs, layers.Conv2D(3, 1, activation="softmax")(x))
    model.load_weights(folder / "checkpoints" / checkpoint / "model.weights.h5")  # by the names that Keras gives them
    return model


@pytest.mark.versions
@pytest.mark.parametrize("split", ["val", "test"])
def test_scores_are_those_of_an_oracle_over_every_image(trained, split):
    """Another network, another reader, sets of pixels: the confusion matrix agrees integer for integer."""
    folder, summary = trained
    images, masks = rows_of(folder, summary, split)
    model = oracle_network(folder, summary["best_checkpoint"].split("/")[1])
    predicted = model.predict(images / np.float32(255), verbose=0).argmax(-1)
    confusion = [[int(((masks == t) & (predicted == p)).sum()) for p in range(3)] for t in range(3)]
    assert summary[split]["confusion"] == confusion
    assert summary[split]["images"] == len(images) and np.sum(confusion) == masks.size
    union = [sum(confusion[i]) + sum(row[i] for row in confusion) - confusion[i][i] for i in range(3)]
    for i, name in enumerate(CLASSES):
        assert summary[split]["iou"][name] == pytest.approx(confusion[i][i] / union[i], abs=1e-12)


def test_it_learned(trained):
    """Better than any constant answer."""
    folder, summary = trained
    _, masks = rows_of(folder, summary, "test")
    constant = max((masks == i).mean() for i in range(3)) / 3
    assert summary["test"]["mean_iou"] > 1.2 * constant


@pytest.mark.versions
def test_mlflow_holds_the_run(trained, storage):
    import mlflow

    folder, summary = trained
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED" and run.info.run_name == "trained"
    assert run.data.params["base_filters"] == "8" and run.data.params["data_digest"] == summary["data_digest"]
    assert {f"{split}/{s}" for split in ("val", "test") for s in SCORES} <= set(run.data.metrics)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("val/mean_iou", "train/loss", "val/iou/outline", "val/best_epoch"):
        history = client.get_metric_history(summary["mlflow_run_id"], name)
        assert [(m.step, m.value, m.timestamp) for m in history] == [(r["epoch"], r[name], r["time"]) for r in lines]
    system = [json.loads(line) for line in (folder / "system.jsonl").read_text().splitlines()]
    assert system and list(summary["nodes"].values()) == ["node_0"]
    for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"):
        history = client.get_metric_history(summary["mlflow_run_id"], f"system/node_0/{name}")
        expected = [(line["step"], line[f"system/node_0/{name}"], line["time"]) for line in system]
        assert [(m.step, m.value, m.timestamp) for m in history] == expected and expected[0][1] > 0
    assert run.data.tags["best_checkpoint"] == summary["best_checkpoint"]
    assert run.data.tags["mlflow.source.git.commit"]
    artifacts = {a.path for a in client.list_artifacts(summary["mlflow_run_id"])}
    assert {
        "config.yaml",
        "training_curves.png",
        "confusion_test.png",
        "gallery.png",
        "best_checkpoint",
        "images",
    } <= artifacts
    assert str(storage) in client.get_experiment(run.info.experiment_id).artifact_location
    assert {i.tags[0].value: i.dataset.name.rpartition("/")[2] for i in run.inputs.dataset_inputs} == {
        "training": "train",
        "validation": "val",
        "testing": "test",
    }
    assert {i.dataset.digest for i in run.inputs.dataset_inputs} == {summary["data_digest"][:36]}
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("**Finished** after") and f"| outline | {summary['val']['iou']['outline']:.4f} |" in note
    assert f"--resume trained --storage-path {storage}" in note
    ranked = client.search_logged_models(
        [run.info.experiment_id], order_by=[{"field_name": "metrics.val/mean_iou", "ascending": False}]
    )
    assert next(m.name for m in ranked if m.source_run_id == run.info.run_id) == "model"


@pytest.mark.versions
def test_the_packaged_model_gives_the_masks_of_the_training_process(trained, storage):
    import mlflow

    folder, summary = trained
    mlflow.set_tracking_uri(f"sqlite:///{storage}/mlflow.db")
    model = mlflow.pyfunc.load_model(summary["model_uri"])
    shown = np.load(folder / "gallery.npz")
    masks = model.predict(shown["images"])
    assert masks.dtype == np.uint8 and (masks == shown["predicted"]).mean() >= 0.999
    assert len(np.unique(masks)) > 1
    odd = np.random.default_rng(0).integers(0, 256, (2, 45, 70, 3), np.uint8)
    assert model.predict(odd).shape == (2, 45, 70)
    with pytest.raises(mlflow.exceptions.MlflowException):
        model.predict(odd.astype(np.float32))
    requirements = mlflow.pyfunc.get_model_dependencies(summary["model_uri"])
    assert "tensorflow==" in Path(requirements).read_text()


def test_data_with_other_classes_are_refused(trained, storage, tmp_path):
    from unet.config import EvaluateSettings, unflat
    from unet.evaluation.run import evaluate
    from unet.terminal import Display

    folder, summary = trained
    manifest = read_manifest(summary, folder)
    del manifest["manifest_digest"]
    other = Manifest(**manifest | {"classes": ["pet", "background", "border"]})
    (tmp_path / "manifest.json").write_text(other.to_json())
    settings = unflat(EvaluateSettings, {"model": "trained", "data": str(tmp_path), "storage_path": str(storage)})
    with pytest.raises(InputError, match=r"trained for the classes pet, background, outline, .* background, border:"):
        evaluate(settings, Display(quiet=True))


def test_a_run_refuses_data_that_changed(trained, storage, archives, tmp_path):
    """Other samples have another digest; a shard that was changed behind its manifest is noticed when it is read."""
    shutil.copytree(archives, tmp_path / "pets")
    (tmp_path / "pets" / "images" / "beagle_4.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"trained on data with digest \w{12}, .* give the original data"):
        train(storage, tmp_path / "pets", run_name="trained", epochs=11)
    _, summary = trained
    prepared = next(
        p.parent for p in (storage / "data").glob("*/manifest.json") if summary["data_digest"] in p.read_text()
    )
    changed = shutil.copytree(prepared, tmp_path / "changed")
    shard = next(changed.glob("train-*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunFailed, match=r"train-00000.* is damaged .*--verify` shows all"):
        train(storage, changed, run_name="on-damaged", num_workers=1)


def test_a_finished_run_answers_so_and_other_settings_are_refused(trained, storage, packed):
    folder, summary = trained
    stamp = (folder / "summary.json").stat().st_mtime_ns
    assert train(storage, packed, run_name="trained") == summary
    assert (folder / "summary.json").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"--dropout \(was 0.1, is 0.2\)"):
        train(storage, packed, run_name="trained", dropout=0.2)


def start_job(*flags, **env):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "train.py"), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        start_new_session=True,
    )


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.mark.versions
def test_ctrl_c_saves_and_the_run_continues_to_the_same_weights(trained, ray_cluster, storage, packed):
    import mlflow

    folder, summary = trained
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    flags += ["--num-workers=2", "--threads=1", f"--data={packed}", f"--storage-path={storage}", "--run-name=stopped"]
    address = {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    process = start_job(*flags, "--checkpoint-every=5", **address)
    checkpoints = storage / "stopped" / "checkpoints"
    # Epochs that MLflow has already are sent again by the next start, which must not matter.
    lines = storage / "stopped" / "metrics.jsonl"
    wait_for(lambda: lines.exists() and lines.read_text().count("\n") >= 2)
    os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "--resume stopped" in output and "Traceback" not in output and "\x1b" not in output
    stopped = read_json(storage / "stopped" / "summary.json")
    assert stopped["status"] == "stopped"
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    assert client.get_run(stopped["mlflow_run_id"]).info.status == "KILLED"
    steps = [int(p.name.split("_")[1]) for p in checkpoints.glob("step_*")]
    assert max(steps) < read_json(checkpoints / f"step_{max(steps):08d}" / "state.json")["settings"]["epochs"] * 10, (
        "the run was to stop before its end"
    )

    finished = train(storage, packed, run_name="stopped", tensorboard=True)
    assert finished["mlflow_run_id"] == stopped["mlflow_run_id"]
    assert finished["val"] == summary["val"] and finished["test"] == summary["test"]
    last = sorted(p.name for p in (folder / "checkpoints").iterdir())[-1]
    before, after = weights_of(folder, last), weights_of(storage / "stopped", last)
    assert all(np.array_equal(before[k], after[k]) for k in before)
    history = client.get_metric_history(stopped["mlflow_run_id"], "val/mean_iou")
    assert [m.step for m in history] == list(range(1, 11))
    assert client.get_run(stopped["mlflow_run_id"]).info.status == "FINISHED"
    shown = [(tag, step) for tag, step, *_ in scalars_of(storage / "stopped")]
    assert len(set(shown)) == len(shown) and ("test/mean_iou", 10) in shown
    assert [step for tag, step in shown if tag == "val/mean_iou"] == list(range(1, 11))
    values = [(event.summary.value[0], event.step) for event in events_of(storage / "stopped")]
    pictures = [(value.tag, step) for value, step in values if value.HasField("image")]
    assert len(set(pictures)) == len(pictures) and ("gallery", 10) in pictures
    assert {step for tag, step in pictures if tag.startswith("val/")} == {0, 1, 2, 3, 4, 6, 8}


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_batch(ray_cluster, storage, packed):
    with pytest.raises(RunFailed, match=r"stopped being finite at step \d+ .*(Abyssinian|beagle)_\d+") as error:
        train(storage, packed, run_name="burst", learning_rate=1e30)
    assert "--on-nan skip" in str(error.value)
    assert read_json(storage / "burst" / "summary.json")["status"] == "failed"


@pytest.mark.slow
def test_steps_that_are_not_finite_are_passed_over_and_counted(ray_cluster, storage, packed):
    """The first update spoils the weights, so that no later step is finite: the epoch of the first one ends, with the
    others counted, and the next, which has none, does not."""
    with pytest.raises(RunFailed, match=r"of epoch 2 .* start anew"):
        train(storage, packed, run_name="skipping", learning_rate=1e30, on_nan="skip")
    (line,) = [json.loads(line) for line in (storage / "skipping" / "metrics.jsonl").open()]
    summary = read_json(storage / "skipping" / "summary.json")
    assert line["train/skipped_steps"] == line["step"] - 1 and summary["skipped_steps"] >= line["train/skipped_steps"]


def test_a_run_has_one_driver(packed, tmp_path):
    """Another process that has the run is named; a kill of it lets go."""
    hold = (
        "import sys; from unet.runs.run import Folder, locked\n"
        "with locked(Folder(sys.argv[1]), 'x'): print(1, flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "mine")], **pipes) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(InputError, match=rf"^mine is already running \(process {other.pid} on .*\): wait"):
            train(tmp_path, packed, run_name="mine")
        other.kill()
    with locked(Folder(tmp_path / "mine"), "mine"):
        pass
    assert not (tmp_path / "mine").exists()  # nothing had begun there


def submit(ray_cluster, *arguments, verb="submit"):
    """`ray job …` as a user types it, from the checkout; only the address is the test's."""
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    command = [ray, "job", verb, "--address", f"http://{ray_cluster.dashboard_url}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


def test_a_submitted_job_leaves_its_results_and_its_exit_code(ray_cluster, storage, packed):
    """The job runs in a temporary copy of the checkout; what it made outlives the copy."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | {"epochs": 1}).items()]
    train = [
        "--working-dir",
        ".",
        "--",
        sys.executable,
        "jobs/train.py",
        f"--data={packed}",
        f"--storage-path={storage}",
    ]
    done = submit(ray_cluster, *train, *flags, "--run-name=submitted")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_json(storage / "submitted" / "summary.json")
    assert summary["status"] == "finished"
    # The lines of the job's log, tables too, between those of Ray's client.
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.endswith("Run submitted"))
    last = next(number for number, line in enumerate(lines) if number > first and "SUCC" in line)
    assert last - first > 20
    assert all(re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in lines[first:last])
    assert f"Workers: rank 0 on node_0 ({next(iter(summary['nodes']))})." in done.stdout


def test_a_stopped_job_leaves_a_stopped_run(ray_cluster, storage, packed):
    import mlflow

    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | {"epochs": 100_000}).items()]
    flags += [f"--data={packed}", f"--storage-path={storage}", "--run-name=halted"]
    options = ["--no-wait", "--submission-id=halted", "--working-dir=.", "--"]
    started = submit(ray_cluster, *options, sys.executable, "jobs/train.py", *flags)
    assert started.returncode == 0, started.stdout + started.stderr
    wait_for(lambda: list((storage / "halted").glob("checkpoints/step_*/COMMIT")))
    wait_for(lambda: read_json(storage / "halted" / "summary.json").get("mlflow_run_id"))
    assert submit(ray_cluster, "halted", verb="stop").returncode == 0
    summary = read_json(storage / "halted" / "summary.json")
    assert summary["status"] == "stopped"
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    assert client.get_run(summary["mlflow_run_id"]).info.status == "KILLED"
