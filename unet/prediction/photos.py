"""Which photos `--input` means, and where what is predicted for each comes to lie.

A folder means the pictures below it, by their suffixes; a pattern those that fit it; a file itself, whatever its
name. Hidden files are left out, and so is the output where it lies below the input.
"""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.fs as pafs

from unet.data.sources import files_below, is_plain, printable
from unet.data.sources.own import SUFFIXES
from unet.errors import InputError, first_line
from unet.secrets import without_secrets
from unet.storage import Folder

MAGIC = re.compile(r"[*?\[]")
LONGEST_NAME = 230
"""Bytes of a name: temporary files and other suffixes are a little longer, and 255 is the most a disk takes."""
SUFFIXES_WRITTEN = (".png", ".jpg", ".npz")
LIKE_WRITTEN = re.compile(r"(\.png|\.jpg|\.npz)/")
"""The end of a folder's name that a written file may have too."""


@dataclass(frozen=True)
class Photos:
    """What `--input` means.

    Attributes:
        folder: what the names are relative to.
        table: `file` (relative name), `size` in bytes and `mtime_ns`, by name.
        unnamed: names that cannot be written to a disk, a table or a terminal, spelled out.
        others: files that are no pictures by their names, by suffix.
    """

    folder: Folder
    table: pa.Table
    unnamed: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)

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
            fits = _translated(base[len(above) + 1 :]).fullmatch
            place = Folder((above or "/") + mark + query)
        else:
            fits = re.compile(".*", re.DOTALL).fullmatch
        own = output.path.rstrip("/").removeprefix(place.path.rstrip("/") + "/") + "/"
        files = (file for file in _listed(place) if fits(file[0]) and not file[0].startswith(own))
        found = _photos(place, files, SUFFIXES)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else without_secrets(first_line(error))
        where = without_secrets(str(error.filename or base))
        raise InputError(f"Cannot read {where}: {reason}. Put that right, or give another --input.") from error
    if not len(found):
        held = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in found.others.most_common(4))
        raise InputError(
            f"There are no photos at {without_secrets(base)}"
            + (f" (there are files: {held}; one whose name is given is tried)" if held else "")
            + ": give a photo, a folder of photos, a quoted pattern such as 'photos/**/*.jpg', or s3://bucket/prefix."
        )
    return found


def output_names(files: Iterable[str], taken: Mapping[str, str]) -> dict[str, str]:
    """By file: the name, without a suffix, of what is predicted for it; all differ.

    It is the file's own without its suffix, or with it where two would have the same. `taken` gives the names of
    before, which stay, so that photos that are added move nothing.
    """
    files = sorted({*files, *taken})
    stems = Counter(map(_stem, files))
    folders = {folder for file in files for folder in _above(file)}
    names, used = dict(taken), set(taken.values())
    written = {name + suffix for name in used for suffix in SUFFIXES_WRITTEN}

    def free(name: str) -> bool:
        return name not in used and not any(name + suffix in folders for suffix in SUFFIXES_WRITTEN)

    def reachable(name: str) -> str:
        """The name, in folders that are not what was written for a photo of before."""
        return LIKE_WRITTEN.sub(r"\1-2/", name) if written.intersection(_above(name)) else name

    new = [file for file in files if file not in taken]
    # Those that are alone come first, whatever the order: a name that is nobody else's is theirs.
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
    """Of a folder's files, (relative name, size, time of change in ns), those with such a suffix."""
    rows, unnamed, others = [], [], Counter()
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

    A link that leads nowhere is there too, so that whoever reads it says so; what is no file, as a pipe, is not.

    Raises:
        OSError: a folder cannot be read.
    """
    if folder.is_local:
        for path in files_below(folder.path, _raised):
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
    if not isinstance(error, FileNotFoundError):  # where nothing is, there are no photos
        raise error


def _translated(pattern: str) -> re.Pattern:
    """A pattern of the shell: `*` and `?` stay within a folder, `**/` is any folders or none."""
    words = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    found = ""
    for piece in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL):
        if len(piece) > 2 and piece[0] == "[":
            piece = re.sub(r"^\[\^", "[!", piece)
            found += fnmatch.translate(piece)[4:-3]  # without "(?s:" and ")\\Z"; for an empty range what nothing fits
        else:
            found += words.get(piece) or re.escape(piece)
    return re.compile(found, re.DOTALL)
