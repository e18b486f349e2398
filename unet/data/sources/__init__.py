"""Where samples come from. A source lists its samples, what their masks mean, and what it could not use."""

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from unet.classes import PETS, Labels
from unet.data.manifest import name_hash

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".tif", ".tiff"),
    *(".webp", ".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
}
"""The suffixes of pictures that can be read."""
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how far it is, out of how much; 0 if that is not known)."""


@dataclass(frozen=True)
class Sample:
    """A sample before it is decoded. `image` and `mask` are paths, empty for a drawn one; `index` is its drawing's."""

    name: str
    split: str
    breed: str = ""
    image: str = ""
    mask: str = ""
    index: int = -1


@dataclass(frozen=True)
class Problem:
    """Something wrong with a sample (`name` empty: with the whole set): a short name and a description."""

    name: str
    problem: str
    detail: str
    split: str = ""


@dataclass
class Source:
    """What a source offers.

    Attributes:
        kind: its name in the manifest.
        samples: in canonical order.
        labels: what the masks mean.
        left_out: what is listed but cannot be a sample.
        warnings: what looks wrong.
        repairs: by name, what the source itself has repaired.
    """

    kind: str
    samples: list[Sample]
    labels: Labels = PETS
    left_out: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    repairs: dict[str, str] = field(default_factory=dict)


def canonical(samples: list[Sample]) -> list[Sample]:
    """By split, then by hash of name: the order in which samples are written."""
    return sorted(samples, key=lambda s: (s.split, name_hash(s.name), s.name))


def split_of(name: str, official: str, val_fraction: float) -> str:
    """train or val out of trainval, by hash of the name; any other split is itself."""
    if official != "trainval":
        return official
    return "val" if hash_fraction(name) < val_fraction else "train"


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that is a property of the name, whatever the seed."""
    return int.from_bytes(name_hash(name)[:8], "big") / 2**64


def is_plain(name: str) -> bool:
    """Whether a listed name stays inside its folder, can be a file's name, and can be shown."""
    parts = name.split("/")
    inside = not name.startswith("/") and not {"", ".", ".."}.intersection(parts)
    return inside and max(len(part.encode("utf8", "replace")) for part in parts) < 250 and printable(name) == name


def printable(name: str) -> str:
    """The name as it may reach a terminal, a file or a page: control characters and undecodable bytes spelled out."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        return name.encode("unicode_escape").decode()
    return name


def files_below(folder: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """The files below a folder that are not hidden, through links too, in the order of their paths.

    `onerror` receives the error of a folder that cannot be read, which is left out.
    """
    seen = set()
    for path, folders, files in os.walk(folder, onerror=onerror, followlinks=True):
        real = os.path.realpath(path)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if real not in seen else []
        if real not in seen:
            yield from (Path(path) / file for file in sorted(files) if not file.startswith("."))
        seen.add(real)


def fingerprint(folder: Path, parts: Iterable[str]) -> str:
    """A cheap answer to "are they still the same files?": of names, sizes and times below `folder`/`parts`."""
    found = hashlib.sha256()
    for part in parts:
        top = folder / part
        for path in files_below(top) if top.is_dir() else [top]:
            if path.exists():
                stat = path.stat()
                line = f"{path.relative_to(folder)}|{stat.st_size}|{stat.st_mtime_ns}\n"
                found.update(line.encode("utf8", "replace"))
    return found.hexdigest()[:16]
