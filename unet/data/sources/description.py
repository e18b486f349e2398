"""`dataset.yaml`: what the masks of your own photos mean.

classes:            # name: its value in the masks, or several; ids follow this order
  road: 1           # or a colour, such as '#804080', where masks are painted
  car: [2, 3]
ignore: 255         # value or values that belong to no class
colours:            # optional, RGB, for pictures; else those of painted masks or of their palette
  road: [128, 64, 128]
test_fraction: 0.1  # share that becomes test, by hash of name, if no lists say which
masks: grey         # only if the program asks: what of a mask's pixel is its value
exif_orientation: applied  # only if it asks: masks lie over photos as displayed, or (ignored) as stored
mask_suffix: _mask  # what the names of masks have more than those of photos
"""

import colorsys
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from unet.classes import COLOUR, IGNORE, Classes, ClassInfo, Labels, Orientation, Reading
from unet.config import parse_yaml
from unet.errors import InputError

DESCRIPTION = "dataset.yaml"
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_. -]{0,58}[A-Za-z0-9_.-])?")
"""What every store takes as a part of a metric's name."""

Channel = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[int, int, int]


class Description(BaseModel):
    """The content of `dataset.yaml`; mask values as lists of numbers, colours packed as in `unet.classes`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    classes: dict[str, list[int]]
    ignore: list[int] = Field(default_factory=list)
    colours: dict[str, tuple[Channel, Channel, Channel]] = Field(default_factory=dict)
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    masks: Reading | None = None
    exif_orientation: Orientation | None = None
    mask_suffix: str = ""

    @field_validator("classes", mode="before")
    @classmethod
    def _named(cls, classes: dict[str, Any]):
        if not 2 <= len(classes) <= IGNORE:
            raise ValueError(f"`classes:` must hold at least 2 classes and at most {IGNORE}")
        known: dict[str, str] = {}
        for name in classes:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"a class cannot be called {name!r}: names become parts of metric names, so they hold at most 60 "
                    "of A-Z, a-z, 0-9, spaces, _ . and -, begin with a letter or digit and do not end with a space"
                )
            if other := known.get(name.casefold()):
                raise ValueError(f"{other} and {name} differ only in case, which some metric stores ignore: rename one")
            known[name.casefold()] = name
        return {name: _values(name, given) for name, given in classes.items()}

    @field_validator("ignore", mode="before")
    @classmethod
    def _ignored(cls, given: Any):
        return [] if given in (None, []) else _values("ignore", given)

    @field_validator("colours")
    @classmethod
    def _of_classes(cls, colours, info):
        unknown = sorted(colours.keys() - info.data.get("classes", colours).keys())
        if unknown:
            raise ValueError(f"`colours:` names {unknown[0]}, which is not among the classes")
        return colours

    @model_validator(mode="after")
    def _apart(self):
        every = [value for values in (*self.classes.values(), self.ignore) for value in values]
        if twice := {value for value in every if every.count(value) > 1}:
            raise ValueError(f"the mask value {spelled(min(twice))} is given twice")
        if min(every) < COLOUR <= max(every):
            raise ValueError("mask values are numbers or colours, not both")
        return self

    def labels(self, described_in: str, palette: Mapping[int, Colour] | None = None) -> Labels:
        """The labels; `described_in` is where this was read, `palette` what colour the masks show a value in."""
        shown = self._shown(palette or {})
        infos = [ClassInfo(name, shown.get(name) or self._colour(i, name)) for i, name in enumerate(self.classes)]
        values = {value: i for i, given in enumerate(self.classes.values()) for value in given}
        values |= dict.fromkeys(self.ignore, IGNORE)
        return Labels(tuple(infos), values, self.masks, self.exif_orientation, described_in)

    def _shown(self, palette: Mapping[int, Colour]) -> dict[str, Colour]:
        """The classes' colours in a palette, if it tells them all apart; one of greys only repeats the values."""
        found = {name: palette.get(values[0]) for name, values in self.classes.items() if name not in self.colours}
        shown = {name: colour for name, colour in found.items() if colour}
        apart = len({*shown.values(), *self.colours.values()}) == len(self.classes)
        is_grey = all(len(set(colour)) == 1 for colour in shown.values())
        return shown if apart and not is_grey and self.masks in (None, "index") else {}

    def _colour(self, index: int, name: str) -> Colour:
        """As given, else as painted in the masks, else a distinct one: hues in turn, at two brightnesses."""
        value, count = self.classes[name][0], len(self.classes)
        if name in self.colours or value >= COLOUR:
            return self.colours.get(name) or (value >> 16 & 255, value >> 8 & 255, value & 255)
        # The hue of the last is next to that of the first, and of an odd number both would be bright.
        saturation = 0.4 if count % 2 and index == count - 1 else 0.75
        red, green, blue = colorsys.hsv_to_rgb(index / count, saturation, 0.95 - 0.25 * (index % 2))
        return round(255 * red), round(255 * green), round(255 * blue)


def described(classes: Classes) -> str:
    """A `dataset.yaml` for masks that hold the ids of classes as palette indices, over photos as they are displayed."""
    content = {
        "classes": {info.name: number for number, info in enumerate(classes)},
        "ignore": IGNORE,
        "colours": {info.name: list(info.colour) for info in classes},
        "masks": "index",
        "exif_orientation": "applied",
    }
    return yaml.safe_dump(content, sort_keys=False)


def describe(folder: Path) -> Description:
    """What the folder's `dataset.yaml` says.

    Raises:
        InputError: it is missing or does not fit; with what to write.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(
            f"{path} is missing: write in it what the values in the masks mean, such as "
            "`classes: {road: 1, other: 2}` and `ignore: 255`."
        )
    content = parse_yaml(path.read_bytes(), str(path))
    if not isinstance(content, dict) or not isinstance(content.get("classes"), dict):
        raise InputError(f"{path}: it must hold `classes:` with a line `name: mask value` for each.")
    try:
        return Description.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {_sentence(error)}") from error


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ": ".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Description.model_fields, n=1)
        return f"there is no key `{key}`" + (f"; did you mean {near[0]}?" if near else ".")
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ") + "."
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}."


def spelled(value: int) -> str:
    """A mask value as it is written in `dataset.yaml`."""
    return f"#{value - COLOUR:06x}" if value >= COLOUR else str(value)


def _values(name: str, given: Any) -> list[int]:
    """The mask values of a class: numbers, or colours as `unet.classes` packs them."""
    several = given if isinstance(given, list) else [given]
    known = [_value(value) for value in several]
    found = [value for value in known if value is not None]
    if not known or len(found) < len(known):
        turned = (
            f"; write the name first, as in `{given}: {name}`" if isinstance(given, str) and name.isdecimal() else ""
        )
        raise ValueError(
            f"{name}: {given!r} is not a mask value: give a whole number from 0 to 65535, a colour such as '#804080', "
            f"or a list of them{turned}"
        )
    return found


def _value(given: Any) -> int | None:
    if isinstance(given, str) and re.fullmatch("#[0-9a-fA-F]{6}", given):
        return COLOUR + int(given[1:], 16)
    return given if type(given) is int and 0 <= given <= 65535 else None
