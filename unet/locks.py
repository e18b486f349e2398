"""A folder for one process at a time, on a local disk or in an object store. Who is killed holds nothing for long.

On a disk the system keeps the lock, and a kill lets go of it. An object store has none: there each process that wants
the folder writes an object of its own, looks whether it is the only one, and writes it again every few seconds. One
that has not been written again for a minute counts for nothing. The store's clock decides, no machine's.
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
from unet.storage import Folder, reported

LOCK = ".lock"
BEAT_SECONDS = 10.0
"""How often the holder of a lock in an object store says that it lives."""
LAPSE_SECONDS = 60.0
"""How long after its last word it is taken for dead."""
POLL_SECONDS = 0.5
TRIES, SPREAD_SECONDS = 5, 2.0
"""How often those that come at the same moment try again, each after a pause of its own up to so long."""


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
                f"Another process has taken {what}, since this one could not say for a minute that it lives: wait for "
                "the end of that one"
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
        except FileNotFoundError:  # who had it before has just removed the empty folder
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise Busy(file.read().strip() or "elsewhere") from error
            # Who had it before has removed it; then others may hold a new one already.
            if os.fstat(file.fileno()).st_nlink == 0:
                continue
            with contextlib.suppress(OSError):  # a full disk keeps nobody from the lock
                file.truncate(0)
                file.write(_told(_this_process()))
                file.flush()
            try:
                yield Lock()
            finally:
                with contextlib.suppress(OSError):  # the disk may be away
                    path.unlink()
            return


@contextlib.contextmanager
def _held_in_store(place: Folder) -> Iterator[Lock]:
    own, lock, over = uuid.uuid4().hex, Lock(), threading.Event()
    with reported(place, "use"):
        _enter(place, own)
    beat = threading.Thread(target=_beat, args=(place, own, lock, over), name="lock", daemon=True)
    beat.start()
    try:
        yield lock
    finally:
        over.set()
        beat.join()
        with contextlib.suppress(OSError):
            place.fs.delete_file(place.at(own))


def _enter(place: Folder, own: str) -> None:
    """Be the only one. Of two that see each other neither stays, so that never both do. Raises Busy."""
    for _ in range(TRIES):
        _say_so(place, own)
        others = _entries(place)
        now = others.pop(own, None)
        if not others:
            return
        with contextlib.suppress(OSError):
            place.fs.delete_file(place.at(own))
        _outlast(place, others, now)
        time.sleep(random.uniform(0, SPREAD_SECONDS))
    raise Busy("several at once")


def _outlast(place: Folder, others: dict[str, float], now: float | None) -> None:
    """Wait until these are gone, and remove the dead; `now` is the store's time. Raises Busy where one lives."""
    began = time.monotonic()
    while others:
        there = _entries(place)
        others = {name: said for name, said in others.items() if name in there}
        for name, said in others.items():
            holder, waited = _content(place, name), time.monotonic() - began
            if there[name] != said:
                raise Busy(_told(holder))
            silent = max(waited, 0.0 if now is None else now + waited - said)
            if silent > LAPSE_SECONDS or _has_ended(holder):
                with contextlib.suppress(OSError):
                    place.fs.delete_file(place.at(name))
        time.sleep(POLL_SECONDS if others else 0)


def _beat(place: Folder, own: str, lock: Lock, over: threading.Event) -> None:
    while not over.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError, StorageFailed):  # the next one may come through
            if not place.exists(own):
                lock.lost = True
                return
            began = time.monotonic()
            _say_so(place, own)
            # An object that was on its way for so long may come after another has removed it, and taken the folder.
            if time.monotonic() - began > LAPSE_SECONDS - BEAT_SECONDS and _entries(place).keys() - {own}:
                place.fs.delete_file(place.at(own))
                lock.lost = True
                return


def _say_so(place: Folder, own: str) -> None:
    place.write_text(own, json.dumps(_this_process()))


def _entries(place: Folder) -> dict[str, float]:
    """When each process that wants or has the folder has last said so, in seconds of the store's clock."""
    found = place.fs.get_file_info(pafs.FileSelector(place.path, allow_not_found=True))
    return {info.base_name: info.mtime_ns / 1e9 for info in found if info.type == pafs.FileType.File}


def _content(place: Folder, name: str) -> dict:
    try:
        return dict(json.loads(place.read_text(name)))
    except (OSError, ValueError):  # it has just gone
        return {}


def _this_process() -> dict:
    """What tells whether this process lives, to others of its machine and container."""
    about = {"process": os.getpid(), "host": socket.gethostname()}
    with contextlib.suppress(OSError):
        about["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        about["processes"] = os.readlink("/proc/self/ns/pid")
    return about


def _has_ended(holder: dict) -> bool:
    """Whether a process is known to have ended: only one of this machine and container can be."""
    own = _this_process()
    near = "boot" in own and all(own[key] == holder.get(key) for key in ("boot", "processes"))
    return near and not Path(f"/proc/{holder['process']}").exists()


def _told(holder: dict) -> str:
    return f"process {holder['process']} on {holder['host']}" if "process" in holder else "elsewhere"
