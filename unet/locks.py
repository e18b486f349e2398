"""A folder for one process at a time, on a local disk or in an object store. A killed process holds nothing for long.

On a disk the system keeps the lock, and releases it when its holder is killed. An object store has no locks: there
each process that wants the folder writes an object of its own, checks that it is the only one, and writes it again
every few seconds. An object that has not been renewed for a minute no longer counts. The clock of the store decides,
not that of a machine.

Why: docs/decisions.md#a-lock-in-an-object-store-is-a-set-of-heartbeats
"""

import contextlib
import fcntl
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.fs as pafs

from unet.errors import StorageFailed
from unet.remote import patience
from unet.storage import Folder, reported

LOCK = ".lock"
BEAT_SECONDS = 10.0
"""How often the holder of a lock in an object store renews it."""
LAPSE_SECONDS = 60.0
"""How long after the last renewal its holder is taken for dead."""
POLL_SECONDS = 0.5
TRIES, SPREAD_SECONDS = 5, 2.0
"""How often processes that come at the same moment try again, each after a random pause of at most this long."""


class Busy(Exception):
    """Another process has the folder; as text: which, as far as it is known."""


class Lock:
    """A lock that is held, or was: `lost` says whether another process has taken it since."""

    lost = False

    def check(self, what: str) -> None:
        """Refuse to write where another process does.

        Raises:
            StorageFailed: the lock of `what` is lost.
        """
        if self.lost:
            raise StorageFailed(
                f"Another process has taken over {what}, because this one could not renew its lock for a minute: wait "
                "until that process has ended"
            )


@contextlib.contextmanager
def held(folder: Folder, name: str = LOCK) -> Iterator[Lock]:
    """A folder for this process alone; `name` of the lock in it.

    Raises:
        Busy: another process has it.
        StorageFailed: the lock cannot be written.
    """
    with _held_on_disk(Path(folder.at(name))) if folder.is_local else _held_in_store(folder / name) as lock:
        yield lock


@contextlib.contextmanager
def waited_for(folder: Folder, name: str, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """The same once the others have ended; `waiting` is called again and again until then."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held(folder, name))
                break
            except Busy:
                waiting()
                time.sleep(POLL_SECONDS)
        yield


@contextlib.contextmanager
def _held_on_disk(path: Path) -> Iterator[Lock]:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115
        except FileNotFoundError:  # its last holder has just removed the empty folder
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise Busy(file.read().strip() or "elsewhere") from error
            # Its last holder has removed it; then another process may hold a new one already.
            if os.fstat(file.fileno()).st_nlink == 0:
                continue
            with contextlib.suppress(OSError):  # a full disk does not prevent the lock
                file.truncate(0)
                file.write(_description(_this_process()))
                file.flush()
            try:
                yield Lock()
            finally:
                with contextlib.suppress(OSError):  # the disk may be gone
                    path.unlink()
            return


@contextlib.contextmanager
def _held_in_store(folder: Folder) -> Iterator[Lock]:
    own, lock, over = uuid.uuid4().hex, Lock(), threading.Event()
    with reported(folder, "use"):
        _enter(folder, own)
    beat = threading.Thread(target=_beat, args=(folder, own, lock, over), name="lock", daemon=True)
    beat.start()
    try:
        yield lock
    finally:
        over.set()
        beat.join()
        with patience(BEAT_SECONDS):
            _withdraw(folder, own)


def _enter(folder: Folder, own: str) -> None:
    """Be the only one. Of two that see each other neither stays, so never do both. Raises Busy."""
    for _ in range(TRIES):
        _renew(folder, own)
        others = _entries(folder)
        now = others.pop(own, None)
        if not others:
            return
        _withdraw(folder, own)
        _outlast(folder, others, now)
        time.sleep(random.uniform(0, SPREAD_SECONDS))
    raise Busy("several at once")


def _outlast(folder: Folder, others: dict[str, float], now: float | None) -> None:
    """Wait until these are gone, and remove the dead; `now` is the store's time. Raises Busy if one is alive."""
    began = time.monotonic()
    while others:
        there = _entries(folder)
        others = {name: said for name, said in others.items() if name in there}
        for name, said in others.items():
            holder, waited = _content(folder, name), time.monotonic() - began
            if there[name] != said:
                raise Busy(_description(holder))
            silent = max(waited, 0.0 if now is None else now + waited - said)
            if silent > LAPSE_SECONDS or _has_ended(holder):
                _withdraw(folder, name)
        time.sleep(POLL_SECONDS if others else 0)


def _beat(folder: Folder, own: str, lock: Lock, over: threading.Event) -> None:
    renewed = time.monotonic()
    while not over.wait(BEAT_SECONDS):
        with contextlib.suppress(FileNotFoundError, StorageFailed), patience(0):  # the next one may come through
            began = time.monotonic()
            if not folder.exists(own):
                lock.lost = True
                return
            _renew(folder, own)
            # An object that comes so long after the last that is known to have come may be there again after another
            # process has removed it and taken the folder.
            if time.monotonic() - renewed > LAPSE_SECONDS - BEAT_SECONDS and _entries(folder).keys() - {own}:
                folder.fs.delete_file(folder.at(own))
                lock.lost = True
                return
            renewed = began


def _withdraw(folder: Folder, own: str) -> None:
    with contextlib.suppress(FileNotFoundError, StorageFailed):  # it lapses
        folder.fs.delete_file(folder.at(own))


def _renew(folder: Folder, own: str) -> None:
    folder.write_text(own, json.dumps(_this_process()))


def _entries(folder: Folder) -> dict[str, float]:
    """When each process that wants or has the folder last renewed its object, in seconds of the store's clock."""
    found = folder.fs.get_file_info(pafs.FileSelector(folder.path, allow_not_found=True))
    return {info.base_name: info.mtime_ns / 1e9 for info in found if info.type == pafs.FileType.File}


def _content(folder: Folder, name: str) -> dict:
    try:
        return dict(json.loads(folder.read_text(name)))
    except (FileNotFoundError, ValueError):  # it has just gone
        return {}


def _this_process() -> dict:
    """By what others on its machine and in its container see whether this process is alive."""
    about = {"process": os.getpid(), "host": socket.gethostname()}
    with contextlib.suppress(OSError):
        about["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        about["processes"] = os.readlink("/proc/self/ns/pid")
    return about


def _has_ended(holder: dict) -> bool:
    """Whether a process is known to have ended, which can be known only on its machine and in its container."""
    own = _this_process()
    near = "boot" in own and all(own[key] == holder.get(key) for key in ("boot", "processes"))
    return near and not Path(f"/proc/{holder['process']}").exists()


def _description(holder: dict) -> str:
    return f"process {holder['process']} on {holder['host']}" if "process" in holder else "elsewhere"
