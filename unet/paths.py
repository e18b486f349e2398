"""Paths on this machine: databases as URIs, and what was moved together with a folder."""

import os
from pathlib import Path
from urllib.parse import quote, unquote


def sqlite_uri(path: str | Path) -> str:
    """The URI of an SQLite database, whatever characters its path has.

    If they have to be percent-encoded, the URI names the driver: from a plain `sqlite:///`, MLflow would create a
    folder with the encoded name.
    """
    text = str(path)
    return f"sqlite:///{text}" if quote(text) == text else f"sqlite+pysqlite:///{quote(text)}"


def database_of(uri: str | None) -> Path | None:
    """The file of an SQLite database; None for any other store."""
    kind, _, rest = (uri or "").partition(":///")
    text = unquote(rest.partition("?")[0])
    is_file = kind.partition("+")[0] == "sqlite" and text not in ("", ":memory:") and not text.startswith("file:")
    return Path(text).absolute() if is_file else None


def moved(path: str, before: str, now: str) -> str:
    """Where a path that no longer exists is now, if it moved together with a folder from `before` to `now`.

    If nothing is found there, the path as it was.
    """
    old, new = Path(before), Path(now)
    while old.name and old.name == new.name:
        old, new = old.parent, new.parent
    if os.path.exists(path) or not Path(path).is_relative_to(old):
        return path
    found = new / Path(path).relative_to(old)
    return str(found) if found.exists() else path
