"""Settings in files: `--config FILE`, and the `config.yaml` of a run or sweep."""

import difflib
import errno
import os
from pathlib import Path
from typing import Any

import yaml

from unet.errors import InputError
from unet.paths import database_of, moved, sqlite_uri
from unet.storage import Folder

CONFIG = "config.yaml"
"""File with the flat settings of a run or sweep; its folder holds it from the beginning."""


MOVABLE = ("data", "tracking_uri")
"""Settings that may name something under the storage path, which moves with it."""


def load_yaml(path: str) -> dict[str, Any]:
    """The flat settings of a file, by its path or URI.

    Raises:
        InputError: the file is missing or not a mapping of names to values.
    """
    try:
        content = Folder(path).read_bytes("") if "://" in path else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read --config {path}: {os.strerror(error.errno or errno.ENOENT)}.") from error
    values = parse_yaml(content, f"--config {path}")
    if not isinstance(values or {}, dict):
        raise InputError(f"--config {path} must hold `name: value` lines.")
    return values or {}


def read_named(what: str, name: str, folder: Path) -> str:
    """The YAML of `folder/NAME.yaml`, or of a file.

    Args:
        what: the setting that names it, such as recipe.
        name: one of those that the project brings, or the path of a file that ends in .yaml or .yml.
        folder: of those that the project brings.

    Raises:
        InputError: there is none (with the nearest known), or it cannot be read.
    """
    known = {path.stem: path for path in folder.glob("*.yaml")}
    path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give {', '.join(sorted(known))} or a YAML file."
        raise InputError(f"There is no {what} {name!r}: {hint}")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read --{what} {path}: {getattr(error, 'strerror', None) or error}.") from error


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


def folder_of(name: str, storage: Folder) -> Folder:
    """The folder of a run or sweep.

    Raises:
        InputError: there is none of that name (with the names of some).
    """
    folder = storage / name
    if not folder.exists(CONFIG):
        known = [n for n in storage.names() if (storage / n).exists(CONFIG)]
        raise InputError(
            f"There is no run {name} under {storage}." + (f" Known are: {', '.join(known[-8:])}." if known else "")
        )
    return folder


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
