"""Which photos `--input` means, and the names of what is predicted for each.

A folder means the pictures below it, by their suffixes; a pattern the pictures that match it; a file itself, whatever
its name. Hidden files are left out, and so is an output folder below the input.
"""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from unet.data.sources import files_below, is_plain, printable
from unet.data.sources.own import SUFFIXES
from unet.errors import InputError, first_line
from unet.secrets import without_secrets
from unet.storage import Folder

MAGIC = re.compile(r"[*?\[]")
LONGEST_NAME = 230
"""Bytes of a name: temporary files and other suffixes are a little longer, and file systems allow 255."""
SUFFIXES_WRITTEN = (".png", ".jpg", ".npz")
LIKE_WRITTEN = re.compile(r"(\.png|\.jpg|\.npz)/")
"""A folder whose name may end like that of a written file."""


@dataclass(frozen=True)
class Photos:
    """What `--input` means.

    Attributes:
        folder: what the names are relative to.
        table: `file` (relative name), `size` in bytes and `mtime_ns`, by name.
        unnamed: names that cannot be written to a disk, a table or a terminal, escaped.
        others: the number of files that are not pictures by their names, by suffix.
    """

    folder: Folder
    table: pa.Table
    unnamed: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def __len__(self):
        return len(self.table) + len(self.unnamed)


def find_photos(text: str, output: Folder) -> Photos:
    """The photos that `--input` means.

    Raises:
        InputError: there are none.
    """
    if not text:
        raise InputError("Say which photos: --input a photo, a folder, 'photos/**/*.jpg', or s3://bucket/prefix.")
    base, mark, query = text.partition("?") if "://" in text else (text, "", "")
    place = Folder(text)
    try:
        info = place.fs.get_file_info(place.path)
        if info.type == pafs.FileType.File:
            above, _, name = base.rpartition("/")
            return _photos(Folder((above or "/") + mark + query), [(name, info.size, info.mtime_ns or 0)], None)
        if info.type == pafs.FileType.NotFound and (magic := MAGIC.search(base)):
            above = base[: magic.start()].rpartition("/")[0]
            pattern = _translated(base[len(above) + 1 :])
            place = Folder((above or "/") + mark + query)
        else:
            pattern = re.compile(".*", re.DOTALL)
        own = output.path.rstrip("/").removeprefix(place.path.rstrip("/") + "/") + "/"
        files = (file for file in _listed(place) if pattern.fullmatch(file[0]) and not file[0].startswith(own))
        found = _photos(place, files, SUFFIXES)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else without_secrets(first_line(error))
        where = without_secrets(str(error.filename or base))
        raise InputError(f"Cannot read {where}: {reason}. Fix that, or give another --input.") from error
    if not len(found):
        held = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in found.others.most_common(4))
        raise InputError(
            f"There are no photos at {without_secrets(base)}"
            + (f" (only other files: {held}; a file given by its own name is tried)" if held else "")
            + ": give a photo, a folder of photos, a quoted pattern such as 'photos/**/*.jpg', or s3://bucket/prefix."
        )
    return found


def output_names(files: Iterable[str], taken: Mapping[str, str]) -> dict[str, str]:
    """By file: the name, without a suffix, of what is predicted for it; all differ.

    It is the file's own without its suffix, or with it if two would be the same. `taken` gives earlier names, which
    stay, so that photos added later rename nothing.
    """
    files = sorted({*files, *taken})
    stems = Counter(map(_stem, files))
    folders = {folder for file in files for folder in _above(file)}
    names, used = dict(taken), set(taken.values())
    written = {name + suffix for name in used for suffix in SUFFIXES_WRITTEN}

    def free(name: str) -> bool:
        return name not in used and not any(name + suffix in folders for suffix in SUFFIXES_WRITTEN)

    def reachable(name: str) -> str:
        """The name, in folders that are not files written for an earlier photo."""
        return LIKE_WRITTEN.sub(r"\1-2/", name) if written.intersection(_above(name)) else name

    new = [file for file in files if file not in taken]
    # Unique stems come first, whatever the order: a name that no other file could claim is theirs.
    for file in sorted(new, key=lambda file: (stems[_stem(file)] > 1, file)):
        name = reachable(_stem(file) if stems[_stem(file)] == 1 else file)
        number = 1
        while not free(name):
            number += 1
            name = f"{reachable(file)}-{number}"
        names[file] = name
        used.add(name)
    return names


def _stem(file: str) -> str:
    folder, slash, name = file.rpartition("/")
    stem, dot, _ = name.rpartition(".")
    return folder + slash + (stem if dot and stem else name)


def _above(file: str) -> Iterable[str]:
    while "/" in file:
        file = file.rpartition("/")[0]
        yield file


def _photos(folder: Folder, files: Iterable[tuple[str, int, int]], suffixes: Collection[str] | None) -> Photos:
    """A folder's files, given as (relative name, size, time of change in ns), sorted by whether they are photos."""
    rows, unnamed = [], []
    others: Counter[str] = Counter()
    for name, size, mtime in files:
        suffix = os.path.splitext(name)[1].lower()
        if suffixes and suffix not in suffixes:
            others[printable(suffix)] += 1
        elif not is_plain(name) or len(name.rpartition("/")[2].encode()) > LONGEST_NAME:
            unnamed.append(printable(name))
        else:
            rows.append((name, size, mtime))
    columns = zip(*sorted(rows), strict=True) if rows else ((), (), ())
    types = ("file", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64())
    table = pa.table({name: pa.array(column, kind) for (name, kind), column in zip(types, columns, strict=True)})
    return Photos(folder, table, sorted(unnamed), others)


def _listed(folder: Folder) -> Iterable[tuple[str, int, int]]:
    """(relative name, size, time of change in ns) of the files below a folder that are not hidden.

    A broken link is among them, so that reading it reports the problem; other things than files, as a pipe, are not.

    Raises:
        OSError: a folder cannot be read.
    """
    if folder.is_local:
        for path in files_below(Path(folder.path), _raised):
            name = os.path.relpath(path, folder.path)
            if os.path.isfile(path):
                status = path.stat()
                yield name, status.st_size, status.st_mtime_ns
            elif not os.path.exists(path):
                yield name, 0, 0
        return
    for info in folder.fs.get_file_info(pafs.FileSelector(folder.path, allow_not_found=True, recursive=True)):
        name = info.path.removeprefix(folder.path.rstrip("/") + "/")
        if info.type == pafs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield name, info.size, info.mtime_ns or 0


def _raised(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a missing folder has no photos
        raise error


def _translated(pattern: str) -> re.Pattern:
    """A shell pattern as a regular expression: `*` and `?` stay within a folder, `**/` is any folders or none."""
    words = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    found = ""
    for piece in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL):
        if len(piece) > 2 and piece[0] == "[":
            piece = re.sub(r"^\[\^", "[!", piece)
            found += fnmatch.translate(piece)[4:-3]  # without "(?s:" and ")\\Z"; an empty range matches nothing
        else:
            found += words.get(piece) or re.escape(piece)
    return re.compile(found, re.DOTALL)
