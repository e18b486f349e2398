"""What runs on each node of a cluster, or on this machine without one: tries what a job would do there.

Its methods answer with a value or raise. Several of them run at a time.
"""

import contextlib
import functools
import hashlib
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from unet import environment
from unet.data.manifest import MANIFEST
from unet.data.sources.find import check_source
from unet.doctor import probe
from unet.doctor.facts import Link, Machine, Trouble
from unet.errors import InputError
from unet.locks import Busy, held
from unet.remote import patience
from unet.storage import Folder
from unet.tracking.database import check_database
from unet.tracking.reach import check_server, default_uri

CONNECT_SECONDS = 3
"""How long another node may take to accept a connection and to say its time."""
AT_ONCE = 32
"""Connections that are tried at a time."""
STAMP_SECONDS = 1
"""How coarse a storage's times may be: an object store's and an NFS server's are whole seconds."""
Given = ParamSpec("Given")
Result = TypeVar("Result")
TIME = struct.Struct("!d")
COUNT_GPUS = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"


STORAGE_SECONDS = 8
"""How long an object store is waited for: less than the node is, so that the reason is known."""


def _briefly(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """The method, which waits for an object store no longer than that."""

    @functools.wraps(method)
    def asked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with patience(STORAGE_SECONDS):
            return method(*args, **kwargs)

    return asked


class Examiner:
    """Tries things on one node.

    Args:
        storage: where runs are kept.
        scratch: name of a folder below it, for this examination only.
        in_cluster: whether a Ray runs here.
    """

    def __init__(self, storage: str, scratch: str, in_cluster: bool):
        environment.pin()
        self._storage, self._scratch, self._in_cluster = storage, scratch, in_cluster
        self._made: list[Path] = []

    def machine(self) -> Machine:
        return probe.examine(Folder(self._storage), self._in_cluster)

    def listen(self, address: str) -> int:
        """The port where this process tells its time from now on: any that is free, as TensorFlow's workers take."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, 0), family=family)
        threading.Thread(target=tell_time, args=(server,), daemon=True).start()
        return server.getsockname()[1]

    def reach(self, peers: Mapping[str, tuple[str, int]]) -> dict[str, Link | Trouble]:
        """A connection to each of these, by name, with address and port."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return dict(zip(peers, threads.map(_connect, peers.values()), strict=True))

    def note(self) -> None:
        """See which folders are not there yet, and are to go again."""
        folder = self._folder()
        place = Path(folder.path)
        self._made = [p for p in (place, *place.parents) if not p.exists()] if folder.is_local else []

    @_briefly
    def write(self, name: str) -> float:
        """Write a file of this name to the storage path; by how many seconds this clock leads the storage's."""
        self.note()
        folder, before = self._folder(), time.time()
        folder.write_text(name, name)
        after = time.time()
        info = folder.fs.get_file_info(folder.at(name))
        stamp = info.mtime_ns / 1e9 if info.mtime_ns else after
        return before - stamp if stamp < before - STAMP_SECONDS else min(0.0, after + STAMP_SECONDS - stamp)

    @_briefly
    def seen(self, own: str, names: list[str]) -> frozenset[str]:
        """Which of these files are there, by a list of the folder; the next after this node's own is read, too."""
        folder = self._folder()
        there, next_one = frozenset(folder.names()) & set(names), names[(names.index(own) + 1) % len(names)]
        if next_one in there and folder.read_text(next_one) != next_one:
            raise OSError(f"{folder}/{next_one} is not what was written")
        return there

    @_briefly
    def remove(self, name: str) -> bool:
        """Remove the file that `write` made, and the folders that were not there before."""
        folder = self._folder()
        folder.fs.delete_file(folder.at(name))
        self._unmake()
        return True

    @_briefly
    def hold(self, entered: Future, over: threading.Event) -> None:
        """Be the process that holds the folder until it is `over`, and then the last one to clear up there."""
        folder = self._folder()
        with held(folder):
            entered.set_result(True)
            over.wait()
        folder.fs.delete_dir(folder.path)
        self._unmake()

    @_briefly
    def kept_out(self) -> bool:
        """Whether the folder, which the driver holds, is refused to this process."""
        try:
            with held(self._folder()):
                return False
        except Busy:
            return True

    def tracking(self, uri: str | None) -> bool:
        """Whether MLflow answers.

        Raises:
            InputError: why not.
        """
        check_database(uri or default_uri(Folder(self._storage)))
        check_server(uri)
        return True

    @_briefly
    def data(self, source: str) -> str:
        """A digest of what a prepared folder's manifest says, or of the names in a folder of pictures.

        Raises:
            InputError: it is nothing to train on.
        """
        check_source(source)
        folder = Folder(source)
        if folder.exists(MANIFEST):
            content = folder.read_bytes(MANIFEST)
        elif names := folder.names():
            content = "\n".join(names).encode()
        else:
            raise InputError(f"There is no data at {folder}")
        return hashlib.sha256(content).hexdigest()

    def visible_gpus(self) -> int:
        """How many GPUs TensorFlow sees here, in a process that ends with the answer."""
        # Empty, it is Ray's doing, which hides GPUs from what it gave none.
        env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES" or v}
        told = subprocess.run([sys.executable, "-c", COUNT_GPUS], capture_output=True, text=True, env=env, check=True)
        return int(told.stdout.split()[-1])

    def _folder(self) -> Folder:
        return Folder(self._storage) / self._scratch

    def _unmake(self) -> None:
        for place in self._made:
            with contextlib.suppress(OSError):  # others have something in it
                os.rmdir(place)


def tell_time(server: socket.socket, clock: Callable[[], float] = time.time) -> None:
    """Answer each connection with the time, for good."""
    while True:
        connection, _ = server.accept()
        with contextlib.suppress(OSError), connection:
            connection.sendall(TIME.pack(clock()))


def _connect(place: tuple[str, int]) -> Link | Trouble:
    before = time.time()
    try:
        with socket.create_connection(place, CONNECT_SECONDS) as connection:
            content = connection.recv(TIME.size, socket.MSG_WAITALL)
    except OSError as error:
        return Trouble(os.strerror(error.errno) if error.errno else "no answer")
    after = time.time()
    if len(content) != TIME.size:
        return Trouble("no answer")
    (told,) = TIME.unpack(content)
    # The other has looked at its clock at some moment in between: what is within that is no difference.
    ahead = told - (before + after) / 2
    return Link(after - before, math.copysign(max(0.0, abs(ahead) - (after - before) / 2), ahead))
