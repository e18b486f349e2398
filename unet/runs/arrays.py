"""The two files of arrays in a checkpoint: weights as HDF5 in Keras' layout, the optimizer's as plain NPZ.

They are read without Keras and without TensorFlow, and as what they are to be only: arrays of known names, shapes and
kinds that lie in the file itself. Whatever could lead to another file, to a filter or to a pickle is refused.
"""

import io
import math
import zipfile
from collections import Counter
from collections.abc import Iterator

import h5py
import numpy as np

from unet.storage import Sink

Shapes = dict[str, tuple[int, ...]]


def weight_shapes(base_filters: int, depth: int, classes: int, channels: int = 3) -> Shapes:
    """The weights of the U-Net by their path in the file, in the model's order, without building it."""
    shapes, count = {}, Counter()

    def layer(kind: str, kernel: tuple[int, ...], filters: int) -> None:
        path = f"layers/{kind}_{count[kind]}" if count[kind] else f"layers/{kind}"
        count[kind] += 1
        shapes.update({f"{path}/vars/0": kernel, f"{path}/vars/1": (filters,)})

    def convolutions(before: int, filters: int) -> None:
        layer("conv2d", (3, 3, before, filters), filters)
        layer("conv2d", (3, 3, filters, filters), filters)

    before, filters = channels, [base_filters * 2**level for level in range(depth + 1)]
    for f in filters:  # the encoder and the bottleneck
        convolutions(before, f)
        before = f
    for f in reversed(filters[:-1]):
        layer("conv2d_transpose", (3, 3, f, before), f)
        convolutions(2 * f, f)
        before = f
    layer("conv2d", (1, 1, before, classes), classes)
    return shapes


def optimizer_shapes(weights: Shapes) -> Shapes:
    """What Adam holds for these weights, and the loss scale with its count, by name in the file."""
    slots = [(), (), *(shape for shape in weights.values() for _ in range(2))]
    return {f"optimizer/{i:03d}": shape for i, shape in enumerate(slots)} | {"loss_scale": (), "good_steps": ()}


def write_weights(stream: Sink, arrays: dict[str, np.ndarray]) -> None:
    """Arrays by path as an HDF5 file, which Keras' `load_weights` reads too."""
    image = io.BytesIO()  # HDF5 writes back and forth
    with h5py.File(image, "w") as file:
        for path, array in arrays.items():
            file.create_dataset(path, data=array)
    stream.write(image.getbuffer())


def read_weights(content: bytes, shapes: Shapes) -> Iterator[np.ndarray]:
    """The arrays of these paths, in their order.

    Raises:
        ValueError: what is there is something else. Damaged bytes make HDF5 raise almost anything.
    """
    with h5py.File(io.BytesIO(content), "r") as file:
        # Follows no link that leads out of the file; gives the first that is not a plain one.
        link = file.id.links.visit(lambda name, info: None if info.type == h5py.h5l.TYPE_HARD else name, info=True)
        if link is not None:
            raise ValueError(f"{link.decode(errors='replace')} is a link to somewhere else")
        for path, shape in shapes.items():
            found = file.get(path)
            if not isinstance(found, h5py.Dataset):
                raise ValueError(f"lacks {path}")
            if found.shape != shape:
                raise ValueError(f"{path} is {found.shape}, not {shape}")
            if found.dtype != np.float32:
                raise ValueError(f"{path} holds {found.dtype}, not float32")
            stored = found.id.get_create_plist()
            if stored.get_layout() != h5py.h5d.CONTIGUOUS or stored.get_external_count():
                raise ValueError(f"{path} is not stored plainly in the file itself")
            yield found[()]


def write_arrays(stream: Sink, arrays: dict[str, np.ndarray]) -> None:
    """Arrays by name as an NPZ file."""
    np.savez(stream, **arrays)


def read_arrays(content: bytes, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of these names, which must be all there are.

    Raises:
        ValueError: what is there is something else. Damaged bytes make `zipfile` raise almost anything.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
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


def count_parameters(image_channels: int, base_filters: int, depth: int, num_classes: int) -> int:
    """The number of weights of the U-Net, without building it."""
    return sum(map(math.prod, weight_shapes(base_filters, depth, num_classes, image_channels).values()))
