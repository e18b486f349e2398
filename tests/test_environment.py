"""What people's shells and home directories hold changes no numbers, and keeps nobody from working without a word."""

import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, TINY, command, read_json, weights_of

import unet
from unet import environment
from unet.cluster import session
from unet.errors import InputError

JOBS = ("train", "tune", "prepare", "evaluate", "predict", "export")
HOSTILE = {
    "KERAS_BACKEND": "jax",
    "TF_USE_LEGACY_KERAS": "1",
    "TF_XLA_FLAGS": "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "true",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    "MLFLOW_RUN_ID": "0" * 32,
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONWARNINGS": "error",
    "RAY_TRAIN_V2_ENABLED": "0",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "PYTHONIOENCODING": "ascii",
    "LC_ALL": "C",
    "TERM": "dumb",
}


def keras_json(folder: Path, **values) -> Path:
    folder.mkdir()
    (folder / "keras.json").write_text(json.dumps(values))
    return folder


@pytest.mark.slow
def test_a_hostile_shell_trains_the_same_network(trained, storage, packed, tmp_path):
    """With a Ray of its own, two workers, a home that takes nothing, a long TMPDIR, and no stdout."""
    folder, summary = trained
    (tmp_path / "home").write_text("")  # a file: no ~/.ray, ~/.keras, ~/.config can be made
    long = tmp_path / ("long" * 20)
    long.mkdir()
    style = tmp_path / "matplotlibrc"
    style.write_text("text.usetex: True\nfont.size: 99\n")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    flags += ["--num-workers=2", "--threads=1", "--run-name=hostile", f"--data={packed}", f"--storage-path={storage}"]
    home = keras_json(tmp_path / "keras", floatx="float16", epsilon=0.5, image_data_format="channels_first")
    places = {"HOME": tmp_path / "home" / "of", "TMPDIR": long, "KERAS_HOME": home, "MATPLOTLIBRC": style}
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, str(ROOT / "jobs" / "train.py"), *flags],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
        | HOSTILE
        | {name: str(place) for name, place in places.items()},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "note: ignoring KERAS_BACKEND" in done.stderr
    assert "MLFLOW_TRACKING_URI (give --tracking-uri)" in done.stderr
    found = read_json(storage / "hostile" / "summary.json")
    assert (found["val"], found["test"]) == (summary["val"], summary["test"])
    last = sorted(p.name for p in (folder / "checkpoints").iterdir())[-1]
    ours, theirs = weights_of(folder, last), weights_of(storage / "hostile", last)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    assert len(client.get_metric_history(found["mlflow_run_id"], "val/mean_iou")) == TINY["epochs"]


@pytest.mark.parametrize("name", JOBS)
def test_no_home_is_a_sentence_where_it_is_needed(name, monkeypatch, capsys, tmp_path):
    for variable in ("HOME", "UNET_STORAGE_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert command(name) == 2
    assert "--storage-path ~/unet-runs: there is no home directory for ~" in capsys.readouterr().err
    nothing = {"train": ["--data=/no"], "tune": ["--data=/no"], "prepare": ["--source=/no"]}.get(name, [])
    assert command(name, f"--storage-path={tmp_path}", *nothing) == 2
    assert "home" not in capsys.readouterr().err


@pytest.mark.parametrize("name", JOBS)
def test_a_storage_path_that_may_not_be_read_is_refused(name, monkeypatch, capsys, tmp_path):
    def scandir(path, known=os.scandir):
        if str(path) == str(tmp_path / "shut"):
            raise PermissionError(13, "Permission denied", path)
        return known(path)

    monkeypatch.setattr(os, "scandir", scandir)  # who is root may read everything
    assert command(name, "--storage-path", tmp_path / "shut") == 2
    assert f"Cannot read {tmp_path}/shut: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "is an address for Ray clients"),
        ("ray://127.0.0.1:10001", "is an address for Ray clients"),
        ("ray://me:password@127.0.0.1:10001", r"ray://\*\*\*@127"),
        ("auto", "no Ray cluster runs here"),
        ("head", "RAY_ADDRESS=head is not an address: write HOST:PORT"),
        ("127.0.0.1:99999", "does not answer"),
        ("[::1]:1", "does not answer"),
    ],
)
def test_addresses_that_no_job_can_use_are_sentences(address, words, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # no cluster has left word there
    with pytest.raises(InputError, match=words):
        session._address()


def test_the_cluster_that_auto_means_is_the_one_that_was_started(monkeypatch, tmp_path):
    """Not any process of Ray on the machine, as Ray would look for."""
    (tmp_path / "ray").mkdir()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as alive:
        address = f"127.0.0.1:{alive.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert session._address() == address


def test_a_cluster_of_another_user_is_left_alone(monkeypatch, tmp_path):
    """Ray would abort in its folder of events; a cluster that nobody asked for is passed over."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "logs" / "events").mkdir(parents=True)
    (tmp_path / "raylet").symlink_to(sys.executable)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as alive:
        address = f"127.0.0.1:{alive.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        node = ["-c", "input()", f"--gcs-address={address}", f"--session_dir={tmp_path}"]
        raylet = subprocess.Popen([tmp_path / "raylet", *node], stdin=subprocess.PIPE)
        try:
            monkeypatch.delenv("RAY_ADDRESS", raising=False)
            assert session._address() is None
            monkeypatch.setattr(os, "access", lambda *given: False)  # who is root may write everything
            assert session._address() == "local"
            monkeypatch.setenv("RAY_ADDRESS", address)
            with pytest.raises(InputError, match=f"The Ray cluster at {address} is another user's"):
                session._address()
        finally:
            raylet.communicate(b"\n")


@pytest.mark.versions
def test_a_cluster_of_another_version_is_a_sentence(ray_cluster):
    code = (
        "import ray; ray.__version__ = '2.0.0'; from unet.errors import InputError\n"
        "from unet.cluster.session import ray_session\n"
        "try: ray_session().__enter__()\n"
        "except InputError as error: print(error)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
    assert "cannot be used: Version mismatch" in told and "RAY_ADDRESS=local starts one for this job alone." in told


@pytest.fixture
def fresh_temporary(tmp_path, monkeypatch):
    """The folder for temporary files is looked for anew."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("RAY_TMPDIR", "RAY_object_spilling_directory"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_long_temporary_folder_keeps_what_is_spilled_and_not_the_sockets(fresh_temporary, monkeypatch, tmp_path):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    session._settle_temporary_folder()
    assert len(os.environ["TMPDIR"]) <= session.SOCKET_BYTES
    assert os.environ["RAY_object_spilling_directory"] == str(long)  # noqa: SIM112


def test_a_temporary_folder_that_is_not_there_is_not_made(fresh_temporary, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "no"))
    session._settle_temporary_folder()
    assert os.environ["TMPDIR"] in ("/tmp", "/var/tmp", "/usr/tmp") and not (tmp_path / "no").exists()


def test_a_temporary_folder_for_ray_that_cannot_be_is_refused(fresh_temporary, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (str(tmp_path / ("long" * 20)), str(tmp_path / "file" / "x")):
        monkeypatch.setenv("RAY_TMPDIR", folder)
        with pytest.raises(InputError, match=f"RAY_TMPDIR={folder} cannot be written, or its path is longer than"):
            session._settle_temporary_folder()


def test_loopback_is_asked_no_proxy(monkeypatch):
    from requests.utils import get_environ_proxies  # as MLflow asks

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intranet,127.0.0.1")
    assert get_environ_proxies("http://localhost:5000")
    environment.pin()
    assert not any(get_environ_proxies(f"http://{host}:5000") for host in ("localhost", "127.0.0.1", "intranet"))
    assert get_environ_proxies("http://elsewhere:5000")["http"] == "http://proxy:3128"
    monkeypatch.setenv("no_proxy", "*")
    environment.pin()
    assert os.environ["no_proxy"] == "*"


def in_a_program(code: str, tmp_path, **env) -> subprocess.CompletedProcess:
    """Run somebody else's program, which has `model` and `storage` of a run, and `photo`."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if not k.startswith("KERAS")} | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )


LOADED = """
import sys, numpy as np
import keras
import unet
from unet.errors import InputError
keras.config.{set}
try:
    model = unet.load(sys.argv[1] if len(sys.argv) > 1 else "trained", {storage!r})
except InputError as error:
    sys.exit(f"refused: {{error}}")
np.save("found.npy", model.probabilities(np.load("photo.npy")))
print(keras.config.image_data_format(), keras.config.floatx(), keras.config.epsilon(), keras.config.dtype_policy().name)
"""


def test_a_program_with_other_settings_of_keras_gets_the_same_and_keeps_them(trained, storage, tmp_path):
    """Of a keras.json, and set in the program."""
    photo = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    np.save(tmp_path / "photo.npy", photo)
    home = keras_json(tmp_path / "keras", floatx="float16", epsilon=0.5, image_data_format="channels_first")
    code = LOADED.format(set="set_dtype_policy('mixed_float16')", storage=str(storage))
    done = in_a_program(code, tmp_path, KERAS_HOME=str(home), TF_USE_LEGACY_KERAS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["channels_first", "float16", "0.5", "mixed_float16"]
    ours = unet.load("trained", storage).probabilities(photo)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), ours, atol=1e-6)


@pytest.mark.parametrize("values", [{"backend": "jax"}, {"floatx": "float8"}])
def test_a_program_whose_keras_does_not_load_is_told(values, tmp_path):
    home = keras_json(tmp_path / "keras", **values)
    code = LOADED.replace("import keras\n", "", 1).replace("keras.config.{set}\n", "").format(storage=str(tmp_path))
    done = in_a_program(code, tmp_path, KERAS_HOME=str(home))
    assert done.returncode == 1 and "refused: Keras does not load here" in done.stderr, done.stderr


def test_a_program_whose_keras_cannot_run_the_network_is_told(monkeypatch, tmp_path):
    with tf.Graph().as_default(), pytest.raises(InputError, match="eager execution is off"):
        unet.load("trained", tmp_path)
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(InputError, match="Keras computes with torch in this program"):
        unet.load("trained", tmp_path)
