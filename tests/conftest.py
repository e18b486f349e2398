"""What the tests share: one Ray cluster, pets in the layout of the official archives, one trained run."""

import gc
import hashlib
import io
import json
import logging
import os
import runpy
import socket
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import hypothesis
import numpy as np
import psutil
import pytest
from PIL import Image

from unet import environment
from unet.commands import cli

environment.pin()
hypothesis.settings.register_profile("unhurried", deadline=None)  # a machine may be slow
hypothesis.settings.load_profile("unhurried")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

ROOT = Path(__file__).resolve().parent.parent
RAY = (sys.executable, "-m", "ray.scripts.scripts")
"""The command of this interpreter's Ray: an environment that lies over another has no `ray` of its own."""
REAL_PETS = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def shell():
    """MLflow leaves the store of an earlier test in the environment, which no shell of a user's would hold."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def real_pets() -> Path:
    """A folder of real pets; it does not exist on users' machines."""
    if not REAL_PETS.is_dir():
        pytest.skip("the real pets are not beside this checkout (../shared/data)")
    return REAL_PETS


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """A local cluster of two CPUs for the whole session; its address is where submitted jobs go."""
    import ray

    from unet.cluster.session import ray_session

    # The environment reaches the workers: the checkout wins over whatever is installed.
    os.environ["PYTHONPATH"] = str(ROOT)
    # Its own cluster, whatever else runs on this machine.
    context = ray.init("local", num_cpus=2, include_dashboard=True, logging_level="ERROR", log_to_driver=False)
    with ray_session():
        yield context
    gc.collect()  # streams that are still open must end before the cluster does
    ray.shutdown()


def write_archives(folder: Path, trainval: int, test: int, size: int = 40) -> Path:
    """Drawn pets in the official layout: photos a little larger than the network, trimaps of 1, 2, 3."""
    from unet.data.synthetic import draw_pet

    (folder / "images").mkdir(parents=True)
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    names = []
    for i in range(trainval + test):
        image, mask = draw_pet(i, size, seed=7)
        names.append(f"{'Abyssinian' if i % 2 else 'beagle'}_{i}")
        wide = size + 8 * (i % 3)  # photos of several shapes
        Image.fromarray(image).resize((wide, size)).save(folder / "images" / f"{names[-1]}.jpg", quality=95)
        trimap = Image.fromarray(mask + 1).resize((wide, size), Image.Resampling.NEAREST)
        trimap.save(folder / "annotations" / "trimaps" / f"{names[-1]}.png")
    lists = {"trainval": names[:trainval], "test": names[trainval:]}
    for split, members in lists.items():
        lines = "".join(f"{name} 1 1 1\n" for name in members)
        (folder / "annotations" / f"{split}.txt").write_text(lines)
    return folder


@pytest.fixture(scope="session")
def archives(tmp_path_factory) -> Path:
    """An extracted archive folder: 90 trainval and 21 test pets."""
    return write_archives(tmp_path_factory.mktemp("archives") / "pets", 90, 21)


@pytest.fixture(scope="session")
def packed(archives, tmp_path_factory) -> Path:
    """The same, packed as the official archives are."""
    folder = tmp_path_factory.mktemp("packed")
    for name in ("images", "annotations"):
        with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as tar:
            tar.add(archives / name, arcname=name)
    return folder


TINY = {"recipe": "reference", "image_size": 32, "base_filters": 8, "depth": 2, "batch_size": 8, "epochs": 10}
TINY |= {"learning_rate": 0.005, "dropout": 0.1, "precision": "float32"}  # the same on every kind of machine


def tiny_settings(storage: Path, data: Path, **changes):
    """Settings of a run that takes seconds."""
    from unet.config import TrainSettings, unflat

    values = TINY | {"storage_path": str(storage), "data": str(data), "num_workers": 2, "threads": 1}
    return unflat(TrainSettings, values | changes)


@pytest.fixture(scope="session")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """An MLflow server that a test may freeze and kill, if it lets it go on and starts it again."""
    from mlflow_server import Server

    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def s3():
    """An object store: moto's S3 server, and from a path in its bucket the URI that holds all it takes to reach it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    place = "{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"http://{place}/pets", method="PUT")).close()
    yield lambda path: f"s3://me:word@pets/{path}?scheme=http&endpoint_override={place}"
    server.stop()


@pytest.fixture(scope="module")
def learners():
    """Learners as a warm process of a sweep keeps them: one that is as good as new, without another trace."""
    from unet.tuning.trial import Learners

    kept = Learners()
    kept.KEPT = 100
    return kept


@pytest.fixture(scope="session")
def trained(ray_cluster, storage, packed):
    """One whole run on two workers: its folder and its summary. 75 or so training samples: the tail is short."""
    return storage / "trained", train(storage, packed, run_name="trained")


def train(storage: Path, data: Path, as_trial: bool = False, **changes) -> dict:
    """Train in this process, on the session's cluster; the summary."""
    from unet.supervise import driver
    from unet.supervise.preflight import open_run

    return driver.train(open_run(tiny_settings(storage, data, **changes)), as_trial=as_trial)


def free_ports(count: int = 1) -> list[int]:
    """Ports of this machine that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def job(name: str, *flags, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    """Run a job as a user does; stdout and stderr together in `stdout`."""
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
        **options,
    )


def ray_processes(kind: str) -> list[psutil.Process]:
    """Processes of the session's Ray by their title, such as RayTrainWorker: others may run on this machine."""
    mine = psutil.Process().children(recursive=True)
    return [p for p in mine if p.is_running() and kind in " ".join(p.cmdline())]


def command(name: str, *flags) -> int:
    """Run a job's command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
    code = end.value.code
    del end
    if code == cli.FAILED:  # the traceback of an error holds what its process would have let go of, such as actors
        gc.collect()
    return code


def listening():
    """A display whose words `words_of` gives."""
    from rich.console import Console

    from unet.terminal import Display

    return Display(Console(file=io.StringIO(), highlight=False, soft_wrap=True))


def words_of(display) -> str:
    return display.console.file.getvalue()


def state_of(settings, **facts):
    """Where a training of pets with these settings stands: at its beginning, but for what is given."""
    from unet.classes import PETS
    from unet.config import flat
    from unet.runs.state import State

    return State(0, "digest", flat(settings), {}, **({"classes": list(PETS.classes), "window": 16} | facts))


def vouch(folder: Path) -> None:
    """Make the marker again, so that it vouches for what is there now."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "COMMIT"}
    marker = {name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in files.items()}
    (folder / "COMMIT").write_text(json.dumps(marker))


def weights_of(run: Path, checkpoint: str) -> dict[str, np.ndarray]:
    """The weights of a checkpoint, read from the file without the project's code."""
    import h5py

    arrays = {}
    with h5py.File(run / "checkpoints" / checkpoint / "model.weights.h5") as file:
        file.visititems(lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return arrays


def read_json(path: Path):
    return json.loads(path.read_text())
