"""The form of all settings: typed, validated, flat on the command line and in files.

A field's docstring is its help text. `flat` and `unflat` turn the parts into one dictionary of names with
underscores, as `--config FILE` and a run's `config.yaml` hold them, and back.
"""

import difflib
import math
import re
import warnings
from collections.abc import Collection, Iterable
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from unet.errors import InputError

# Some jobs have a flag --register; the unrelated method of that name in every Pydantic model does no harm.
warnings.filterwarnings("ignore", message='Field name "register" in ')

Settings = TypeVar("Settings", bound=BaseModel)

Device = Literal["auto", "cpu", "gpu"]
"""What processes with TensorFlow compute on."""


class SettingsGroup(BaseModel):
    """A group of settings: unknown names are refused, and nothing changes once they are parsed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for field in cls.model_fields.values():
            if field.description:  # as one line: the command line would keep some of its breaks
                field.description = " ".join(field.description.split())

    def __init__(self, **values):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(sentence(error)) from error


def flat(settings: BaseModel) -> dict[str, Any]:
    """All settings in one dictionary, ready for YAML."""
    return {name: value for part in settings.model_dump(mode="json").values() for name, value in part.items()}


def unflat(cls: type[Settings], values: dict[str, Any], source: str = "the settings") -> Settings:
    """Settings from a flat dictionary.

    Raises:
        InputError: an unknown name (with the nearest known) or a value that does not fit.
    """
    parts = {part: set(_fields_of(field)) for part, field in cls.model_fields.items()}
    nested: dict[str, dict] = {part: {} for part in parts}
    for name, value in values.items():
        part = next((part for part, names in parts.items() if name in names), None)
        if part is None:
            near = difflib.get_close_matches(str(name), set().union(*parts.values()), n=1)
            raise InputError(f"{source}: unknown setting {name!r}" + (f"; did you mean {near[0]}?" if near else "."))
        nested[part][name] = value
    try:
        return cls(**nested)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def defaults(cls: type[Settings]) -> dict[str, Any]:
    """The flat defaults; each by itself may be one that does not fit the others."""
    parts = (field.annotation for field in cls.model_fields.values())
    return {
        name: field.get_default(call_default_factory=True, validated_data={})
        for part in parts
        if isinstance(part, type) and issubclass(part, BaseModel)
        for name, field in part.model_fields.items()
    }


def _fields_of(part: FieldInfo) -> Iterable[str]:
    """The settings of a part, whose type is a group of them."""
    if not (isinstance(part.annotation, type) and issubclass(part.annotation, BaseModel)):
        raise TypeError(f"{part.annotation} is not a group of settings")
    return part.annotation.model_fields


def sentence(error: ValidationError) -> str:
    """A validation error in one sentence that names the flag."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["loc"] and not message.startswith("--"):
        flag = "--" + str(first["loc"][-1]).replace("_", "-")
        value = first.get("input")
        shown = repr(value) if isinstance(value, str) and not value.strip() else value
        message = f"{flag} {shown}: {message[0].lower()}{message[1:]}" if not isinstance(value, dict) else message
    return message + "."


def parse_bytes(text: str) -> int:
    """'8GB', '500 MB', '2GiB' or plain bytes as a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size: write it like 8GB or 500MB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def parse_interval(text: str) -> tuple[Literal["steps", "seconds"], float]:
    """'200' as ("steps", 200), '10m' as ("seconds", 600)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)m|(\d+)", text)
    if not match or not float(match[1] or match[2]):
        raise ValueError(f"{text!r} is not an interval: write 200 for steps, 10m for minutes")
    return ("seconds", float(match[1]) * 60) if match[1] else ("steps", int(match[2]))


def weighted_names(flag: str, text: str, names: Collection[str]) -> list[tuple[float, str]]:
    """'dice + 0.5*focal' as [(1, "dice"), (0.5, "focal")].

    Raises:
        ValueError: it is written otherwise, or names something that is not among `names`.
    """
    found = []
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)\s*\*)?\s*(\w+)\s*", part)
        weight = float(match[1] or 1) if match else 0.0
        if not match or match[2] not in names or not 0 < weight < math.inf:
            raise ValueError(
                f"{flag} {text}: {part.strip()!r} is not known: write NAME or 0.5*NAME, joined by +, where the names "
                f"are {', '.join(names)}"
            )
        found.append((weight, match[2]))
    return found
