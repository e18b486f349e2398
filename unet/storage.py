"""A folder of results, on a local disk or in an object store, through pyarrow's file systems.

Whatever is written here is whole or absent: local files go to a temporary name, are fsynced and renamed; an
object store publishes an object at its end. A set of files (a checkpoint) carries a marker written last.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from unet.errors import InputError
from unet.secrets import without_secrets

MARKER = "COMMIT"


class Folder:
    """A folder by absolute path or URI (`s3://bucket/prefix?...`). It need not exist yet; writing makes it."""

    def __init__(self, uri: str | Path):
        self.uri = str(uri)
        self.is_local = "://" not in self.uri
        if self.is_local:
            self.fs, self.path = pafs.LocalFileSystem(), os.path.abspath(self.uri)
        else:
            try:
                self.fs, self.path = pafs.FileSystem.from_uri(self.uri)
            except (pa.ArrowInvalid, OSError) as error:
                raise InputError(f"Cannot open the storage {self}: {without_secrets(str(error))}") from error

    def __truediv__(self, name: str) -> "Folder":
        base, _, query = self.uri.partition("?")
        return Folder(f"{base.rstrip('/')}/{name}" + (f"?{query}" if query else ""))

    def __str__(self):
        return without_secrets(self.uri).partition("?")[0]

    def at(self, name: str) -> str:
        """The path of a file below, as `fs` takes it."""
        return f"{self.path}/{name}" if name else self.path

    def exists(self, name: str = "") -> bool:
        return self.fs.get_file_info(self.at(name)).type != pafs.FileType.NotFound

    def names(self) -> list[str]:
        """The names of the files and folders right below, sorted; none if the folder does not exist."""
        found = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def files(self) -> list[str]:
        """The relative names of all files below, without a set's marker, sorted."""
        found = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True, recursive=True))
        names = [info.path.removeprefix(f"{self.path}/") for info in found if info.type == pafs.FileType.File]
        return sorted(name for name in names if name != MARKER)

    def read_bytes(self, name: str) -> bytes:
        with self.fs.open_input_stream(self.at(name)) as stream:
            return stream.read()

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[pa.NativeFile]:
        """A stream to write a file through; on a local disk the file is there once all of it is."""
        if not self.is_local:
            with self.fs.open_output_stream(self.at(name)) as stream:
                yield stream
            return
        target = Path(self.at(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with pa.OSFile(str(temporary), "wb") as stream:
                yield stream
            _sync(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(target.parent)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writing(name) as stream:
            stream.write(data)

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def commit(self, name: str, files: dict[str, bytes]) -> None:
        """Write a sub-folder of files as one: it is seen whole, with its marker, or does not count."""
        if not self.is_local:
            if self.committed(name):
                self.fs.delete_file(self.at(f"{name}/{MARKER}"))
            for file, data in files.items():
                self.write_bytes(f"{name}/{file}", data)
            self.write_bytes(f"{name}/{MARKER}", b"")
            return
        Path(self.path).mkdir(parents=True, exist_ok=True)
        target, temporary = Path(self.at(name)), Path(self.at(f".tmp-{name}-{uuid.uuid4().hex[:8]}"))
        try:
            temporary.mkdir()
            for file, data in (files | {MARKER: b""}).items():
                (temporary / file).parent.mkdir(parents=True, exist_ok=True)
                (temporary / file).write_bytes(data)
                _sync(temporary / file)
            _sync(temporary)
            older = target.with_name(f".tmp-{name}-{uuid.uuid4().hex[:8]}")
            if target.exists():
                os.replace(target, older)
            os.replace(temporary, target)
            shutil.rmtree(older, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(target.parent)

    def rename(self, target: "Folder") -> None:
        """Give a local folder another, new name on the same disk, durably."""
        os.rename(self.path, target.path)
        _sync(Path(target.path).parent)

    def committed(self, name: str) -> bool:
        return self.exists(f"{name}/{MARKER}")

    def delete(self, name: str) -> None:
        """Remove a sub-folder; the marker goes first, so that a torn removal is not taken for a whole set."""
        if self.exists(f"{name}/{MARKER}"):
            self.fs.delete_file(self.at(f"{name}/{MARKER}"))
        self.fs.delete_dir(self.at(name))


def _sync(path: Path) -> None:
    """Have a file or folder on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
