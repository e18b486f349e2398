"""Storage that fails under a run: full, read-only, away. The run ends in one sentence, and goes on when it is back."""

import contextlib
import errno
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY, command, job, read_json, state_of, train, weights_of

from unet import storage as storage_module
from unet.config import TrainSettings, unflat
from unet.errors import StorageFailed
from unet.recipe.step import Learner
from unet.runs.checkpoint import Checkpoints
from unet.runs.run import Run
from unet.storage import IN_MEMORY, Folder

PAGE = 4096


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: a tmpfs of 160 MB, which root may mount."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or mount("-t", "tmpfs", "-o", "size=160m", "tmpfs", place):
        pytest.skip("needs the right to mount")
    yield place
    while os.path.ismount(place):
        subprocess.run(["umount", "-l", place], check=True)


def mount(*arguments) -> int:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode


def fill(place: Path, leave: int = 0) -> Path:
    """Fill a disk of the tests up to so many bytes; the file that does it."""
    assert os.path.ismount(place) and shutil.disk_usage(place).total < 2**28
    filler = place / "filler"
    with filler.open("wb") as file:
        while room := shutil.disk_usage(place).free - leave:
            try:
                os.posix_fallocate(file.fileno(), 0, room)
                break
            except OSError as error:  # a checkpoint came between
                assert error.errno == errno.ENOSPC
    return filler


def test_wherever_a_full_disk_ends_a_save_the_one_before_stays(disk):
    """A page more room each time, until a save fits."""
    settings = unflat(
        TrainSettings, {"image_size": 16, "base_filters": 4, "depth": 1, "batch_size": 2, "precision": "float32"}
    )
    learner, checkpoints, failures = Learner(settings.recipe(3)), Checkpoints(Folder(disk / "run")), 0
    Folder(disk / "run").write_text("config.yaml", "")
    checkpoints.save(learner, state_of(settings, step=1))
    while True:
        filler = fill(disk, leave=failures * PAGE)
        try:
            checkpoints.save(learner, state_of(settings, step=2))
            break
        except StorageFailed as error:
            assert str(error).endswith("step_00000002: No space left on device; make room")
            failures += 1
        finally:
            filler.unlink()
        assert checkpoints.resume(settings)[0][0] == "step_00000001"
        assert [p.name for p in (disk / "run" / "checkpoints").iterdir()] == ["step_00000001"]
    assert failures > 5 and checkpoints.resume(settings)[0][0] == "step_00000002"


def test_what_cannot_take_its_place_leaves_what_was_there(tmp_path, monkeypatch):
    """The disk becomes read-only between the two renamings that replace a set of files."""
    folder, replace, failures = Folder(tmp_path), os.replace, [OSError(errno.EROFS, "read-only")]
    folder.commit("one", {"file": b"before"})

    def fails_once(source, target):
        if Path(target).name == "one" and failures:
            raise failures.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(StorageFailed, match="make it writable again"):
        folder.commit("one", {"file": b"after"})
    assert folder.read_committed("one", "file") == b"before" and folder.names() == ["one"]


@pytest.mark.parametrize("hiccups", [0, 2, 3])
def test_hiccups_are_got_over_and_outages_told(hiccups, tmp_path, monkeypatch):
    run = Run("run", None, Folder(tmp_path))
    (tmp_path / "config.yaml").touch()
    left, write_bytes = [StorageFailed(f"failure {i}") for i in range(hiccups)], Folder.write_bytes

    def write(self, *args):
        if left:
            raise left.pop()
        write_bytes(self, *args)

    monkeypatch.setattr(storage_module, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(Folder, "write_bytes", write)
    with pytest.raises(StorageFailed, match="failure 0") if hiccups == 3 else contextlib.nullcontext():
        run.write_summary(status="running")
    assert (tmp_path / "summary.json").exists() == (hiccups < 3)


class Stopped(BaseException):
    """As Ctrl-C, wherever it falls."""


@pytest.mark.parametrize("size", [3, 2 * IN_MEMORY])
def test_an_object_is_there_once_all_of_it_is(s3, tmp_path, size):
    """Arrow would publish what an exception leaves; here that is what was there before, or nothing."""
    folder, before, after = Folder(s3(f"{tmp_path.name}/{size}")), b"{}", bytes(range(256)) * (size // 256) + b"end"
    for name in ("new", "summary.json"):
        if name != "new":
            folder.write_bytes(name, before)
        with pytest.raises(Stopped), folder.writing(name) as stream:
            stream.write(after[: size // 2 + 1])
            raise Stopped
    assert folder.files() == ["summary.json"] and folder.read_bytes("summary.json") == before
    with folder.writing("summary.json") as stream, pq.ParquetWriter(stream, pa.schema([("a", pa.binary())])) as writer:
        writer.write_table(pa.table({"a": [after]}))
    with folder.fs.open_input_file(folder.at("summary.json")) as file:
        assert pq.read_table(file)["a"][0].as_py() == after
    folder.write_bytes("summary.json", after)
    assert folder.read_bytes("summary.json") == after


@pytest.mark.parametrize("name", ["a b", "50%20", "who?", "ü#1", "a+b;c=d&e"])
def test_folders_have_any_name(s3, tmp_path, name):
    for folder in (Folder(tmp_path), Folder(tmp_path.as_uri()), Folder(s3(tmp_path.name))):
        inner = folder / name / "in"
        inner.write_text("file", "text")
        assert inner.commit(name, {"f": b"1"}) is None and Folder(inner.uri).read_committed(name, "f") == b"1"
        assert Folder(inner.uri).read_text("file") == "text" and name in folder.names()
        assert str(inner).endswith(f"/{name if folder.is_local else quote(name)}/in") and "word" not in str(inner)
    assert (tmp_path / name / "in" / "file").read_text() == "text"


NOWHERE = "?scheme=http&endpoint_override=127.0.0.1:9"


@pytest.mark.parametrize("uri", ["s3://b/a b", "foo://x/y", "file://host/x", "s3:///x", f"s3://b//x{NOWHERE}"])
def test_what_is_no_storage_is_one_sentence(uri, capsys, tmp_path):
    for flag in ("--storage-path", "--data"):
        uris = {"--storage-path": str(tmp_path), "--data": "synthetic", flag: uri}
        assert command("train", *map("=".join, uris.items()), "--tracking-uri=http://127.0.0.1:9") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert uri.removesuffix(NOWHERE) in error


def whole(run: Path) -> list[str]:
    return sorted(p.parent.name for p in run.glob("checkpoints/step_*/COMMIT"))


@contextlib.contextmanager
def as_soon_as(condition, act):
    """Do something once a condition holds, beside what stands inside."""
    over = threading.Event()

    def watch():
        while not over.wait(0.02):
            if condition():
                act()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def prepared_of(trained) -> Path:
    folder, summary = trained
    manifests = (folder.parent / "data").glob("*/manifest.json")
    return next(m.parent for m in manifests if read_json(m)["data_digest"] == summary["data_digest"])


def no_workers_are_left() -> bool:
    """Among what this session's Ray runs."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        running = psutil.Process().children(recursive=True)
        if not any("RayTrainWorker" in name_of(process) for process in running):
            return True
        time.sleep(0.2)
    return False


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has just ended


@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_in_a_sentence_and_goes_on_bit_equal(trained, disk):
    data = prepared_of(trained)
    run = disk / "full"
    filled = as_soon_as(lambda: len(whole(run)) >= 2, lambda: fill(disk))
    with pytest.raises(StorageFailed) as error, filled:
        train(disk, data, as_trial=True, run_name="full", checkpoint_every="3")
    last = whole(run)[-1]
    words = f"then: python jobs/train.py --resume full --storage-path {disk} (the last whole checkpoint is {last})."
    assert str(error.value).startswith("Cannot write ") and "No space left on device; make room" in str(error.value)
    assert str(error.value).endswith(words) and no_workers_are_left()
    assert not list(run.rglob(".tmp-*"))
    (disk / "filler").unlink()
    summary = train(disk, data, as_trial=True, run_name="full", checkpoint_every="3")
    assert summary["status"] == "finished" and summary["val"] == trained[1]["val"]
    last = sorted(p.name for p in (trained[0] / "checkpoints").iterdir())[-1]
    before, after = weights_of(trained[0], last), weights_of(run, last)
    assert all(np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["read-only", "away"])
def test_a_job_whose_storage_is_taken_away_ends_in_a_sentence_and_goes_on(trained, ray_cluster, disk, tmp_path, fault):
    place = disk / "bound"
    for folder in (disk / "real", place):
        folder.mkdir()
    assert not mount("--bind", disk / "real", place)
    run, marks = place / "gone", f"sqlite:///{tmp_path}/mlflow.db"

    def fail():
        if fault == "away":
            subprocess.run(["umount", "-l", place], check=True)
        else:  # another mount of it on top: the one below holds the run's lock, which is open for writing
            assert not mount("--bind", disk / "real", place)
            while mount("-o", "remount,bind,ro", place):  # it is busy while a file is written
                time.sleep(0.01)

    flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    flags += ["--num-workers=2", "--threads=1", f"--data={prepared_of(trained)}", f"--storage-path={place}"]
    flags += [f"--tracking-uri={marks}", "--run-name=gone", "--checkpoint-every=3"]
    address = {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    with as_soon_as(lambda: len(whole(run)) >= 2, fail):
        ended = job("train", *flags, env=address)
    said = ended.stdout[ended.stdout.index("error: ") :]
    words = {"read-only": "Read-only file system; make it writable again", "away": "is gone, or the disk it was on"}
    assert ended.returncode == 1 and words[fault] in said and "--resume gone" in said, ended.stdout
    assert "Traceback" not in ended.stdout
    assert no_workers_are_left()
    if fault == "away":
        assert list(place.iterdir()) == []
        assert not mount("--bind", disk / "real", place)
    else:
        assert whole(run)[-1] in said and not mount("-o", "remount,bind,rw", place)
    assert not list(run.rglob(".tmp-*"))
    done = job("train", "--resume=gone", f"--storage-path={place}", f"--tracking-uri={marks}", env=address)
    assert done.returncode == 0, done.stdout
    summary = read_json(run / "summary.json")
    assert summary["val"] == trained[1]["val"] and summary["test"] == trained[1]["test"]
    while os.path.ismount(place):
        subprocess.run(["umount", "-l", place], check=True)
