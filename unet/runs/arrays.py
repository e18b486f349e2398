"""The two files of arrays in a checkpoint: weights as HDF5, what else a step changes as plain NPZ.

They are read without Keras and without TensorFlow, and as what they are to be only: arrays of known names, shapes and
kinds that lie in the file itself. Whatever could lead to another file, to a filter or to a pickle is refused.
"""

import io
import zipfile
from collections.abc import Iterator, Mapping

import h5py
import numpy as np

from unet.recipe.network import Shapes


def weights_file(arrays: Mapping[str, np.ndarray], keras_paths: Mapping[str, str]) -> io.BytesIO:
    """Arrays by name as an HDF5 file; each has a second name, by which Keras' `load_weights` finds it."""
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for name, array in arrays.items():
            file[keras_paths[name]] = file.create_dataset(name, data=array)
    return image


def read_weights(content: io.BytesIO, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of these names, in their order.

    Raises:
        ValueError: what is there is something else. Damaged bytes make HDF5 raise almost anything.
    """
    refuse_links(content)
    with h5py.File(content, "r") as file:
        for name, shape in shapes.items():
            found = file.get(name)
            if not isinstance(found, h5py.Dataset):
                raise ValueError(f"lacks {name}")
            if found.shape != shape:
                raise ValueError(f"{name} is {found.shape}, not {shape}")
            if found.dtype != np.float32:
                raise ValueError(f"{name} holds {found.dtype}, not float32")
            stored = found.id.get_create_plist()
            if stored.get_layout() != h5py.h5d.CONTIGUOUS or stored.get_external_count():
                raise ValueError(f"{name} is not stored plainly in the file itself")
            yield name, found[()]


def refuse_links(content: io.BytesIO) -> None:
    """Refuse an HDF5 file whose arrays may lie in others. What is no HDF5 file holds none.

    Raises:
        ValueError: with the name of the first.
    """

    def leads_out(name: bytes, info) -> str | None:
        shown = name.decode(errors="replace")
        if info.type != h5py.h5l.TYPE_HARD:
            return f"{shown} is a link to somewhere else"
        found = file[name]
        if isinstance(found, h5py.Dataset) and (found.id.get_create_plist().get_external_count() or found.is_virtual):
            return f"{shown} is not stored plainly in the file itself"
        return None

    try:
        file = h5py.File(content, "r")
    except OSError:
        return
    with file:
        # Visiting follows no link that leads out of the file; it ends with the first that does.
        if (words := file.id.links.visit(leads_out, info=True)) is not None:
            raise ValueError(words)


def arrays_file(arrays: Mapping[str, np.ndarray]) -> io.BytesIO:
    """Arrays by name as an NPZ file."""
    image = io.BytesIO()
    np.savez(image, **dict(arrays))  # type: ignore[arg-type]  # its types take every keyword for allow_pickle
    return image


def read_arrays(content: io.BytesIO, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of these names, which must be all there are.

    Raises:
        ValueError: what is there is something else. Damaged bytes make `zipfile` raise almost anything.
    """
    with zipfile.ZipFile(content) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if differing := sorted(members.keys() ^ shapes.keys()):
            raise ValueError(f"{'lacks' if differing[0] in shapes else 'also holds'} {differing[0]}")
        for name, shape in shapes.items():
            if members[name].compress_type != zipfile.ZIP_STORED:  # packed, a small file could fill the memory
                raise ValueError(f"{name} is packed")
            with archive.open(members[name]) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
                if stream.read(1):
                    raise ValueError(f"{name} is followed by something")
            if array.shape != shape or array.dtype.kind not in "iuf":
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not numbers {shape}")
            yield name, array
