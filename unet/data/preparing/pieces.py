"""The tasks of preparing: pieces of decoded samples, then shards put together from them.

A piece is decoded once and kept until the shards are written, so that a killed preparation goes on where it was, and
what is left out is decided after all samples have been seen. Pixels go from task to disk and never through the driver.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unet.classes import IGNORE, Labels
from unet.config import Resize
from unet.data import decode
from unet.data.decode import BILINEAR, NEAREST
from unet.data.manifest import sample_digest
from unet.data.order import CHUNK
from unet.data.pictures import Unusable
from unet.data.plain import check_plain
from unet.data.preparing.checks import mask_fit, without_padding
from unet.data.resize import letterbox_box
from unet.data.shards import shard_schema
from unet.data.sources import Sample
from unet.errors import InputError
from unet.storage import Folder

PIECE_SAMPLES, PIECE_BYTES = 128, 2**25


@dataclass(frozen=True)
class Recipe:
    """How samples become shards.

    Attributes:
        image_size: side of the square pictures.
        resize: how photos become square.
        val_fraction: share of trainval that becomes val.
        shards: files of a split, at most.
        original_masks: keep the masks at the photos' own size too.
    """

    image_size: int = 128
    resize: Resize = "stretch"
    val_fraction: float = 0.1
    shards: int = 4
    original_masks: bool = False


@dataclass(frozen=True)
class Piece:
    """Consecutive samples that are decoded together; its two files are named by its number."""

    number: int
    samples: Sequence[Sample]

    @property
    def pixels(self) -> str:
        return f"piece-{self.number:06d}.pixels.arrow"

    @property
    def facts(self) -> str:
        """Written last: a piece that has it is whole."""
        return f"piece-{self.number:06d}.facts.arrow"


def samples_of_a_piece(image_size: int) -> int:
    """As many as a task has memory for."""
    return max(1, min(PIECE_SAMPLES, PIECE_BYTES // (image_size**2 * 4)))


def cut(samples: Sequence[Sample], image_size: int) -> list[Piece]:
    """The samples in pieces."""
    size = samples_of_a_piece(image_size)
    return [Piece(i, samples[first : first + size]) for i, first in enumerate(range(0, len(samples), size))]


def facts_schema(classes: int) -> pa.Schema:
    """What is known of each sample: `problem` is empty for a good one; `photo` and `mask_hash` tell equal pixels.

    `present` are the ids of the classes in the mask at the photo's own size, `reading` how the mask was read.
    """
    return pa.schema(
        [
            *((name, pa.string()) for name in ("name", "split", "breed", "problem", "detail", "reading")),
            *((name, pa.binary(32)) for name in ("digest", "photo", "mask_hash")),
            *((name, pa.int32()) for name in ("original_height", "original_width")),
            ("pixels", pa.list_(pa.int64(), classes)),
            ("ignored", pa.int64()),
            ("present", pa.list_(pa.uint8())),
            ("repairs", pa.list_(pa.string())),
            ("mask_fit", pa.float64()),
        ]
    )


def decode_piece(piece: Piece, labels: Labels, recipe: Recipe, work: str) -> None:
    """Decode a piece's samples and write them with what is known of them below the folder `work`.

    Raises:
        InputError: a mask can be read in two ways, and there is a file in which the right one can be stated.
    """
    size, count = recipe.image_size, len(piece.samples)
    images, masks = np.zeros((count, size, size, 3), np.uint8), np.full((count, size, size), IGNORE, np.uint8)
    facts, originals = [], []
    for i, sample in enumerate(piece.samples):
        try:
            decoded = decode.load(sample, labels, size, recipe.resize, recipe.original_masks)
            images[i], masks[i] = decoded.image, decoded.mask
            facts.append(_facts(sample, decoded, images[i], masks[i], labels))
            originals.append(decoded.original_mask)
        except Unusable as error:
            if error.problem in decode.ASKED and labels.described_in:
                raise InputError(f"{sample.name}: {error.detail}.") from error
            facts.append(_unusable(sample, error, labels))
            originals.append(b"")
    for row, fit in zip(facts, _mask_fits(images, masks, facts, recipe), strict=True):
        row["mask_fit"] = None if row["problem"] else float(fit)
    columns = {"image": _fixed(images), "mask": _fixed(masks)}
    if recipe.original_masks:
        columns["mask_original"] = pa.array(originals, pa.binary())
    folder = Folder(work)
    _write(folder, piece.pixels, pa.table(columns))
    _write(folder, piece.facts, pa.Table.from_pylist(facts, facts_schema(len(labels.classes))))


def _mask_fits(images: np.ndarray, masks: np.ndarray, facts: list[dict], recipe: Recipe) -> np.ndarray:
    if recipe.resize == "letterbox":
        boxes = [
            letterbox_box(row["original_height"] or 1, row["original_width"] or 1, recipe.image_size) for row in facts
        ]
        images, masks = without_padding(images, boxes, BILINEAR), without_padding(masks, boxes, NEAREST)
    return mask_fit(images, masks)


def _facts(sample: Sample, decoded: decode.Decoded, image: np.ndarray, mask: np.ndarray, labels: Labels) -> dict:
    pixels = np.bincount(mask.reshape(-1), minlength=IGNORE + 1)
    return _identity(sample) | {
        "digest": sample_digest(sample.name, sample.split, image, mask),
        "photo": _content(decoded, image),
        "mask_hash": _content(decoded, mask),
        "original_height": decoded.height,
        "original_width": decoded.width,
        "pixels": pixels[: len(labels.classes)].tolist(),
        "ignored": int(pixels[IGNORE]),
        "present": list(decoded.present),
        "reading": decoded.reading,
        "repairs": list(decoded.repairs),
    }


def _content(decoded: decode.Decoded, pixels: np.ndarray) -> bytes:
    found = hashlib.sha256(f"{decoded.height}x{decoded.width}".encode())
    found.update(pixels.data)
    return found.digest()


def _unusable(sample: Sample, error: Unusable, labels: Labels) -> dict:
    nothing = {"digest": bytes(32), "photo": bytes(32), "mask_hash": bytes(32), "original_height": 0}
    nothing |= {"original_width": 0, "pixels": [0] * len(labels.classes), "ignored": 0, "present": [], "repairs": []}
    return _identity(sample) | nothing | {"problem": error.problem, "detail": error.detail}


def _identity(sample: Sample) -> dict:
    return {
        "name": sample.name,
        "split": sample.split,
        "breed": sample.breed,
        "problem": "",
        "detail": "",
        "reading": "",
    }


def _fixed(pixels: np.ndarray) -> pa.Array:
    """uint8 (N, …) as fixed-size binary, without a copy."""
    width = pixels[0].size
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(pixels), [None, pa.py_buffer(pixels)])


def _write(folder: Folder, name: str, table: pa.Table) -> None:
    with folder.writing(name) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)


def read_table(folder: Folder, name: str) -> pa.Table:
    """A table of a piece; from a local disk it is mapped, not read."""
    is_local = folder.is_local
    source = pa.memory_map(f"{folder.path}/{name}") if is_local else pa.py_buffer(folder.read_bytes(name))
    file = pa.ipc.open_file(source)
    check_plain(file.schema)
    return file.read_all()


@dataclass(frozen=True)
class ShardFile:
    """A file of shards to write.

    Attributes:
        file: its name.
        rows: the facts of its samples, in canonical order, with `piece` and `row`: where their pixels are.
    """

    file: str
    rows: pa.Table


def write_shard(shard: ShardFile, recipe: Recipe, work: str, target: str) -> str:
    """Write a shard, each chunk as a row group; the sha256 of the file. What a killed preparation wrote is kept."""
    folder = Folder(target)
    if not (folder.is_local and folder.exists(shard.file)):
        schema = shard_schema(recipe.image_size, recipe.original_masks)
        # Stored plain: pixels hardly compress, and reading a row group is then a copy of memory. The checksums of
        # pages are checked at each reading.
        plain = {"compression": "NONE", "use_dictionary": False, "write_page_checksum": True}
        with folder.writing(shard.file) as stream, pq.ParquetWriter(stream, schema, **plain) as writer:
            for first in range(0, len(shard.rows), CHUNK):
                chunk = _with_pixels(shard.rows.slice(first, CHUNK), Folder(work), schema)
                writer.write_table(chunk, row_group_size=CHUNK)
    return sha256_of(folder, shard.file)


def _with_pixels(rows: pa.Table, work: Folder, schema: pa.Schema) -> pa.Table:
    pieces, places = rows["piece"].to_numpy(), rows["row"].to_numpy()
    # The rows of a piece follow each other in canonical order.
    starts = np.flatnonzero(np.diff(pieces, prepend=-1))
    parts = []
    for start, end in zip(starts, [*starts[1:], len(pieces)], strict=True):
        table = read_table(work, Piece(int(pieces[start]), ()).pixels)
        parts.append(table.take(pa.array(places[start:end])))
    pixels = pa.concat_tables(parts)
    for name in pixels.column_names:
        rows = rows.append_column(name, pixels[name])
    return rows.select(schema.names).cast(schema).combine_chunks()


def sha256_of(folder: Folder, file: str) -> str:
    """The sha256 of a file, read in pieces of a megabyte."""
    found = hashlib.sha256()
    with folder.fs.open_input_stream(folder.at(file)) as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()
