"""The form of all settings: typed, validated, flat on the command line and in files.

A field's docstring is its help text. `flat` and `unflat` turn the parts into one dictionary of names with
underscores, as `--config FILE` and a run's `config.yaml` hold them, and back.
"""

import difflib
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from unet.errors import InputError
from unet.paths import database_of, moved, sqlite_uri
from unet.storage import Folder

CONFIG = "config.yaml"
"""File with the flat settings of a run or sweep; its folder holds it from the beginning."""

MOVABLE = ("data", "tracking_uri")
"""Settings that may name something under the storage path, which moves with it."""

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


def _fields_of(part: FieldInfo) -> Iterable[str]:
    """The settings of a part, whose type is a group of them."""
    if not (isinstance(part.annotation, type) and issubclass(part.annotation, BaseModel)):
        raise TypeError(f"{part.annotation} is not a group of settings")
    return part.annotation.model_fields


def load_yaml(path: Path) -> dict[str, Any]:
    """The flat settings of a file.

    Raises:
        InputError: the file is missing or not a mapping of names to values.
    """
    try:
        values = parse_yaml(path.read_bytes(), f"--config {path}")
    except OSError as error:
        raise InputError(f"Cannot read --config {path}: {error.strerror}.") from error
    if not isinstance(values or {}, dict):
        raise InputError(f"--config {path} must hold `name: value` lines.")
    return values or {}


class _Loader(yaml.SafeLoader):
    """Plain values only. Keys are texts as they are written (YAML takes `no` for a truth value), and stand once."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag in _OF_PLAIN_KEYS:
                key.tag, line = _OF_TEXTS, key.start_mark.line + 1
                if key.value in lines:
                    first = lines[key.value]
                    where = f"in lines {first} and {line}" if first != line else f"in line {line}"
                    raise ValueError(f"{key.value} is given twice, {where}")
                lines[key.value] = line
        return node


_OF_TEXTS = "tag:yaml.org,2002:str"
_PLAIN = ("str", "bool", "int", "float", "null", "timestamp", "binary")
_OF_PLAIN_KEYS = {f"tag:yaml.org,2002:{kind}" for kind in _PLAIN}


def parse_yaml(content: bytes | str, what: str) -> Any:
    """YAML of plain values; a tag that would make an object of them is refused, and so is a key given twice.

    Raises:
        InputError: it is not that.
    """
    try:
        return _Loader(content).get_single_data()
    except Exception as error:  # besides its own errors, PyYAML raises whatever the values of odd tags lead to
        raise InputError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error


def read_config(folder: Folder) -> dict[str, Any]:
    """The flat settings in the folder of a run or sweep; if it was moved, with the paths of today.

    Raises:
        InputError: they are damaged.
    """
    values = parse_yaml(folder.read_bytes(CONFIG), f"{folder}/{CONFIG}")
    if not isinstance(values, dict):
        raise InputError(f"{folder}/{CONFIG} does not hold `name: value` lines: restore a copy of it.")
    return values | {name: moved_with(folder, values, values[name]) for name in MOVABLE if values.get(name)}


def moved_with(folder: Folder, config: dict[str, Any], setting: str) -> str:
    """A local path, or the URI of a database in a file, from the settings of a folder that may have moved since."""
    path, storage = database_of(setting) or setting, config.get("storage_path")
    if not (folder.is_local and storage and os.path.isabs(path)):
        return setting
    found = moved(str(path), f"{storage}/{os.path.basename(folder.path)}", folder.path)
    if found == str(path):
        return setting
    return found if path == setting else sqlite_uri(found)


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


def absolute(path: str | Path) -> Path:
    """The path independent of the working directory, with ~ as the home directory.

    Raises:
        ValueError: there is none of either.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError("there is no home directory for ~ (HOME is not set): give an absolute path") from error
    except FileNotFoundError as error:
        raise ValueError("the working directory is gone: give an absolute path, or cd to another directory") from error


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
