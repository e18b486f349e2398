"""Which versions are taken, and that no others are."""

import re

import pytest
from conftest import ROOT, command, job
from test_cli import JOBS

from unet import versions

MAKEFILE = (ROOT / "Makefile").read_text()
PINS = dict(re.findall(r"^([\w-]+)==(\d+\.\d+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))


def put(folder, name: str, version: str) -> None:
    """An installed package by what it says of itself, which hides the one that is there."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def listed() -> dict[str, str]:
    return versions.requirements()


def test_what_the_project_takes_is_read_from_its_own_file(listed):
    assert listed["python"].startswith(">=3.11") and set(listed) == {"python", *versions.PACKAGES}
    assert all(listed.values())


def test_every_version_of_ray_that_is_taken_is_tried(listed):
    """The newest by every other test: it is the one of requirements.txt."""
    *older, newest = versions.minor_versions(listed["ray"])
    assert re.search(r"^RAYS +:= (.*)", MAKEFILE, re.MULTILINE)[1].split() == [f"ray-{one}" for one in older]
    assert len(older) == 3 and newest == PINS["ray"]


def test_the_oldest_tensorflow_and_mlflow_that_are_taken_are_tried(listed):
    tried = re.search(r"^OTHERS +:= (.*)", MAKEFILE, re.MULTILINE)[1].split()
    ranges = {name: versions.minor_versions(listed[name]) for name in ("tensorflow", "mlflow")}
    assert tried == [f"{name}-{those[0]}" for name, those in ranges.items()]
    assert all(those[-1] == PINS[name] for name, those in ranges.items())


@pytest.mark.parametrize("name", sorted(set(JOBS) - {"doctor"}))
def test_a_version_that_nobody_tried_is_refused_before_anything_begins(name, monkeypatch, tmp_path, capsys):
    put(tmp_path, "ray", "2.50.1")
    monkeypatch.syspath_prepend(tmp_path)
    needed = {"train": ["--data=/no"], "tune": ["--data=/no"], "prepare": ["--source=/no"]}.get(name, [])
    needed += {"compare": ["a", "b"], "evaluate": ["--model=a"], "export": ["--model=a"]}.get(name, [])
    needed += ["--model=a", "--input=/no"] if name == "predict" else []
    assert command(name, f"--storage-path={tmp_path / 'runs'}", *needed) == 2
    told = capsys.readouterr().err
    assert "Ray 2.50.1 is installed here, and this project runs with Ray 2.57, 2.58, 2.59, 2.60: install one" in told
    assert not (tmp_path / "runs").exists()


def test_the_doctor_tells_of_such_a_version_and_goes_on(tmp_path):
    put(tmp_path, "mlflow", "2.22.5")
    done = job(
        "doctor",
        f"--storage-path={tmp_path / 'runs'}",
        env={"RAY_ADDRESS": "local", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.returncode == 1 and re.search(
        "failure +versions +mlflow 2.22.5 on .*, and the project takes", done.stdout
    )


@pytest.mark.parametrize(
    ("version", "taken"), [("2.57.0", True), ("2.60.7", True), ("2.61.0", False), ("3.0.0.dev0", False)]
)
def test_patches_are_taken_and_newer_minor_versions_are_not(version, taken, monkeypatch, tmp_path):
    put(tmp_path, "ray", version)
    monkeypatch.syspath_prepend(tmp_path)
    if taken:
        versions.check()
    else:
        with pytest.raises(versions.InputError, match=f"Ray {version} is installed here"):
            versions.check()
