"""What runs on the cluster: tasks that read photos, actors with the network, tasks that write its predictions.

A row of a table is a photo, a table a group of photos. Readers send the actors the network's input (and a grey copy of
a small photo, to draw on), actors send the writers its probabilities. Large photos are decoded again where they are
drawn on. No photo passes through the driver.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from PIL import Image

from unet.classes import IGNORE, Classes
from unet.cluster.devices import start_tensorflow
from unet.config import Resize
from unet.data import decode
from unet.data.pictures import Unusable
from unet.data.resize import box_of, to_square
from unet.models.inference import Network
from unet.models.trained import TrainedModel
from unet.pages.pictures import overlay
from unet.prediction import tiles
from unet.prediction.enlarge import bands, likeliest
from unet.prediction.results import KINDS, MASKS, OVERLAYS, PROBABILITIES, row_schema, write_part
from unet.storage import Folder

GREY_BYTES, GREY_GROUP_BYTES = 2**22, 2**26
"""The largest grey copy that is sent along, of a photo and of a whole group."""
IMAGES = "images"
"""Folder of the photos in a data set."""
TILE_SCALE = 2
LARGEST_JPEG = 65_500
"""Pixels of the longest side of one."""
DURABLE = False
"""A kill leaves no torn file either way; after a power failure, file sizes show what has to be done again."""


@dataclass(frozen=True)
class Work:
    """What readers and writers need to know.

    Attributes:
        photos: where the photos are, as a URI.
        output: where predictions go, as a URI.
        image_size, resize: how the network's input is made.
        classes: what its outputs mean.
        tile, overlays, probabilities, least_confidence: as the flags say.
        photos_too: whether photos are copied to `images/`.
        first_part: number of the first group's part.
    """

    photos: str
    output: str
    image_size: int
    resize: Resize
    classes: Classes
    tile: bool
    overlays: bool
    probabilities: bool
    photos_too: bool
    least_confidence: float
    first_part: int

    @property
    def output_bytes(self) -> int:
        """Bytes of the network's output for a photo, at most."""
        squares = 1 + len(tiles.places(TILE_SCALE, self.image_size)) if self.tile else 1
        return squares * self.image_size**2 * len(self.classes) * 4

    def is_tiled(self, height: int, width: int) -> bool:
        """Whether a photo is so large that its tiles are not enlarged."""
        return self.tile and min(height, width) >= TILE_SCALE * self.image_size


def read(rows: pa.Table, group: int, work: Work) -> pa.Table:
    """Decode the photos of a group: `rows` has file, size, mtime_ns and name."""
    folder, size, kept = Folder(work.photos), work.image_size, 0
    squares: list[bytes | memoryview] = []
    greys: list[bytes] = []
    facts: list[tuple[str, str, int | None, int | None]] = []
    for file in rows["file"].to_pylist():
        squares.append(b"")
        greys.append(b"")
        try:
            photo = decode.photo(file, folder.read_bytes)
        except Unusable as error:
            facts.append((error.problem, error.detail, None, None))
            continue
        square = to_square(photo, size, work.resize, decode.BILINEAR, fill=0)
        if work.is_tiled(photo.height, photo.width):
            canvas = to_square(photo, TILE_SCALE * size, work.resize, decode.BILINEAR, fill=0)
            square = np.concatenate([square[None], tiles.cut(canvas, TILE_SCALE)])
        squares[-1] = square.data
        if work.overlays and photo.width * photo.height <= min(GREY_BYTES, GREY_GROUP_BYTES - kept):
            greys[-1] = photo.convert("L").tobytes()
            kept += len(greys[-1])
        facts.append(("", "", photo.height, photo.width))
    columns = {"problem": pa.string(), "detail": pa.string(), "height": pa.int32(), "width": pa.int32()}
    for (name, kind), column in zip(columns.items(), zip(*facts, strict=True), strict=True):
        rows = rows.append_column(name, pa.array(column, kind))
    rows = rows.append_column("group", pa.array(np.full(len(rows), group)))
    return rows.append_column("squares", _packed(squares)).append_column("grey", _packed(greys))


class Predictor:
    """A process with the network: `squares` in, `probabilities` out, float32 (n, C, S, S) for each photo."""

    def __init__(self, trained: TrainedModel, threads: int, batch_size: int, tta: bool, use_gpu: bool = False):
        start_tensorflow(threads, use_gpu)
        self._network, self._batch_size, self._tta = Network(trained), batch_size, tta
        self._shape = (trained.image_size, trained.image_size, 3)
        self._probabilities(np.zeros((1, *self._shape), np.uint8))  # traced before the first photo

    def __call__(self, rows: pa.Table) -> pa.Table:
        squares, offsets = _unpacked(rows["squares"])
        squares = squares.reshape(-1, *self._shape)
        starts = range(0, len(squares), self._batch_size)
        found = [self._probabilities(squares[first : first + self._batch_size]) for first in starts]
        buffer = pa.py_buffer(np.concatenate(found) if found else b"")
        bytes_of_a_square = len(buffer) // max(1, len(squares))
        offsets = offsets // np.prod(self._shape) * bytes_of_a_square
        packed = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(rows), [None, pa.py_buffer(offsets.astype(np.int64)), buffer]
        )
        return rows.drop_columns("squares").append_column("probabilities", packed)

    def _probabilities(self, squares: np.ndarray) -> np.ndarray:
        found = self._network.probabilities(squares)
        if self._tta:
            found = (found + self._network.probabilities(squares[:, :, ::-1])[:, :, ::-1]) / 2
        return np.ascontiguousarray(np.moveaxis(found, -1, 1))


def write(rows: pa.Table, work: Work) -> pa.Table:
    """Write the pictures of a group and then its part; returns its rows, `row_schema`."""
    photos, output, found = Folder(work.photos), Folder(work.output), []
    schema, nothing = row_schema(len(work.classes)), [0] * len(work.classes)
    probabilities, greys = rows["probabilities"].combine_chunks(), rows["grey"].combine_chunks()
    for index, row in enumerate(rows.select([name for name in schema.names if name in rows.column_names]).to_pylist()):
        if row["problem"]:
            found.append(row | {"pixels": nothing, "written": [0] * len(KINDS)})
            continue
        squares = np.frombuffer(probabilities[index].as_buffer(), np.float32)
        squares = squares.reshape(-1, len(work.classes), work.image_size, work.image_size)
        planes = inside(squares, row["height"], row["width"], work)
        found.append(row | _write_photo(row, planes, greys[index].as_buffer(), photos, output, work))
    table = pa.Table.from_pylist(found, schema)
    write_part(output, work.first_part + rows["group"][0].as_py(), table)
    return table


def inside(squares: np.ndarray, height: int, width: int, work: Work) -> np.ndarray:
    """A photo's probabilities without the padding, float32 (C, h, w), from those of its squares (n, C, S, S)."""
    planes = squares[0]
    if len(squares) > 1:
        side = TILE_SCALE * work.image_size
        _, whole = zip(*bands(planes, side, side), strict=True)
        planes = (np.concatenate(whole, 1) + tiles.blend(squares[1:], TILE_SCALE)) / 2
    top, left, new_height, new_width = box_of(height, width, planes.shape[-1], work.resize)
    return planes[:, top : top + new_height, left : left + new_width]


def _write_photo(row: dict, planes: np.ndarray, grey: pa.Buffer, photos: Folder, output: Folder, work: Work) -> dict:
    """Write the files of one photo; `planes` is float32 (C, h, w). Returns confidence, pixels and written."""
    height, width, sizes = row["height"], row["width"], dict.fromkeys(KINDS, 0)
    ids, sure = np.empty((height, width), np.uint8), 0.0
    for first, band in bands(planes, height, width):
        rows = slice(first, first + band.shape[1])
        ids[rows], highest = likeliest(band)
        if work.least_confidence:
            ids[rows][highest < work.least_confidence] = IGNORE
        sure += highest.sum(dtype=np.float64)
    mask = Image.frombuffer("P", (width, height), ids, "raw", "P", 0, 1)
    colours = bytes(channel for info in work.classes for channel in info.colour)
    # Pillow stores as many bits a pixel as the palette's length needs.
    mask.putpalette(colours.ljust(3 * (IGNORE + 1), b"\0") if work.least_confidence else colours)
    pictures = {MASKS: (mask, "PNG", {"compress_level": 1})}
    if work.overlays:
        if len(grey):
            tones = np.frombuffer(grey, np.uint8).reshape(height, width)
        else:
            tones = np.asarray(decode.photo(row["file"], photos.read_bytes).convert("L"))
        drawn = overlay(tones, ids, work.classes)
        if max(drawn.size) > LARGEST_JPEG:
            drawn.thumbnail((LARGEST_JPEG, LARGEST_JPEG))
        pictures[OVERLAYS] = drawn, "JPEG", {"quality": 88}
    for kind, (picture, form, options) in pictures.items():
        content = io.BytesIO()
        picture.save(content, form, **options)
        sizes[kind] = content.tell()
        output.write_bytes(kind.format(row["name"]), content.getbuffer(), DURABLE)
    if work.photos_too:
        suffix = PurePosixPath(row["file"]).suffix
        output.write_bytes(f"{IMAGES}/{row['name']}{suffix}", photos.read_bytes(row["file"]), DURABLE)
    if work.probabilities:
        sizes[PROBABILITIES] = _write_probabilities(output, PROBABILITIES.format(row["name"]), planes, height, width)
    pixels = mask.histogram()[: len(work.classes)]
    return {"confidence": sure / ids.size, "pixels": pixels, "written": list(sizes.values())}


def _write_probabilities(output: Folder, name: str, planes: np.ndarray, height: int, width: int) -> int:
    """Write float16 (height, width, C) as `probabilities` of an .npz, a band at a time; returns the bytes written."""
    header = {"descr": "<f2", "fortran_order": False, "shape": (height, width, len(planes))}
    with output.writing(name, DURABLE) as stream:
        with (
            zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open("probabilities.npy", "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for _, band in bands(planes, height, width):
                file.write(np.moveaxis(band, 0, -1).astype("<f2").tobytes())
        return stream.tell()


def _packed(contents: Sequence[bytes | memoryview]) -> pa.LargeBinaryArray:
    """Contents as one column."""
    offsets = np.cumsum([0, *(memoryview(content).nbytes for content in contents)])
    buffers = [None, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(b"".join(contents))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(contents), buffers)


def _unpacked(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """uint8, the bytes of all rows, and int64 (rows + 1), where each begins. One chunk is not copied."""
    array = column.combine_chunks()
    _, offsets, content = array.buffers()
    offsets = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    content = np.frombuffer(content or b"", np.uint8)[offsets[0] : offsets[-1]]
    return content, offsets - offsets[0]
