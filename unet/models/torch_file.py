"""The arrays in a file of weights that PyTorch wrote, without PyTorch and without running what a pickle asks for.

A pickle is a program: whoever made the file would run what they like. This reader knows three words of it, those of
which a file of weights is made, and refuses a file with any other.
"""

import collections
import io
import math
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
MOST_PICKLED = 2**26
"""Bytes of what describes the arrays: names and shapes."""
WORDS = frozenset[str]().union(
    *(
        words.split()
        for words in (
            "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE",
            "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE",
            "EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3",
            "APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET",
            "GLOBAL STACK_GLOBAL REDUCE BINPERSID BUILD",
        )
    )
)
"""What pickles of weights are made of."""


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
            views, contents = _of_archive(file) if zipfile.is_zipfile(file) else _of_stream(file)
        if sum(map(_bytes, views.values())) > 2 * path.stat().st_size:  # many views of one storage
            raise ValueError("its arrays are larger than itself")
        return {name: _array(view, contents[view.storage.key]) for name, view in views.items()}
    except _Refused as error:
        raise InputError(f"{path} is not a file of weights alone: it asks for {error}. Give another file.") from None
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or first_line(error)}.") from error
    except Exception as error:  # whatever a pickle of random bytes leads to
        raise InputError(f"{path} is no file of weights, or damaged ({first_line(error)}): give another.") from error


class _Refused(Exception):
    """A pickle names what no file of weights needs."""


class _Unpickler(pickle.Unpickler):
    """Knows ordered dictionaries, kinds of storages and views of them.

    Attributes:
        storages: that were named, by key.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *about: _view(*about)  # a pickle may set attributes of what it is given
        if module == "torch" and name in DTYPES:
            return _Kind(DTYPES[name])
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, about: Any) -> _Storage:
        word, kind, key, _, count = about[:5]
        if word != "storage" or not isinstance(kind, _Kind) or not isinstance(count, int):
            raise _Refused(f"a {word}")
        if len(about) > 5 and about[5] is not None:
            raise _Refused("a view of a storage")
        return self.storages.setdefault(str(key), _Storage(str(key), np.dtype(kind.dtype), count))


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise _Refused("an array without numbers")
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _of_archive(file: BinaryIO) -> tuple[dict[str, _View], dict[str, bytes]]:
    """Of PyTorch 1.6 and later: an archive with `data.pkl` and a file for each storage, none of them packed."""
    archive = zipfile.ZipFile(file)
    place = next((name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"), None)
    if place is None:
        raise ValueError("no data.pkl in it")

    def content(name: str) -> bytes:
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # packed, a small file could fill the memory
            raise ValueError(f"{name} is packed")
        return archive.read(name)

    views, storages = _loaded(io.BytesIO(content(place)))
    folder = place.removesuffix("data.pkl")
    return views, {key: content(f"{folder}data/{key}") for key in storages}


def _of_stream(file: BinaryIO) -> tuple[dict[str, _View], dict[str, bytes]]:
    """Of PyTorch before 1.6: pickles one after another, then the storages."""
    file.seek(0)
    if _unpickled(file)[0] != MAGIC or _unpickled(file)[0] != PROTOCOL:
        raise ValueError("it begins otherwise")
    if not _unpickled(file)[0]["little_endian"]:
        raise ValueError("its numbers are big-endian")
    views, storages = _loaded(file)
    keys, contents = _unpickled(file)[0], {}
    for key in map(str, keys):
        (count,) = struct.unpack("<q", file.read(8))
        if count != storages[key].numbers:
            raise ValueError(f"storage {key} has another size")
        contents[key] = _read(file, count * storages[key].dtype.itemsize)
    return views, contents


def _loaded(file: BinaryIO) -> tuple[dict[str, _View], dict[str, _Storage]]:
    """The arrays by name, and all storages; a dictionary that has arrays as `state_dict` is looked into."""
    found, storages = _unpickled(file)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise _Refused("something that is no dictionary")
    return {name: view for name, view in found.items() if isinstance(name, str) and isinstance(view, _View)}, storages


def _unpickled(file: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """The next value in a file, and the storages that it names, once it is sure that it is made of `WORDS`."""
    begin = file.tell()
    for word, value, at in pickletools.genops(file):
        if word.name not in WORDS:
            raise _Refused(f"the word {word.name}")
        if (at or 0) - begin > MOST_PICKLED or (word.name == "LONG_BINPUT" and int(value or 0) > MOST_PICKLED // 4):
            raise ValueError("its description has no end")
    end = file.tell()
    file.seek(begin)
    reader = _Unpickler(io.BytesIO(_read(file, end - begin)))
    return reader.load(), reader.storages


def _read(file: BinaryIO, size: int) -> bytes:
    """So many bytes, which must be there."""
    here = file.tell()
    left = file.seek(0, io.SEEK_END) - here
    file.seek(here)
    if not 0 <= size <= left:
        raise ValueError("it ends early")
    return file.read(size)


def _bytes(view: _View) -> int:
    return math.prod(view.shape) * view.storage.dtype.itemsize


def _array(view: _View, content: bytes) -> np.ndarray:
    """A copy of the numbers of a view, once it is sure that all lie in its storage."""
    flat = np.frombuffer(content, view.storage.dtype)
    if len(flat) != view.storage.numbers or len(view.shape) != len(view.strides):
        raise ValueError("a storage has another size")
    if min((view.offset, *view.shape, *view.strides), default=0) < 0:
        raise ValueError("a view of what is not there")
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    if math.prod(view.shape) and (last >= len(flat) or math.prod(view.shape) > len(flat)):
        raise ValueError("a view of what is not there")
    strides = [stride * flat.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides, writeable=False).copy()
