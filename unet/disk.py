"""Where something is to be written, before anything starts."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from unet.errors import InputError, StorageFailed
from unet.remote import patience
from unet.storage import Folder

DOOR_SECONDS = 15.0
"""How long an object store is waited for before anything starts."""


@contextlib.contextmanager
def at_the_door() -> Iterator[None]:
    """Before anything starts an object store is waited for seconds only.

    Raises:
        InputError: it cannot be used.
    """
    with patience(DOOR_SECONDS):
        try:
            yield
        except StorageFailed as error:
            raise InputError(f"{error}.") from error


def check_writable(storage: Folder, flag: str = "--storage-path") -> None:
    """Refuse a folder that cannot be written to; `flag` gives another. In a store an object is written and read.

    Raises:
        InputError: with what to do.
    """
    if not storage.is_local:
        _probe(storage, flag)
        return
    folder = _existing(storage)
    if folder and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(f"Cannot write to {storage}: give another {flag}, or change its permissions.")


def _probe(storage: Folder, flag: str) -> None:
    name = f".probe-{uuid.uuid4().hex}"
    try:
        with patience(DOOR_SECONDS):
            storage.write_text(name, name)
            same = storage.read_bytes(name) == name.encode()
            storage.fs.delete_file(storage.at(name))
    except StorageFailed as error:
        raise InputError(f"{error}, or give another {flag}.".replace(f"/{name}", "")) from error
    except FileNotFoundError as error:
        raise InputError(f"{storage} does not hold what was just written to it: give another {flag}.") from error
    if not same:
        raise InputError(f"{storage} gives back something else than was written to it: give another {flag}.")


def _existing(storage: Folder) -> Path | None:
    """The nearest folder above a local storage path that exists already."""
    if not storage.is_local:
        return None
    # Not by `Path.exists`, which raises without permission to read.
    return next(p for p in [Path(storage.path), *Path(storage.path).parents] if os.path.exists(p))
