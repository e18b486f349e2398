"""What TensorFlow sees and how it computes in a process: with GPUs that are only played, and on Ray's word for some."""

import contextlib
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import tensorflow as tf
from conftest import RAY, TINY, free_ports, job, read_json

from unet.cluster import devices
from unet.errors import NoGpu

OPEN = {"RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def seen(monkeypatch):
    """Let TensorFlow see so many GPUs; what of them `start_tensorflow` leaves visible."""
    visible, details = {}, {"device_name": "NVIDIA A10G", "compute_capability": (8, 6)}

    def play(count: int) -> dict:
        gpus = [tf.config.PhysicalDevice(f"/physical_device:GPU:{i}", "GPU") for i in range(count)]
        visible["GPU"] = gpus
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
        return visible

    for name in ("set_intra_op_parallelism_threads", "set_inter_op_parallelism_threads"):
        monkeypatch.setattr(tf.config.threading, name, lambda threads: None)  # TensorFlow has begun here
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpus, kind: visible.update({kind: gpus}))
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: visible[kind])
    growing = visible.setdefault("growing", [])
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, on: growing.append(gpu))
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details)
    tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    yield play
    tf.config.experimental.enable_tensor_float_32_execution(tf32)


def test_a_process_that_was_given_no_gpu_sees_none(seen):
    visible = seen(4)
    devices.start_tensorflow(1)
    assert (visible["GPU"], visible["growing"], devices.device_name()) == ([], [], "cpu")


def test_a_process_that_was_given_a_gpu_sees_that_one(seen):
    visible = seen(1)
    (gpu,) = visible["GPU"]
    devices.start_tensorflow(1, use_gpu=True)
    assert (visible["GPU"], visible["growing"]) == ([gpu], [gpu])
    assert devices.device_name() == "NVIDIA A10G 8.6"


@pytest.mark.parametrize("count,words", [(0, r"sees none: install the `gpu` extra"), (4, "sees 4: unset RAY_EXP")])
def test_a_gpu_that_is_not_the_one_that_was_given_is_refused(seen, count, words):
    seen(count)
    with pytest.raises(NoGpu, match=words):
        devices.start_tensorflow(1, use_gpu=True)


@pytest.mark.parametrize("use_gpu", [False, True])
def test_float32_is_not_tf32(seen, use_gpu):
    seen(1)
    tf.config.experimental.enable_tensor_float_32_execution(True)
    devices.start_tensorflow(1, use_gpu)
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_determinism_is_asked_for(seen, monkeypatch):
    asked = []
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: asked.append(True))
    seen(0)
    devices.start_tensorflow(1)
    assert not asked
    devices.start_tensorflow(1, deterministic=True)
    assert asked


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """The address of a Ray with two GPUs that nobody has: its processes are given one and see none."""
    log, folder = tmp_path_factory.mktemp("head") / "log", tempfile.mkdtemp(prefix="r")  # short: sockets
    port, client, agent = free_ports(3)
    command = [
        *(*RAY, "start", "--head", "--block", "--num-cpus=2", "--num-gpus=2"),
        *(f"--port={port}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        *("--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--include-dashboard=false", "--disable-usage-stats"),
    ]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "CUDA_VISIBLE_DEVICES"} | OPEN
    with log.open("w") as stream:
        head = subprocess.Popen(command, env=kept, stdout=stream, stderr=stream, start_new_session=True)
    own = psutil.Process(head.pid)
    try:
        deadline = time.monotonic() + 180
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        processes = [*own.children(recursive=True), own]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended with one before it
                process.kill()
        psutil.wait_procs(processes, 30)


def on(address: str, name: str, *flags):
    return job(name, *flags, env={"RAY_ADDRESS": address} | OPEN)


def flags_of(storage: Path, data: Path) -> list[str]:
    flags = TINY | {"base_filters": 4, "epochs": 1, "data": data, "storage_path": storage}
    return [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]


@pytest.mark.slow
def test_a_worker_that_was_given_a_gpu_and_sees_none_fails_at_once(pretended, packed, tmp_path):
    """In one sentence, whichever of two workers says it; nobody is started again."""
    failed = on(pretended, "train", *flags_of(tmp_path, packed), "--num-workers=2", "--run-name=r")
    assert failed.returncode == 1 and re.search("device +a GPU for each worker", failed.stdout), failed.stdout
    (error,) = [line for line in failed.stdout.splitlines() if line.startswith("error: ")]
    assert "TensorFlow sees none: install the `gpu` extra" in error and error.endswith("--device cpu.")
    summary = read_json(tmp_path / "r" / "summary.json")
    assert (summary["status"], summary["restarts"]) == ("failed", 0)
    refused = on(pretended, "train", *flags_of(tmp_path, packed), "--num-workers=3", "--device=gpu")
    assert refused.returncode == 2 and "the cluster has 2: give --num-workers 2" in refused.stdout


@pytest.mark.slow
def test_every_job_that_was_given_a_gpu_and_sees_none_says_so(pretended, packed, trained, tmp_path):
    model, photos = ["--model=trained", f"--storage-path={trained[0].parent}"], tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"not a picture")
    for name, *flags in (
        ("evaluate", *model, f"--data={packed}", f"--output={tmp_path / 'scores'}", "--no-track"),
        ("predict", *model, f"--input={photos}", f"--output={tmp_path / 'masks'}"),
        ("tune", *flags_of(tmp_path, packed), "--space=quick", "--num-samples=4", "--search=random"),
        ("tune", *flags_of(tmp_path, packed), "--space=quick", "--num-samples=4", "--num-workers=2"),
    ):
        found = on(pretended, name, *flags)
        assert found.returncode == 1 and "error: " in found.stdout, found.stdout
        assert found.stdout.count("TensorFlow sees none: install the `gpu` extra") >= 1, found.stdout
    done = on(pretended, "train", *flags_of(tmp_path, packed), "--device=cpu")
    assert done.returncode == 0 and "device    CPUs\n" in done.stdout, done.stdout
