"""The arrays in a file of weights that PyTorch wrote, without PyTorch and without running what a pickle asks for.

A pickle is a program: whoever made the file would run what they like. This reader knows three words of it, those of
which a file of weights is made, and refuses a file with any other.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unet.errors import InputError, first_line

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What a file begins with that is no archive: that of PyTorch before 1.6."""
DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "<b1",
}
MOST_BYTES = 2**33
"""No file of weights is larger; one that says so is damaged, or made to fill a memory."""


class _Kind(NamedTuple):
    """What stands for a class of PyTorch's storages."""

    dtype: str


class _Storage(NamedTuple):
    """Numbers that arrays are views of: where they are, by key."""

    key: str
    dtype: np.dtype
    numbers: int


class _View(NamedTuple):
    """An array that is yet to be read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of weights (`torch.save(model.state_dict(), path)`), by name.

    Raises:
        InputError: there is no such file, it is damaged, or it holds something else.
    """
    try:
        with path.open("rb") as file:
            views, storages = _of_archive(file) if zipfile.is_zipfile(file) else _of_stream(file)
        return {name: _array(view, storages) for name, view in views.items()}
    except _Refused as error:
        raise InputError(f"{path} is not a file of weights alone: it asks for {error}. Give another file.") from None
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or first_line(error)}.") from error
    except Exception as error:  # whatever a pickle of random bytes leads to
        raise InputError(f"{path} is no file of weights, or damaged ({first_line(error)}): give another.") from error


class _Refused(Exception):
    """A pickle names what no file of weights needs."""


class _Unpickler(pickle.Unpickler):
    """Knows ordered dictionaries, kinds of storages and views of them."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if module == "torch" and name in DTYPES:
            return _Kind(DTYPES[name])
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, about: Any) -> _Storage:
        word, kind, key, _, count = about[:5]
        if word != "storage" or not isinstance(kind, _Kind) or not isinstance(count, int):
            raise _Refused(f"a {word}")
        if len(about) > 5 and about[5] is not None:
            raise _Refused("a view of a storage")
        return _Storage(str(key), np.dtype(kind.dtype), count)


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise _Refused("an array without numbers")
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _of_archive(file) -> tuple[dict[str, _View], Callable[[_Storage], bytes]]:
    """Of PyTorch 1.6 and later: an archive with `data.pkl` and a file for each storage."""
    archive = zipfile.ZipFile(file)
    place = next((name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"), None)
    if place is None:
        raise ValueError("no data.pkl in it")
    folder = place.removesuffix("data.pkl")
    views = _views(io.BytesIO(archive.read(place)))
    contents = {}
    for storage in {view.storage for view in views.values()}:
        name, size = f"{folder}data/{storage.key}", _size(storage)
        if archive.getinfo(name).file_size != size:
            raise ValueError(f"{name} has another size")
        contents[storage.key] = archive.read(name)
    return views, lambda storage: contents[storage.key]


def _of_stream(file) -> tuple[dict[str, _View], Callable[[_Storage], bytes]]:
    """Of PyTorch before 1.6: pickles one after another, then the storages."""
    file.seek(0)
    if _Unpickler(file).load() != MAGIC or _Unpickler(file).load() != PROTOCOL:
        raise ValueError("it begins otherwise")
    if not _Unpickler(file).load()["little_endian"]:
        raise ValueError("its numbers are big-endian")
    views = _views(file)
    keys, contents = _Unpickler(file).load(), {}
    storages = {view.storage.key: view.storage for view in views.values()}
    for key in keys:
        storage = storages[str(key)]
        (count,) = struct.unpack("<q", file.read(8))
        if count != storage.numbers:
            raise ValueError(f"storage {key} has another size")
        contents[storage.key] = file.read(_size(storage))
    return views, lambda storage: contents[storage.key]


def _views(file) -> dict[str, _View]:
    """What the pickle holds, one array by name; a dictionary that has them as `state_dict` is looked into."""
    found = _Unpickler(file).load()
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise _Refused("something that is no dictionary")
    return {str(name): view for name, view in found.items() if isinstance(view, _View)}


def _size(storage: _Storage) -> int:
    size = storage.numbers * storage.dtype.itemsize
    if not 0 <= size <= MOST_BYTES:
        raise ValueError("a storage of an impossible size")
    return size


def _array(view: _View, storages: Callable[[_Storage], bytes]) -> np.ndarray:
    """A copy of the numbers of a view, once it is sure that all lie in its storage."""
    flat = np.frombuffer(storages(view.storage), view.storage.dtype)
    if len(flat) != view.storage.numbers or len(view.shape) != len(view.strides):
        raise ValueError("it ends early")
    if min((view.offset, *view.shape, *view.strides), default=0) < 0:
        raise ValueError("a view of what is not there")
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    if math.prod(view.shape) and (last >= len(flat) or math.prod(view.shape) > len(flat)):
        raise ValueError("a view of what is not there")
    strides = [stride * flat.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides, writeable=False).copy()
