"""One process at a time in a folder: runs, sweeps, predictions and preparations, on a disk and in an object store."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from unet import locks
from unet.config import TrainSettings, TuneSettings, unflat
from unet.data.preparing.output import OutputFolder
from unet.errors import InputError, StorageAway, StorageFailed
from unet.locks import Busy, held
from unet.prediction import results
from unet.runs.run import Run, locked
from unet.storage import Folder
from unet.supervise.driver import train
from unet.supervise.preflight import open_run
from unet.terminal import Display
from unet.tuning.runner import run_sweep
from unet.tuning.sweep import open_sweep

BEAT, LAPSE = 0.2, 3.0
HOLD = """
import sys
from unet import locks
from unet.storage import Folder
locks.BEAT_SECONDS, locks.LAPSE_SECONDS = {beat}, {lapse}
with locks.held(Folder(sys.argv[1])):
    print("held", flush=True)
    input()
print("let go", flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds instead of a minute; some, since S3 counts whole seconds and machines are busy."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(locks, "LAPSE_SECONDS", LAPSE)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(locks, "SPREAD_SECONDS", 0.5)


@pytest.fixture(params=["disk", "store"])
def folder(request, s3, tmp_path):
    return Folder(tmp_path / "x" if request.param == "disk" else s3(f"{tmp_path.name}/x"))


def start(folder: Folder) -> subprocess.Popen:
    code = HOLD.format(beat=BEAT, lapse=LAPSE)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    return subprocess.Popen([sys.executable, "-c", code, folder.uri], text=True, **pipes)


@contextlib.contextmanager
def another_holds(folder: Folder):
    process = start(folder)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_that_another_process_has_is_refused_until_it_ends(folder):
    with another_holds(folder) as other:
        with pytest.raises(Busy, match=f"^process {other.pid} on "), held(folder):
            pass
        words = rf"^x is already running \(process {other.pid} on .*\): wait for"
        with pytest.raises(InputError, match=words), locked(folder, "x"):
            pass
        assert other.communicate("\n")[0] == "let go\n"
    with locked(folder, "x") as lock:
        lock.check("x")
    if folder.is_local:
        assert not folder.exists()  # nothing had begun there


def test_a_run_and_a_sweep_have_one_driver(folder, tmp_path):
    """Refused before anything is looked at, so that no Ray is needed."""
    storage = {"storage_path": folder.uri.replace("/x", ""), "run_name": "x", "data": "synthetic:20"}
    storage |= {
        "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
        "optimizer": "adamw",
    }  # the default space decays weights
    run = open_run(unflat(TrainSettings, storage))
    sweep = open_sweep(unflat(TuneSettings, storage))
    with another_holds(folder) as other:
        words = rf"^x is already running \(process {other.pid} on "
        with pytest.raises(InputError, match=words):
            train(run)
        with pytest.raises(InputError, match=words):
            run_sweep(sweep, Display(quiet=True))


def test_a_kill_lets_go_at_once_on_its_machine(folder, monkeypatch):
    monkeypatch.setattr(locks, "LAPSE_SECONDS", float("inf"))
    with another_holds(folder) as other:
        other.kill()
        other.wait()
        with held(folder):
            pass


def test_who_dies_elsewhere_is_taken_for_dead_after_a_while(s3, tmp_path, monkeypatch):
    folder = Folder(s3(f"{tmp_path.name}/x"))
    monkeypatch.setattr(locks, "_has_ended", lambda holder: False)
    with another_holds(folder) as other:
        other.kill()
        with held(folder):
            pass


def test_who_was_frozen_for_too_long_has_lost_the_folder_and_writes_no_more(s3, tmp_path):
    folder = Folder(s3(f"{tmp_path.name}/x"))
    with another_holds(folder) as other:
        other.send_signal(signal.SIGSTOP)
        with held(folder):
            other.send_signal(signal.SIGCONT)
            time.sleep(5 * BEAT)
            with pytest.raises(Busy), held(folder):  # it has not come back, and we are here still
                pass
    run = Run("x", None, folder)
    folder.write_text("config.yaml", "")
    with run.locked():
        place = folder / locks.LOCK
        while not run.lock.lost:
            for name in place.names():  # again and again, since a sign of life may just be under way
                place.fs.delete_file(place.at(name))
            time.sleep(BEAT)
        with pytest.raises(StorageFailed, match=r"^Another process has taken over the run x, "):
            run.write_summary(status="running")


def test_an_object_that_comes_too_late_takes_no_folder(s3, tmp_path, monkeypatch):
    """It was on its way while another process took the holder for dead, and would be there again beside that one's."""
    folder, say, sent, taken = Folder(s3(f"{tmp_path.name}/x")), locks._renew, [], threading.Event()

    def late(place, own):
        sent.append(own)
        if own == sent[0] and sent.count(own) == 2:  # the first holder's first sign of life
            taken.wait(60)
        say(place, own)

    monkeypatch.setattr(locks, "_renew", late)
    monkeypatch.setattr(locks, "_has_ended", lambda holder: False)
    with held(folder) as first, held(folder) as second:
        taken.set()
        until = time.monotonic() + 60
        while not first.lost and time.monotonic() < until:
            time.sleep(BEAT)
        assert first.lost and not second.lost and len((folder / locks.LOCK).names()) == 1


def test_a_quick_object_after_some_that_failed_takes_no_folder_either(s3, tmp_path, monkeypatch):
    """It comes at once, but so long after the last one that another process is just taking the folder."""
    folder, say, sent, taken = Folder(s3(f"{tmp_path.name}/x")), locks._renew, [], threading.Event()

    def failing(place, own):
        sent.append(own)
        if own == sent[0] and len(sent) > 1 and not taken.is_set():
            if time.monotonic() < began + LAPSE - BEAT:
                raise StorageAway("the store is away")
            taken.wait(LAPSE / 2)
        say(place, own)

    monkeypatch.setattr(locks, "_renew", failing)
    monkeypatch.setattr(locks, "_has_ended", lambda holder: False)
    began = time.monotonic()
    with held(folder) as first, held(folder) as second:
        taken.set()
        until = time.monotonic() + 60
        while not first.lost and time.monotonic() < until:
            time.sleep(BEAT)
        assert first.lost and not second.lost and len((folder / locks.LOCK).names()) == 1


def test_a_driver_that_lost_its_run_does_not_take_it_back(tmp_path):
    first, second = (Run("x", None, Folder(tmp_path)) for _ in range(2))
    Folder(tmp_path).write_text("config.yaml", "")
    first.take_over()
    first.take_over()
    second.take_over()
    with pytest.raises(StorageFailed, match=r"^Another process has taken over the run x"):
        first.take_over()
    second.take_over()


def test_of_many_at_once_never_two_have_it(folder):
    inside, most, done, guard = 0, 0, 0, threading.Lock()

    def one():
        nonlocal inside, most, done
        with contextlib.suppress(Busy), held(folder):
            with guard:
                inside, most = inside + 1, max(most, inside + 1)
            time.sleep(0.5)
            with guard:
                inside, done = inside - 1, done + 1

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and done >= 1


@contextlib.contextmanager
def beside(lock, until: threading.Event):
    """A thread that holds a lock until something has happened."""
    there = threading.Event()

    def hold():
        with lock:
            there.set()
            until.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    there.wait()
    try:
        yield
    finally:
        until.set()
        thread.join()


def test_a_lock_that_is_removed_as_it_is_taken_is_none(tmp_path, monkeypatch):
    """The one before ends between opening its file and locking it: others would make another file."""
    flock, ends = fcntl.flock, [lambda: (tmp_path / locks.LOCK).unlink()]

    def taking(*arguments):
        if ends:
            ends.pop()()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", taking)
    with held(Folder(tmp_path)), pytest.raises(Busy), held(Folder(tmp_path)):
        pass


def test_predictions_refuse_and_preparations_wait(folder):
    refused, waited = threading.Event(), threading.Event()
    with beside(results.locked(folder), refused):
        words = r"^Another job is predicting into .* \(process \d+ on "
        with pytest.raises(InputError, match=words), results.locked(folder):
            pass
    place, said = OutputFolder.of(folder), []

    def progress(*words):
        said.append(words)
        waited.set()  # the other one ends

    with beside(place.locked(progress), waited), place.locked(progress):
        assert set(said) == {("waiting for another job that is preparing these data", 0, 0)}
