"""The packaged model where this project is not: an environment of its own, and behind MLflow's server."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from unet.data.synthetic import draw_pet

OUTSIDE = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
PREDICT = """
import importlib.util, sys
import mlflow, numpy as np
assert importlib.util.find_spec("unet") is None, "this project is not to be here"
np.save("masks.npy", mlflow.pyfunc.load_model("model").predict(np.load("photos.npy")))
"""


@pytest.fixture
def alone(trained, tmp_path):
    """A folder with a copy of the packaged model and photos of an odd size, and the masks that it gives here."""
    shutil.copytree(trained[0] / "model", tmp_path / "model")
    photos = np.stack([draw_pet(i, 60)[0][:, :47] for i in range(3)])
    np.save(tmp_path / "photos.npy", photos)
    return tmp_path, photos, mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(photos)


@pytest.mark.slow
def test_it_predicts_where_only_its_requirements_are(alone):
    """Installed from PyPI, about 3 GB."""
    folder, _, expected = alone
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [folder / "venv" / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "-r", "model/requirements.txt"], cwd=folder, env=OUTSIDE, capture_output=True, text=True
    )
    if re.search("NewConnectionError|ConnectTimeout|name resolution", done.stderr):
        pytest.skip("PyPI cannot be reached")
    assert done.returncode == 0, done.stderr
    python = [folder / "venv" / "bin" / "python", "-c", PREDICT]
    done = subprocess.run(python, cwd=folder, env=OUTSIDE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(folder / "masks.npy"), expected)


@pytest.mark.slow
def test_mlflow_serves_it_as_the_docs_say(alone):
    folder, photos, expected = alone
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve, curl = commands()
    env = OUTSIDE | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = serve.replace("STORAGE_PATH/RUN_NAME/model", "model").replace("5001", str(port)).split()
    server = subprocess.Popen(words, cwd=folder, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not answers(port):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        Image.fromarray(photos[0]).save(folder / "photo.jpg", format="PNG")
        done = subprocess.run(["sh", "-c", curl.replace("5001", str(port))], cwd=folder, env=env, capture_output=True)
        assert np.array_equal(json.loads(done.stdout)["predictions"], expected[:1]), done.stderr
        for key in ("inputs", "instances"):
            assert np.array_equal(ask(port, {key: photos.tolist()}), expected)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def commands() -> tuple[str, str]:
    """The command that serves and the one that asks, as docs/use.md has them."""
    section = (ROOT / "docs" / "use.md").read_text().partition("### Over HTTP")[2]
    return tuple(re.findall(r"```(?:sh)?\n(.+?)\n```", section, re.DOTALL)[:2])


def answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
        return True
    except OSError:
        return False


def ask(port: int, content: dict) -> list:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["predictions"]
