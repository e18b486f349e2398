"""Local folders, before anything is written to them."""

import os
from pathlib import Path

from unet.errors import InputError
from unet.storage import Folder


def check_writable(storage: Folder, flag: str = "--storage-path") -> None:
    """Refuse a local folder that cannot be written to; `flag` gives another.

    Raises:
        InputError: with what to do.
    """
    folder = _existing(storage)
    if folder and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(f"Cannot write to {storage}: give another {flag}, or change its permissions.")


def _existing(storage: Folder) -> Path | None:
    """The nearest folder above a local storage path that exists already."""
    if not storage.is_local:
        return None
    # Not by `Path.exists`, which raises without permission to read.
    return next(p for p in [Path(storage.path), *Path(storage.path).parents] if os.path.exists(p))
