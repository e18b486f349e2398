"""The kinds of values that settings have, each with what it refuses and how it is written down.

A path is made absolute: a run continues from other folders, and a submitted job's working directory is temporary.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from unet.config.files import absolute
from unet.settings import parse_bytes
from unet.storage import Folder

SOURCES = ("synthetic", "oxford_iiit_pet")


def is_source_name(source: str) -> bool:
    """Whether this names a source (such as synthetic:5000) and is not a path."""
    return source.partition(":")[0] in SOURCES


def _absolute(value: str) -> str:
    """A path, or a `file://` of one, from anywhere; a URI, and what is empty, as it is."""
    value = Folder(value).uri if value.startswith("file:") else value
    return str(absolute(value)) if value and "://" not in value else value


def known_from_anywhere(value: str) -> str:
    """What a training begins with: a file or folder from anywhere; a run's name or a URI as it is."""
    found = str(absolute(value))
    return found if os.path.isfile(found) or ("/" in value and os.path.exists(found)) else value


def _not_empty(value: str) -> str:
    if not value.strip():
        raise ValueError("name a folder, or leave the flag out")
    return value


def _source(value: str) -> str:
    # A name with a typing error is shown as it was written.
    return value if is_source_name(value) or not Path(found := _absolute(value)).exists() else found


def _is_folder(value: Path) -> Path:
    if not value.is_dir():
        raise ValueError("there is no such folder")
    return value


def _space(value: str) -> str:
    return _absolute(value) if value.endswith((".yaml", ".yml")) else value


def _size(value: str) -> str:
    parse_bytes(value)
    return value


PathOrUri = Annotated[str, AfterValidator(_absolute)]
"""A file, folder or pattern, on a disk or in an object store; empty where it is not given."""
FolderOrUri = Annotated[str, AfterValidator(_not_empty), AfterValidator(_absolute)]
"""A folder on a disk or in an object store."""
LocalFolder = Annotated[Path, AfterValidator(absolute)]
ExistingFolder = Annotated[LocalFolder, AfterValidator(_is_folder)]
DataSource = Annotated[str, AfterValidator(_source)]
"""The name of a source, or where data are."""
SearchSpace = Annotated[str, AfterValidator(_space)]
"""The name of a space, or a YAML file."""
ByteSize = Annotated[str, AfterValidator(_size)]
"""As `unet.settings.parse_bytes` reads it."""
ImageSize = Annotated[int, Field(ge=16, le=2048)]
Resize = Literal["stretch", "letterbox"]
Format = Literal["saved_model", "tflite", "onnx", "tflite_float16", "tflite_int8"]
"""A form in which a network alone is exported."""
FORMATS: tuple[Format, ...] = ("saved_model", "tflite", "onnx")
"""Those that are written unless others are named."""
RegisteredName = Annotated[str, Field(pattern=r"^[\w.@-][\w .@-]*$")]
"""Of a model in MLflow's registry: it stands in URIs and in queries."""
