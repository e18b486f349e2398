"""Files of weights as PyTorch writes them, written without it."""

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np

KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


def _modules() -> dict[str, types.ModuleType]:
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in KINDS.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("a reader has called it")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    return {"torch": torch, "torch._utils": utils}


class _Tensor:
    def __init__(self, key: str, array: np.ndarray, modules, strides=None, offset=0, shape=None):
        self.key, self.array, self.modules = key, array, modules
        self.strides = strides or [s // array.itemsize for s in array.strides]
        self.offset, self.shape = offset, shape or array.shape

    def __reduce__(self):
        storage = _Storage(self)
        hooks = (False, OrderedDict())
        rebuild = self.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (storage, self.offset, tuple(self.shape), tuple(self.strides), *hooks)


class _Storage:
    def __init__(self, tensor: _Tensor):
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    is_stream = False

    def persistent_id(self, value):
        if not isinstance(value, _Storage):
            return None
        tensor = value.tensor
        kind = getattr(tensor.modules["torch"], KINDS[tensor.array.dtype.name])
        about = ("storage", kind, tensor.key, "cpu", tensor.array.size)
        return (*about, None) if self.is_stream else about


def write_torch(path: Path, arrays: dict, is_archive: bool = True, one_storage: bool = False, **odd) -> Path:
    """Write arrays by name; `odd` replaces facts about each view (strides, offset, shape). Other values are pickled."""
    modules = _modules()
    whole = {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}
    keys = {name: "0" if one_storage else str(number) for number, name in enumerate(whole)}
    tensors = OrderedDict(
        (name, _Tensor(keys[name], value, modules, **odd) if name in whole else value) for name, value in arrays.items()
    )
    with mock.patch.dict(sys.modules, modules):
        content = io.BytesIO()
        pickler = _Pickler(content, protocol=2)
        pickler.is_stream = not is_archive
        pickler.dump(tensors)
    if is_archive:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights/data.pkl", content.getvalue())
            for key, array in {keys[name]: array for name, array in whole.items()}.items():
                archive.writestr(f"weights/data/{key}", array.tobytes("A"))
        return path
    with path.open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}):
            pickle.dump(part, file, protocol=2)
        file.write(content.getvalue())
        pickle.dump(list(keys.values()), file, protocol=2)
        for array in whole.values():
            file.write(struct.pack("<q", array.size) + array.tobytes("A"))
    return path
