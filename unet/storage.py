"""A folder of results, on a local disk or in an object store, through pyarrow's file systems.

Whatever is written here is whole or absent: local files go to a temporary name, are fsynced and renamed; an object
is completed here before it is sent. A set of files (a checkpoint) carries a marker written last, with the size and
digest of each, so that it is noticed when they are no longer what was written. An object store is waited for
(`unet.remote`); a local disk is tried three times where a run depends on it.

Why: docs/decisions.md#an-object-is-made-here-then-sent
"""

import contextlib
import copy
import errno
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from unet.errors import Damaged, InputError, StorageFailed, first_line
from unet.remote import Store, connect
from unet.secrets import without_credentials, without_secrets

MARKER = "COMMIT"
PAUSES = (0, 2, 3)
"""Seconds to wait before each attempt to write to a local disk."""
IN_MEMORY = 2**24
"""Bytes; a larger object is completed in a file."""
REMEDIES = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "make it writable again"}


class Folder:
    """A folder by absolute path or URI (`s3://bucket/prefix?...`). It need not exist yet; writing creates it.

    Special characters are percent-encoded in a URI and stand as they are in a path; `file://` becomes a path.

    Raises:
        InputError: there is no such storage.
    """

    def __init__(self, uri: str | Path):
        self.uri = str(uri)
        self.is_local = "://" not in self.uri
        if not self.is_local:
            try:
                fs, self.path = connect(self.uri)
                if "//" in self.path:
                    raise pa.ArrowInvalid("two slashes in a row")
            except (pa.ArrowInvalid, OSError) as error:
                raise InputError(_unusable(self, error)) from error
            self.is_local = isinstance(fs, pafs.LocalFileSystem)
            if self.is_local:
                self.uri = self.path
            else:
                self.fs: Any = Store(self.uri, fs)
        if self.is_local:
            self.fs, self.path = pafs.LocalFileSystem(), os.path.abspath(self.uri)

    def __truediv__(self, name: str) -> "Folder":
        if self.is_local:
            return Folder(f"{self.uri.rstrip('/')}/{name}")
        base, mark, query = self.uri.partition("?")
        below = copy.copy(self)  # with its connections
        below.uri, below.path = f"{base.rstrip('/')}/{quote(name)}{mark}{query}", self.at(name).rstrip("/")
        return below

    def __str__(self):
        return self.uri if self.is_local else without_secrets(self.uri).partition("?")[0]

    def typed(self, name: str = "") -> str:
        """This folder, or something below it, as it is typed on a command line: without credentials."""
        return without_credentials((self / name if name else self).uri)

    def at(self, name: str) -> str:
        """The path of a file below, as `fs` takes it."""
        return f"{self.path}/{name}" if name else self.path

    def exists(self, name: str = "") -> bool:
        return self.fs.get_file_info(self.at(name)).type != pafs.FileType.NotFound

    def size(self, name: str) -> int | None:
        """Of a file in bytes; None if there is none."""
        return self.fs.get_file_info(self.at(name)).size

    def names(self) -> list[str]:
        """The names of the files and folders right below, sorted; none if the folder does not exist."""
        found = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def files(self) -> list[str]:
        """The relative names of all files below, without a set's marker, sorted."""
        return sorted(name for name in self.sizes() if name != MARKER)

    def sizes(self) -> dict[str, int]:
        """The size of each file below, in bytes, by its relative name; of an object store by a single listing."""
        found = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True, recursive=True))
        return {info.path.removeprefix(f"{self.path}/"): info.size for info in found if info.type == pafs.FileType.File}

    def read_bytes(self, name: str) -> bytes:
        with self.fs.open_input_stream(self.at(name)) as stream:
            return stream.read()

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    @contextlib.contextmanager
    def writing(self, name: str, durable: bool = True) -> Iterator[IO[bytes]]:
        """A stream to a file, which appears when all of it is written; after an exception the old one remains.

        Without `durable` it does not wait for the disk: if the power fails, the file may be gone or empty.
        """
        if not self.is_local:
            # Arrow publishes what was written to a stream when it is closed or collected; it cannot be aborted.
            with tempfile.SpooledTemporaryFile(IN_MEMORY) as made:
                yield made
                self._send(name, made)
            return
        target = Path(self.at(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with pa.OSFile(str(temporary), "wb") as stream:
                yield stream
            if durable:
                _sync(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            _sync(target.parent)

    def _send(self, name: str, made: tempfile.SpooledTemporaryFile) -> None:
        """Write an object in a single call, which only an error of its own can interrupt."""
        size = made.seek(0, os.SEEK_END)
        made.seek(0)
        content = mmap.mmap(made.fileno(), size, access=mmap.ACCESS_READ) if size > IN_MEMORY else made.read()
        self.fs.put(self.at(name), content)

    def write_bytes(self, name: str, data: bytes | memoryview, durable: bool = True) -> None:
        """Raises StorageFailed."""
        with reported(f"{self}/{name}"), self.writing(name, durable) as stream:
            stream.write(data)

    def write_text(self, name: str, text: str) -> None:
        """Raises StorageFailed."""
        self.write_bytes(name, text.encode())

    def require(self, name: str) -> None:
        """Refuse to go on writing into a folder that no longer holds a file it held.

        Raises:
            StorageFailed: it was removed, or its disk is gone; writing would create another in its place.
        """
        with reported(str(self)):
            if not self.exists(name):
                raise StorageFailed(f"{self} is gone, or the disk it was on: bring it back")

    def commit(self, name: str, files: Mapping[str, bytes | memoryview]) -> None:
        """Write a set of files as a sub-folder, which counts only when it is whole, with its marker.

        Raises:
            StorageFailed: nothing has changed then.
        """
        with reported(f"{self}/{name}"):
            if self.is_local:
                self._commit_local(name, files)
                return
            self.revoke(name)
            _write_set(files, lambda file, content: self.fs.put(self.at(f"{name}/{file}"), content))

    def _commit_local(self, name: str, files: Mapping[str, bytes | memoryview]) -> None:
        Path(self.path).mkdir(parents=True, exist_ok=True)
        target = Path(self.at(name))
        temporary, older = (target.with_name(f".tmp-{name}-{uuid.uuid4().hex[:8]}") for _ in range(2))

        def synced(file: str, content: bytes | memoryview) -> None:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            with open(temporary / file, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())

        try:
            temporary.mkdir()
            _write_set(files, synced)
            _sync(temporary)
            if target.exists():
                os.replace(target, older)
            os.replace(temporary, target)
            shutil.rmtree(older, ignore_errors=True)
        except BaseException:
            with contextlib.suppress(OSError):
                if older.exists() and not target.exists():
                    os.replace(older, target)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(target.parent)

    def persistently(self, write: Callable[[], None]) -> None:
        """Write below here, and try again if the disk fails for a moment; a store is waited for at each call.

        Raises:
            StorageFailed: every attempt failed.
        """
        *pauses, last = PAUSES if self.is_local else (0,)
        for pause in pauses:
            time.sleep(pause)
            with contextlib.suppress(StorageFailed):
                return write()
        time.sleep(last)
        write()

    def rename(self, target: "Folder") -> None:
        """Give a local folder another, new name on the same disk, durably."""
        os.rename(self.path, target.path)
        _sync(Path(target.path).parent)

    def committed(self, name: str) -> bool:
        return self.exists(f"{name}/{MARKER}")

    def marker(self, name: str) -> dict[str, tuple[int, str]]:
        """Size and sha256 of each file of a committed sub-folder.

        Raises:
            Damaged: there is no marker, or it cannot be read.
        """
        content = self._content(name, MARKER)
        try:
            return {file: (int(size), str(digest)) for file, (size, digest) in json.loads(content).items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"{name} is damaged ({MARKER}: not what was written)") from error

    def read_committed(self, name: str, file: str) -> bytes:
        """A file of a committed sub-folder, compared with its digest.

        Raises:
            Damaged: it is missing, or not what was written.
        """
        known = self.marker(name)
        if file not in known:
            raise Damaged(f"{name} is damaged ({MARKER}: does not know {file})")
        content = self._content(name, file)
        size, digest = known[file]
        if len(content) != size:
            raise Damaged(f"{name} is damaged ({file}: {len(content)} bytes of {size})")
        if hashlib.sha256(content).hexdigest() != digest:
            raise Damaged(f"{name} is damaged ({file}: wrong digest)")
        return content

    def _content(self, name: str, file: str) -> bytes:
        try:
            return self.read_bytes(f"{name}/{file}")
        except FileNotFoundError as error:
            raise Damaged(f"{name} is damaged ({file}: missing)") from error
        except OSError as error:
            # A disk that has lost a block has lost the file; a permission comes back.
            if not isinstance(error, PermissionError):
                raise Damaged(f"{name} is damaged ({file}: {_reason(error)})") from error
            raise StorageFailed(f"Cannot read {self}/{name}/{file}: {_reason(error)}; put that right") from error

    def revoke(self, name: str) -> None:
        """Remove the marker, so that the sub-folder no longer counts. Raises StorageFailed."""
        with reported(f"{self}/{name}"), contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.at(f"{name}/{MARKER}"))

    def delete(self, name: str) -> None:
        """Remove a sub-folder; the marker goes first, so that an interrupted removal does not pass for a whole set.

        Raises:
            StorageFailed: it cannot be removed.
        """
        self.revoke(name)
        with reported(f"{self}/{name}"):
            self.fs.delete_dir(self.at(name))


def _write_set(files: Mapping[str, bytes | memoryview], write: Callable[[str, bytes | memoryview], None]) -> None:
    """Write the files and last their marker."""
    known = {}
    for file, content in files.items():
        write(file, content)
        known[file] = memoryview(content).nbytes, hashlib.sha256(content).hexdigest()
    write(MARKER, json.dumps(known).encode())


@contextlib.contextmanager
def reported(what: object, how: str = "write") -> Iterator[None]:
    """Turn the system's error when something cannot be written (or read) into a sentence that lacks only how to go on.

    Raises:
        StorageFailed: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "put that right")
        raise StorageFailed(f"Cannot {how} {what}: {_reason(error)}; {remedy}") from error


def _unusable(folder: Folder, error: Exception) -> str:
    reason = without_secrets(first_line(error))
    if "Cannot parse URI" in reason:
        return f"{folder} is not a URI: percent-encode what a URI cannot hold, such as a space as %20."
    return f"Cannot open the storage {folder}: {reason.rstrip('.')}. Correct it, or make sure that it can be reached."


def _reason(error: OSError) -> str:
    # Arrow gives the errno, and a text that repeats the path.
    return os.strerror(error.errno) if error.errno else first_line(error)


def _sync(path: Path) -> None:
    """Make sure that a file or folder is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
