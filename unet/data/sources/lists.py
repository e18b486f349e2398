"""Splits as people write them down: lists of photos, or folders called train, val and test."""

import codecs
import re
import unicodedata
from collections.abc import Collection
from pathlib import Path

from unet.data.sources import SUFFIXES, Problem, is_plain, printable, split_of
from unet.errors import InputError

LISTS = ("trainval", "train", "val", "test")
ALLOWED = {
    frozenset(("trainval", "test")): {"trainval": "trainval", "test": "test"},
    frozenset(("train", "test")): {"train": "trainval", "test": "test"},
    frozenset(("train", "val", "test")): {"train": "train", "val": "val", "test": "test"},
    frozenset(LISTS): {"train": "train", "val": "val", "test": "test"},
}
"""By which lists there are: the split that each gives; val comes out of trainval by hash."""
MEANT = {name: name for name in LISTS} | {"valid": "val", "validation": "val", "training": "train", "testing": "test"}
MARKS = {
    **{codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"},
    **{codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"},
}
"""The byte order marks of a text; that of UTF-32 begins with that of UTF-16, so it comes first."""


def listed(listing: Path) -> list[tuple[int, str]]:
    """The lines of a split's list that name a sample, with their numbers.

    Raises:
        InputError: it is not text in a known encoding.
    """
    content = listing.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{listing} is not {encoding} text (line {line}): save it as UTF-8.") from error
    if text.count("\0") * 4 > len(text):
        raise InputError(f"{listing} looks like UTF-16 without a byte order mark: save it as UTF-8.")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    named = ((number, unicodedata.normalize("NFC", line.strip())) for number, line in enumerate(lines, 1))
    return [(number, line) for number, line in named if line and not line.startswith("#")]


def refuse_unmatched(listing: Path, lines: list[tuple[int, str]], names: Collection[str], where: str) -> None:
    """Refuse a list of which no line names a sample; `names` are those that there are, in the folder `where`.

    Raises:
        InputError: with its first line, and what was expected.
    """
    number, line = lines[0]
    expected = f", such as `{min(names)}`" if names else ", which holds none"
    raise InputError(
        f"No line of {listing} names a photo that exists: line {number} is `{printable(line)}`. Write names in "
        f"{where}{expected}."
    )


def splits_by_lists(
    folder: Path, names: Collection[str], folders: tuple[str, ...], val_fraction: float
) -> tuple[dict[str, str], list[Problem]] | None:
    """The split of each listed name, and the lines that name no photo; None if there are no lists.

    Args:
        names: of all photos and masks.
        folders: those that a listed path may begin with, or lead through.

    Raises:
        InputError: the lists do not go together, cannot be read, or match nothing.
    """
    texts = {path.stem: path.name for path in sorted(folder.glob("*.txt"))}
    for stem, file in texts.items():
        if stem not in LISTS and stem.lower() in MEANT:
            raise InputError(f"{folder / file} would not be read: call it {MEANT[stem.lower()]}.txt, or remove it.")
    given = [name for name in LISTS if name in texts]
    if not given:
        return None
    found: dict[str, str] = {}
    problems: list[Problem] = []
    for listing, official in _meaning(given, f"{folder} holds", ".txt").items():
        path = folder / f"{listing}.txt"
        lines = [(number, line, _match(line, names, folders)) for number, line in listed(path)]
        if lines and not any(name for *_, name in lines):
            refuse_unmatched(path, [line[:2] for line in lines], names, f"{folders[0]}/")
        for number, line, matched in lines:
            name, where = matched or line, f"line {number} of {path.name}"
            split = split_of(name, official, val_fraction)
            if matched is None:
                kind = "missing_image" if is_plain(name) else "unsafe_name"
                problems.append(Problem(printable(name), kind, f"{where} names no photo in {folders[0]}/", split))
            elif name in found:
                problems.append(Problem(name, "listed_twice", f"{where}: already listed in {found[name]}", split))
            else:
                found[name] = split
    return found, problems


def splits_by_folders(names: Collection[str], val_fraction: float) -> dict[str, str] | None:
    """The split of each name by its first folder; None if the folders are not named after splits.

    Raises:
        InputError: one of the folders is missing.
    """
    tops = {name.partition("/")[0] for name in names if "/" in name}
    if len(tops) < 2 or not tops <= MEANT.keys() or not all("/" in name for name in names):
        return None
    meaning = _meaning(sorted({MEANT[top] for top in tops}), "the photos are in the folders", "/")
    splits = {top: meaning[MEANT[top]] for top in tops if MEANT[top] in meaning}
    return {n: split_of(n, splits[t], val_fraction) for n in names if (t := n.partition("/")[0]) in splits}


def _meaning(given: list[str], what: str, ending: str) -> dict[str, str]:
    meaning = ALLOWED.get(frozenset(given))
    if meaning is None:
        train, val, test, trainval = (f"{name}{ending}" for name in ("train", "val", "test", "trainval"))
        raise InputError(
            f"{what} {', '.join(f'{name}{ending}' for name in given)}: give {trainval} and {test}, {train} and {test}, "
            f"or {train}, {val} and {test}."
        )
    return meaning


def _match(line: str, names: Collection[str], folders: tuple[str, ...]) -> str | None:
    """The name that a line means: as it stands, as a path, or as the photo of a pair of photo and mask."""
    for spelling in (line, line.strip("\"'"), line.replace("\\", "/")):
        parts = spelling.removeprefix("./").split("/")
        tails = [parts, *(parts[i + 1 :] for i, part in enumerate(parts) if part in folders)]
        for tail in map("/".join, tails):
            if found := next((name for name in (tail, _without_suffix(tail)) if name in names), None):
                return found
    pair = re.split(r"[,;\s]+", line)
    meant = {_match(part, names, folders) for part in pair} if len(pair) == 2 else set()
    return meant.pop() if len(meant) == 1 else None


def _without_suffix(line: str) -> str:
    stem, dot, suffix = line.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in SUFFIXES else line
