"""The command line: help, precedence, and one sentence with exit code 2 for what cannot work."""

import importlib
import os
import socket
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, command, job

from unet.commands.cli import parse
from unet.config import TrainSettings, flat, parse_bytes, parse_interval, parse_yaml, unflat
from unet.errors import InputError

JOBS = ("train", "tune", "prepare", "evaluate", "compare", "predict", "export", "doctor")
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    sys.exit(end.code or str({"ray", "tensorflow", "mlflow"} & set(sys.modules) or "") or 0)
"""


@pytest.mark.parametrize("name", JOBS)
def test_help_comes_through_any_stream_without_ray_or_tensorflow(name):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "TERM": "dumb"}
    told = [sys.executable, "-c", HELP, ROOT / "jobs" / f"{name}.py"]
    done = subprocess.run(told, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "--debug" in done.stdout and "default" in done.stdout, done.stderr


def test_the_installed_commands_are_the_jobs():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    names = [path.stem for path in (ROOT / "jobs").glob("*.py")]
    assert scripts == {f"unet-{name}": f"unet.commands.{name}:main" for name in names}
    for name in names:
        assert callable(importlib.import_module(f"unet.commands.{name}").main)
        assert f"from unet.commands.{name} import main\n" in (ROOT / "jobs" / f"{name}.py").read_text()


@pytest.mark.parametrize("name", JOBS)
def test_examples_in_the_help_keep_their_lines(name, capsys):
    assert command(name, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    module = importlib.import_module(f"unet.commands.{name}")
    examples = [line for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert len(examples) >= 2 and set(examples) <= set(lines) and max(map(len, examples)) <= 100


def test_a_flag_beats_the_file_and_the_file_the_default(tmp_path):
    (tmp_path / "some.yaml").write_text("dropout: 0.1\nepochs: 7\n")
    settings = parse(TrainSettings, "", ["--config", str(tmp_path / "some.yaml"), "--epochs", "3"])
    best = flat(parse(TrainSettings, "", []))
    assert (settings.model.dropout, settings.training.epochs) == (0.1, 3)
    assert settings.training.batch_size == best["batch_size"]
    assert flat(unflat(TrainSettings, flat(settings))) == flat(settings)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dropout", "1.5"], "--dropout 1.5"),
        (["--image-size", "100"], "the nearest are 96 and 128"),
        (["--num-workers", "9", "--batch-size", "4"], "--num-workers 9 is more than --batch-size 4"),
        (["--grad-shards", "3", "--num-workers", "2"], "--grad-shards 3"),
        (["--memory-budget", "much"], "8GB"),
        (["--checkpoint-every", "3h"], "10m"),
        (["--data", "/nowhere"], "There is no data at /nowhere"),
        (["--data", "EMPTY"], "is not a folder with data"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--resume", "nix", "--storage-path", "EMPTY"], "There is no run nix"),
        (["--run-name", "../up"], "--run-name"),
        (["--run-name", "data"], "needs itself"),
        (["--storage-path", "s3://bucket/x"], "--tracking-uri"),
        (["--tracking-uri", "http://127.0.0.1:9", "--storage-path", "EMPTY"], "does not answer"),
    ],
)
def test_what_cannot_work_is_one_sentence(flags, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    flags = [str(tmp_path / "empty") if f == "EMPTY" else f for f in flags]
    monkeypatch.setenv("UNET_STORAGE_PATH", str(tmp_path / "storage"))
    assert command("train", *flags) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and words in told.err and not told.out
    assert list((tmp_path / "empty").iterdir()) == [] and not (tmp_path / "storage").exists()


def test_a_cluster_that_is_gone_is_not_waited_for(tmp_path, monkeypatch):
    """Neither one that somebody names, which is said, nor one that left word of itself when it was killed."""
    from unet.cluster.session import _address

    with socket.socket() as nobody:  # bound, so that nobody else takes the port, but not listening
        nobody.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(gone)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        assert _address() == "local"
        monkeypatch.setenv("RAY_ADDRESS", gone)
        with pytest.raises(InputError, match=f"Ray cluster at {gone} does not answer: start it"):
            _address()
    with socket.create_server(("127.0.0.1", 0)) as alive:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{alive.getsockname()[1]}")
        assert _address() is None


def test_a_mistyped_flag_or_name_meets_its_nearest(tmp_path):
    done = job("train", "--dropuot", "0.5")
    assert done.returncode == 2 and "--dropout" in done.stdout
    (tmp_path / "some.yaml").write_text("dropuot: 0.1\n")
    with pytest.raises(InputError, match=r"did you mean dropout\?"):
        parse(TrainSettings, "", ["--config", str(tmp_path / "some.yaml")])


@pytest.mark.parametrize("text", ["dropout: 0.1\nepochs: 7\ndropout: 0.2\n", "{dropout: 0.1, dropout: 0.1}"])
def test_a_setting_given_twice_is_refused(tmp_path, text):
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(
        InputError, match=r"--config .*some.yaml is not valid YAML: dropout is given twice, in lines? 1"
    ):
        parse(TrainSettings, "", ["--config", str(tmp_path / "some.yaml")])


def test_keys_may_be_merged_from_an_anchor():
    text = "a: &a {no: 1, on: 2}\nb: {<<: *a, on: 3}"
    assert parse_yaml(text, "it") == {"a": {"no": 1, "on": 2}, "b": {"no": 1, "on": 3}}


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert command("train", "--data=/nowhere", f"--storage-path={tmp_path}", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_sizes_and_intervals():
    assert [parse_bytes(t) for t in ("8GB", "1.5 MiB", "12")] == [8_000_000_000, 1_572_864, 12]
    assert parse_interval("200") == ("steps", 200) and parse_interval("1.5m") == ("seconds", 90)
    for bad in ("0", "0m", "-3", "m"):
        with pytest.raises(ValueError):
            parse_interval(bad)
