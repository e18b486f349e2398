"""The output of a preparation: whole or not at all, one at a time; what a killed preparation has done is kept."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unet.data.manifest import MANIFEST
from unet.data.sources import Progress
from unet.errors import InputError
from unet.locks import waited_for
from unet.storage import Folder

RECIPE, WORK = "recipe.json", ".preparing"


@dataclass(frozen=True)
class OutputFolder:
    """The folder for the shards, and the one for unfinished work.

    On a local disk the shards are made beside the target, which then appears by renaming. In an object store, or where
    the target is a mount point, they are made in it, the manifest last.
    """

    target: Folder
    work: Folder
    shards: Folder

    @classmethod
    def of(cls, target: Folder) -> "OutputFolder":
        """The folders for a target, however its path is written.

        Raises:
            InputError: nothing can be written there.
        """
        if not target.is_local:
            return cls(target, target / WORK, target)
        path = Path(os.path.realpath(target.path))
        target = Folder(path)
        above = next(p for p in (path, *path.parents) if p.exists())
        writable = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
        if not (writable or target.exists(MANIFEST)):
            raise InputError(f"Cannot write to {path}: give another --output, or change its permissions.")
        if path.is_mount():
            return cls(target, target / WORK, target)
        work = Folder(path.with_name(f"{WORK}-{path.name}"))
        return cls(target, work, work / "shards")

    @property
    def raw(self) -> Path:
        """A local folder for what is unpacked or downloaded."""
        if self.work.is_local:
            return Path(self.work.path) / "raw"
        key = hashlib.sha256(self.target.uri.encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"unet{WORK}-{key}"

    @contextlib.contextmanager
    def locked(self, progress: Progress) -> Iterator[None]:
        """One preparation of a target at a time."""
        beside = Folder(os.path.dirname(self.work.path)) if self.work.is_local else self.target
        name = f"{os.path.basename(self.work.path)}.lock"
        with waited_for(beside, name, lambda: progress("waiting for another job that is preparing these data", 0, 0)):
            yield

    @contextlib.contextmanager
    def unfinished(self, wanted: dict) -> Iterator[None]:
        """The folder for unfinished work: used again for the same request, emptied for another, removed at the end."""
        text = json.dumps(wanted, indent=2)
        if not (self.work.exists(RECIPE) and self.work.read_text(RECIPE) == text):
            if any(not name.startswith(WORK) for name in self.target.names()):
                raise InputError(f"{self.target} is not empty: give another --output, or remove what is there.")
            self.clear()
            self.work.write_text(RECIPE, text)
        try:
            yield
        except InputError:
            self.clear()  # with another source or other settings everything starts over
            raise
        self.clear()

    def clear(self) -> None:
        """Remove all unfinished work."""
        if self.work.is_local:
            shutil.rmtree(self.work.path, ignore_errors=True)
        elif self.work.exists():
            self.work.fs.delete_dir(self.work.path)
        shutil.rmtree(self.raw, ignore_errors=True)

    def publish(self) -> None:
        """Give the shards the target's name, and remove what a kill left half-written."""
        for name in self.shards.names():
            if name.startswith(".") and not name.startswith(WORK):
                self.shards.fs.delete_file(self.shards.at(name))
        if self.shards is not self.target:
            self.shards.rename(self.target)
