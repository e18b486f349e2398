"""Files of weights as PyTorch writes them: read as they are, or refused in a sentence."""

import zipfile

import numpy as np
import pytest
from torch_files import write_torch

from unet.errors import InputError
from unet.models.torch_file import read_torch

random = np.random.default_rng(3)


@pytest.mark.parametrize("is_archive", [True, False])
def test_files_of_weights_are_read_as_they_were_written(is_archive, tmp_path):
    arrays = {
        "a.weight": random.normal(size=(4, 3, 2)).astype(np.float32),
        "b": random.normal(size=(2, 5)).astype(np.float16).T,
        "c": np.arange(7),
        "d": np.array(3, np.float32),
    }
    found = read_torch(write_torch(tmp_path / "w.pth", arrays, is_archive))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


@pytest.mark.parametrize(
    "odd",
    [
        {"shape": (9, 9)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (-1, 1)},
        {"strides": (0, 0), "shape": (10**9, 10**9)},
        {"strides": (1,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_archive", [True, False])
def test_arrays_that_reach_beyond_their_numbers_are_refused(odd, is_archive, tmp_path):
    path = write_torch(tmp_path / "w.pth", {"a": np.zeros((3, 4), np.float32)}, is_archive, **odd)
    with pytest.raises(InputError, match=r"w\.pth is no file of weights, or damaged"):
        read_torch(path)


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_damaged_file_of_weights_is_one_sentence(is_archive, tmp_path):
    path = write_torch(tmp_path / "w.pth", {"a": random.normal(size=(30, 40)).astype(np.float32)}, is_archive)
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place])
        with pytest.raises(InputError, match=r"w\.pth is no"):
            read_torch(path)
    with pytest.raises(InputError, match=r"Cannot read .*No such file"):
        read_torch(tmp_path / "absent.pth")


def test_packed_or_swollen_archives_are_refused(tmp_path):
    """A small file could fill the memory: zeros that are packed, or one storage in many arrays."""
    path = write_torch(tmp_path / "w.pth", {"a": np.zeros(4096, np.float32)})
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    shared = np.zeros(4096, np.float32)
    with pytest.raises(InputError, match=r"is packed\)"):
        read_torch(tmp_path / "packed.pth")
    many = write_torch(tmp_path / "many.pth", {f"{i}": shared for i in range(9)}, one_storage=True)
    with pytest.raises(InputError, match="its arrays are larger than itself"):
        read_torch(many)
