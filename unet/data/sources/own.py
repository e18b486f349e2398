"""Own photos and masks: `images/` and `masks/`, matched by name, and a `dataset.yaml` that says what masks mean.

    classes:            # name: its value in the masks, or several; ids follow this order
      road: 1
      car: [2, 3]
    ignore: 255         # value or values that belong to no class
    colours:            # optional, RGB
      road: [128, 64, 128]
    test_fraction: 0.1  # share that becomes test, by hash of name, where no lists say it

Splits may be given by lists beside it, a name a line: `trainval.txt` and `test.txt`, `train.txt` and `test.txt` (val
comes out of the first by hash of name), or `train.txt`, `val.txt` and `test.txt`.
"""

import colorsys
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from unet.classes import IGNORE, ClassInfo, Labels
from unet.config import Part, parse_yaml
from unet.data.sources import (
    Problem,
    Sample,
    Source,
    canonical,
    files_below,
    hash_fraction,
    is_plain,
    listed,
    shown,
    split_of,
)
from unet.errors import InputError

DESCRIPTION, FOLDERS = "dataset.yaml", ("images", "masks")
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".tif", ".tiff"),
    *(".webp", ".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
}
LISTS = ("trainval", "train", "val", "test")
ALLOWED = {
    frozenset(("trainval", "test")): {"trainval": "trainval", "test": "test"},
    frozenset(("train", "test")): {"train": "trainval", "test": "test"},
    frozenset(("train", "val", "test")): {"train": "train", "val": "val", "test": "test"},
    frozenset(LISTS): {"train": "train", "val": "val", "test": "test"},
}
"""By which lists there are: the split that each gives; val comes out of trainval by hash."""
FILES = (*FOLDERS, DESCRIPTION, *(f"{name}.txt" for name in LISTS))

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$", max_length=60)]
Value = Annotated[int, Field(ge=0, le=65535, strict=True)]
Values = Value | Annotated[list[Value], Field(min_length=1)]
Channel = Annotated[int, Field(ge=0, le=255)]


class Description(Part):
    """What stands in `dataset.yaml`."""

    classes: Annotated[dict[Name, Values], Field(min_length=2, max_length=IGNORE)]
    ignore: Values | None = None
    colours: dict[Name, tuple[Channel, Channel, Channel]] = Field(default_factory=dict)
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @field_validator("colours")
    @classmethod
    def _of_classes(cls, colours, info):
        unknown = sorted(colours.keys() - info.data.get("classes", colours).keys())
        if unknown:
            raise ValueError(f"{unknown[0]} is not among the classes")
        return colours

    @model_validator(mode="after")
    def _apart(self):
        every = [value for values in (*self.classes.values(), self.ignore) for value in _several(values)]
        if twice := {value for value in every if every.count(value) > 1}:
            raise ValueError(f"the mask value {min(twice)} is given twice")
        return self

    @property
    def labels(self) -> Labels:
        names = list(self.classes)
        infos = [ClassInfo(n, self.colours.get(n, _colour(i, len(names)))) for i, n in enumerate(names)]
        values = {value: i for i, n in enumerate(names) for value in _several(self.classes[n])}
        return Labels(tuple(infos), values | dict.fromkeys(_several(self.ignore), IGNORE))


def is_own_folder(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in FOLDERS)


def describe(folder: Path) -> Description:
    """What the folder's `dataset.yaml` says.

    Raises:
        InputError: it is missing or does not fit; with what to write.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(
            f"{path} is missing: say there what the masks' values mean, such as "
            "`classes: {road: 1, other: 2}` and `ignore: 255`."
        )
    content = parse_yaml(path.read_bytes(), str(path))
    try:
        if not isinstance(content, dict) or not isinstance(content.get("classes"), dict):
            raise InputError("it must hold `classes:` with a line `name: mask value` for each.")
        return Description(**content)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {error}") from error


def own(folder: Path, val_fraction: float) -> Source:
    """The samples of an own folder. A name is the photo's path below `images/` without its suffix, its folder
    stands as breed.

    Raises:
        InputError: `dataset.yaml` does not fit, or no photo has a mask.
    """
    description = describe(folder)
    source = Source("folder", [], description.labels)
    photos, masks = (_by_name(folder / part, source) for part in FOLDERS)
    splits = _splits(folder, source, photos.keys(), description.test_fraction, val_fraction)
    for name, split in splits.items():
        if missing := [part for part, found in zip(FOLDERS, (photos, masks), strict=True) if name not in found]:
            kind = "missing_image" if missing[0] == "images" else "missing_mask"
            source.left_out.append(Problem(name, kind, f"{missing[0]}/ holds no picture of this name", split))
        elif len(photos[name]) == len(masks[name]) == 1:  # else it was left out as ambiguous
            paths = str(photos[name][0]), str(masks[name][0])
            source.samples.append(Sample(name, split, name.rpartition("/")[0], *paths))
    source.warnings += [Problem(n, "in_no_split", "in no list") for n in sorted(photos.keys() - splits.keys())]
    source.left_out += [
        Problem(name, "missing_image", "masks/ holds a picture of this name, images/ does not")
        for name in sorted(masks.keys() - photos.keys() - splits.keys())
    ]
    if not source.samples:
        raise InputError(f"No photo in {folder / 'images'} has a mask of its name in {folder / 'masks'}.")
    source.samples = canonical(source.samples)
    return source


def _by_name(folder: Path, source: Source) -> dict[str, list[Path]]:
    """The pictures below a folder by name; what cannot be one is left out."""
    found = defaultdict(list)
    for path in files_below(folder):
        name = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
        if path.suffix.lower() not in SUFFIXES:
            words = f"{folder.name}/ holds {shown(path.name)}, which is no picture that can be read"
            source.left_out.append(Problem(shown(name), "unknown_format", words))
        elif not is_plain(name):
            source.left_out.append(Problem(shown(name), "unsafe_name", f"a name in {folder.name}/ cannot be shown"))
        else:
            found[name].append(path)
    for name, paths in found.items():
        if len(paths) > 1:
            files = " and ".join(shown(path.name) for path in paths)
            source.left_out.append(Problem(name, "ambiguous", f"{folder.name}/ holds {files}"))
    return found


def _splits(folder: Path, source: Source, names, test_fraction: float, val_fraction: float) -> dict[str, str]:
    """The split of each name: as the lists say, else by hash of the name."""
    given = [name for name in LISTS if (folder / f"{name}.txt").is_file()]
    if not given:
        drawn = {name: "test" if hash_fraction(f"test/{name}") < test_fraction else "trainval" for name in names}
        return {name: split_of(name, official, val_fraction) for name, official in drawn.items()}
    meaning = ALLOWED.get(frozenset(given))
    if meaning is None:
        raise InputError(
            f"{folder} holds {', '.join(f'{name}.txt' for name in given)}: give trainval.txt and test.txt, train.txt "
            "and test.txt, or train.txt, val.txt and test.txt."
        )
    found: dict[str, str] = {}
    for listing, official in meaning.items():
        for line in listed(folder / f"{listing}.txt"):
            name = line if line in names else _without_suffix(line)
            split = split_of(name, official, val_fraction)
            if not is_plain(name):
                source.left_out.append(Problem(shown(name), "unsafe_name", "leads out of its folder", split))
            elif name in found:
                source.left_out.append(Problem(name, "listed_twice", f"listed in {found[name]} already", split))
            else:
                found[name] = split
    return found


def _without_suffix(line: str) -> str:
    stem, dot, suffix = line.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in SUFFIXES else line


def _several(values: int | list[int] | None) -> list[int]:
    return [] if values is None else values if isinstance(values, list) else [values]


def _colour(index: int, count: int) -> tuple[int, int, int]:
    """A colour that stands apart from those of the other classes: hues in turn, at two brightnesses."""
    red, green, blue = colorsys.hsv_to_rgb(index / count, 0.75, 0.95 - 0.25 * (index % 2))
    return round(255 * red), round(255 * green), round(255 * blue)
