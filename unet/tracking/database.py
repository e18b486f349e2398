"""MLflow's database in a file: created whole or not at all, refused if unusable, and brought up to date when moved.

MLflow creates a database in place, in some seventy steps: a kill, or another process that does the same, leaves one
that no MLflow can use. So it is created under another name, by one process, and renamed when it is whole.

python -m unet.tracking.database       prints the URI of the default store, ready for use

Why: docs/decisions.md#mlflows-database-is-made-under-another-name
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import sqlite3
import sys
import time
import uuid
from pathlib import Path
from urllib.parse import unquote, urlsplit

from unet.errors import InputError
from unet.locks import waited_for
from unet.paths import database_of, sqlite_uri
from unet.storage import Folder
from unet.tracking.reach import DATABASE

ARTIFACTS = "mlartifacts"
"""The folder of files beside a database."""
CREATION_SECONDS = 5.0
"""How long another process may take to create a database: the MLflow UI creates it in place."""
LOCKED_SECONDS = 20.0
"""How long another process may hold a database that is brought up to date."""
FOR_GOOD = ("SQLITE_NOTADB", "SQLITE_CORRUPT", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")
"""SQLite's errors that do not pass by waiting."""
LOCATIONS = (
    *(("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location")),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)
"""The columns in which MLflow keeps absolute locations of files."""


def check_database(uri: str) -> None:
    """Refuse a database in a file that can never be used as it is, without loading MLflow.

    Raises:
        InputError: with what to do.
    """
    path = database_of(uri)
    if path is None:
        return
    _check_access(path)
    deadline = time.monotonic() + CREATION_SECONDS
    while path.exists() and (wrong := _wrong(path, uri)):
        if time.monotonic() > deadline or "is incomplete" not in wrong:
            raise InputError(wrong)
        time.sleep(0.2)


def _check_access(path: Path) -> None:
    """Refuse a path that this user may not write."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a database: give another --tracking-uri.")
    if not _may_write(path):
        raise InputError(
            f"This user may not write MLflow's database {path}: change its permissions, or give another --tracking-uri."
        )


def _may_write(path: Path) -> bool:
    """Whether this user may write a file or create it; SQLite needs the folder too."""
    above = next(p for p in path.parents if p.exists())
    files = [path] if path.exists() else []
    return above.is_dir() and all(os.access(p, os.R_OK | os.W_OK) for p in (above, *files))


def _wrong(path: Path, uri: str) -> str | None:
    """What is permanently wrong with a database, as a sentence with what to do."""
    other = "give another --tracking-uri"
    try:
        tables, version, in_use = _read(path)
    except sqlite3.Error as error:
        if not error.sqlite_errorname.startswith(FOR_GOOD):
            return None  # it is locked, or its disk is away: both may pass
        return f"MLflow's database {path} cannot be used ({error}): restore a copy of it, or {other}."
    if not tables:
        return None
    if not tables & {"alembic_version", "experiments"}:
        return f"{path} is a database, but not MLflow's: {other}."
    if not in_use:
        return (
            f"MLflow's database {path} is incomplete: its creation was interrupted, and it holds no run. "
            f"Remove it (rm {shlex.quote(str(path))}); the same command creates it again."
        )
    known, latest = _revisions()
    if latest and version != latest:
        mlflow = importlib.metadata.version("mlflow")
        if version not in known:
            return (
                f"MLflow's database {path} was created by a newer MLflow than {mlflow}: use that version, or {other}."
            )
        return (
            f"MLflow's database {path} was created by an older MLflow than {mlflow}: back it up, then upgrade it: "
            f"python -m mlflow db upgrade {shlex.quote(uri)}"
        )
    return None


def _read(path: Path) -> tuple[set[str], str | None, bool]:
    """The names of its tables, its version, and whether MLflow has ever used it: then it has an experiment."""
    # Not read-only: SQLite may have to roll back first what a kill left in its journal.
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=1)) as connection:
        tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
        first = {
            name: connection.execute(f"select * from {name} limit 1").fetchone()
            for name in ("alembic_version", "experiments")
            if name in tables
        }
    version = first.get("alembic_version")
    return tables, version and version[0], first.get("experiments") is not None


def _revisions() -> tuple[set[str], str | None]:
    """The schema versions that the installed MLflow knows, and the latest; read from its migration scripts.

    Alembic would import each, and with them MLflow.
    """
    spec = importlib.util.find_spec("mlflow")
    assert spec and spec.submodule_search_locations  # it is required, and a package
    (package,) = spec.submodule_search_locations
    text = "\n".join(p.read_text() for p in Path(package).glob("store/db_migrations/versions/*.py"))
    known, before = (
        set(re.findall(rf"^{name}\b[^=\n]*= *[\"'](\w+)[\"']", text, re.MULTILINE))
        for name in ("revision", "down_revision")
    )
    last = known - before
    return known, last.pop() if len(last) == 1 else None


def ready(uri: str) -> None:
    """Create the database of a store if there is none, and update one that was moved. MLflow must be loaded.

    One that this user may only read stays as it is.

    Raises:
        InputError: it can never be used as it is.
    """
    path = database_of(uri)
    if path is None or not _may_write(path):
        return
    check_database(uri)
    with waited_for(Folder(path.parent), f".{path.name}.lock"):
        if not path.exists() or not path.stat().st_size:
            _create(path)
        _update_locations(path)


def _create(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for torn in path.parent.glob(f".{path.name}.new-*"):  # left by a kill
        torn.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")
    store = SqlAlchemyStore(sqlite_uri(temporary), (path.parent / ARTIFACTS).as_uri())
    store.engine.dispose()
    os.replace(temporary, path)


def _update_locations(path: Path) -> None:
    """Rewrite where files are, if the storage path was moved or copied: MLflow has no call for that."""
    with contextlib.closing(sqlite3.connect(path, timeout=LOCKED_SECONDS)) as connection, connection:
        before = {root for root in _created_below(connection, path) if _has_moved(root, path)}
        if not before:
            return
        connection.create_function("moved", 1, lambda location: _moved(location, before, path.parent))
        for table, column in LOCATIONS:
            connection.execute(f"update {table} set {column} = moved({column}) where {column} is not null")


def _created_below(connection: sqlite3.Connection, path: Path) -> set[Path]:
    """The storage paths that the database may have been created for: other experiments have their files elsewhere.

    `_create` puts the first experiment's files beside the database. Other databases show it by the files there now.
    """
    found = set()
    for number, location in connection.execute("select experiment_id, artifact_location from experiments"):
        if (root := _root(location)) and (local := _local(location)):
            here = path.parent / Path(local).relative_to(root)
            if number == 0 or (path.name == DATABASE and here.exists()):
                found.add(root)
    return found


def _has_moved(root: Path, path: Path) -> bool:
    """Whether the files that the database looks for below another folder are now beside the database."""
    if not (root / ARTIFACTS).exists():
        return root != path.parent
    return (path.parent / ARTIFACTS).exists() and (root / path.name).exists() and not root.samefile(path.parent)


def _root(location: str | None) -> Path | None:
    """The storage path above a location of files; None where this program did not choose the location."""
    above, mark, _ = (_local(location) or "").rpartition(f"/{ARTIFACTS}/")
    return Path(above) if mark else None


def _local(location: str | None) -> str | None:
    """The path of a location as MLflow reads it; None where it is not on a disk of this machine."""
    if location is None or re.match(r"(?!file:)[a-z][\w+.-]*:", location):
        return None
    return unquote(urlsplit(location).path if location.startswith("file:") else location)


def _moved(location: str, before: set[Path], now: Path) -> str:
    path = Path(_local(location) or "")
    root = next((root for root in before if path.is_relative_to(root / ARTIFACTS)), None)
    return location if root is None else (now / path.relative_to(root)).as_uri()


if __name__ == "__main__":
    from unet.config import StoreSettings
    from unet.tracking.library import load_mlflow
    from unet.tracking.reach import default_uri

    load_mlflow()
    try:
        here = default_uri(Folder(StoreSettings().storage_path))
        ready(here)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(here)
