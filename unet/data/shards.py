"""Prepared data as they are read: Parquet files of plain Arrow types with a manifest beside them.

One row group is a chunk of 256 samples of the split's canonical order (by hash of name), whatever the number of
files, so the order of training does not depend on how the data were sharded.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet.data.manifest import MANIFEST, SAMPLES, SPLITS, Manifest, files_of_chunks, sample_digest
from unet.data.order import CHUNK, sample_bytes
from unet.data.plain import open_parquet
from unet.errors import InputError, first_line
from unet.storage import Folder

REPREPARE = "remove {} and prepare the data again (`jobs/prepare.py --verify` shows all that is damaged)."


def shard_schema(image_size: int, original_masks: bool = False) -> pa.Schema:
    """The columns of a shard: uint8 pixels as fixed-size binary, which any Arrow reader opens.

    `mask_original`, where it is kept, is a PNG of the class ids at the photo's own size.
    """
    return pa.schema(
        [
            ("name", pa.string()),
            ("split", pa.string()),
            ("image", pa.binary(image_size * image_size * 3)),
            ("mask", pa.binary(image_size * image_size)),
            ("original_height", pa.int32()),
            ("original_width", pa.int32()),
            ("breed", pa.string()),
            *([("mask_original", pa.binary())] if original_masks else []),
        ]
    )


@lru_cache(maxsize=4)
def _opened(uri: str, written: tuple[int, int]) -> "Prepared":
    return Prepared(Folder(uri))


def opened(uri: str) -> "Prepared":
    """A prepared folder that this process reads repeatedly: its manifest and footers are read once.

    Raises:
        InputError: it is not a prepared folder.
    """
    folder = Folder(uri)
    info = folder.fs.get_file_info(folder.at(MANIFEST))
    return _opened(uri, (info.size or 0, info.mtime_ns or 0))  # another process may have prepared it again


class Prepared:
    """A prepared folder opened for reading; `manifest` if it is not written yet."""

    def __init__(self, folder: Folder, manifest: Manifest | None = None):
        self.folder = folder
        self.manifest = manifest or self._read_manifest()
        self._footers: dict[str, pq.FileMetaData] = {}

    def _read_manifest(self) -> Manifest:
        folder = self.folder
        if not folder.exists(MANIFEST):
            raise InputError(f"{folder} holds no {MANIFEST}: prepare it first with `python jobs/prepare.py`.")
        try:
            return Manifest.from_json(folder.read_text(MANIFEST))
        except InputError as error:
            raise InputError(f"{folder}: {error}.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{folder}/{MANIFEST} is damaged ({error}): prepare the data again.") from error

    def count(self, split: str) -> int:
        return self.manifest.counts[split]

    def bytes_in_memory(self, split: str, samples: int | None = None) -> int:
        """What the pixels of a split (or its first `samples`) take when held in memory."""
        return (self.count(split) if samples is None else samples) * sample_bytes(self.manifest.image_size)

    @cached_property
    def chunks(self) -> dict[str, list[tuple[str, int]]]:
        """By split, where chunk i of the canonical order lies: (file, row group)."""
        return {split: self._chunks_of(split) for split in SPLITS}

    def _chunks_of(self, split: str) -> list[tuple[str, int]]:
        files, found = self.manifest.files[split], []
        groups: Counter[int] = Counter()
        for number in files_of_chunks(self.count(split), len(files)):
            found.append((files[number], groups[number]))
            groups[number] += 1
        return found

    @contextlib.contextmanager
    def _parquet(self, file: str) -> Iterator[pq.ParquetFile]:
        """A file, whose footer is read only once. The file is not kept open: its disk may have to be unmounted.

        Raises:
            OSError, ArrowInvalid: it cannot be read.
        """
        with self.folder.fs.open_input_file(self.folder.at(file)) as stream:
            if file not in self._footers:
                self._footers[file] = open_parquet(stream).metadata
            yield pq.ParquetFile(stream, metadata=self._footers[file], page_checksum_verification=True)

    def read_chunk(self, split: str, chunk: int, columns: tuple[str, ...] = ("image", "mask")) -> pa.Table:
        """One chunk of the canonical order as a table of up to 256 rows in one piece.

        Raises:
            InputError: the shard is damaged (each page carries a checksum).
        """
        file, group = self.chunks[split][chunk]
        try:
            with self._parquet(file) as parquet:
                table = parquet.read_row_group(group, columns=list(columns)).combine_chunks()
        except (OSError, pa.ArrowInvalid) as error:
            reason = first_line(error)
            raise InputError(f"{self.folder}/{file} is damaged ({reason}): {REPREPARE.format(self.folder)}") from error
        if len(table) != min(CHUNK, self.count(split) - chunk * CHUNK):
            raise InputError(
                f"{self.folder}/{file} does not hold the {split} samples of the manifest: "
                f"{REPREPARE.format(self.folder)}"
            )
        return table

    def pick(self, split: str, places: Iterable[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Place in the canonical order, image uint8 (S, S, 3) and mask uint8 (S, S) of some samples of a split.

        Reads the chunks they stand in, one at a time.
        """
        size = self.manifest.image_size
        for chunk, wanted in groupby(sorted(places), key=lambda place: place // CHUNK):
            table = self.read_chunk(split, chunk)
            images, masks = pixels(table["image"], (size, size, 3)), pixels(table["mask"], (size, size))
            for place in wanted:
                yield place, images[place % CHUNK], masks[place % CHUNK]

    def read_checked(self, split: str, chunk: int, columns: tuple[str, ...] = ("image", "mask")) -> pa.Table:
        """One chunk as `read_chunk` gives it, after comparing names and pixels with the digests of `samples.parquet`.

        Raises:
            InputError: a sample's pixels are not those that were prepared; it is named.
        """
        table = self.read_chunk(split, chunk, tuple(dict.fromkeys(("name", "image", "mask", *columns))))
        for (name, known), (name_here, digest) in zip(
            self.known(split, chunk), self.digests(split, table), strict=True
        ):
            if (name, known) != (name_here, digest):
                file = f"{self.folder}/{self.chunks[split][chunk][0]}"
                raise InputError(f"{name} in {file} is not what was prepared: {REPREPARE.format(self.folder)}")
        return table.select(columns)

    def digests(self, split: str, table: pa.Table) -> list[tuple[str, bytes]]:
        """Name and digest of each row of a table with `name`, `image` and `mask`."""
        size = self.manifest.image_size
        images, masks = pixels(table["image"], (size, size, 3)), pixels(table["mask"], (size, size))
        rows = zip(table["name"].to_pylist(), images, masks, strict=True)
        return [(name, sample_digest(name, split, image, mask)) for name, image, mask in rows]

    def known(self, split: str, chunk: int) -> list[tuple[str, bytes]]:
        """Name and digest of each sample of a chunk, as it was prepared."""
        with self._samples() as parquet:
            table = parquet.read_row_group(self._row_groups(split)[chunk], columns=["name", "digest"])
        return list(zip(table["name"].to_pylist(), table["digest"].to_pylist(), strict=True))

    def samples(self, columns: Iterable[str] | None = None) -> pa.Table:
        """What is known of each sample: a row a sample, by split (train, val, test), then in canonical order.

        Columns: `name, split, breed, original_height, original_width, pixels` (of each class, at the network's size),
        `ignored` (pixels), `repairs`, `mask_fit` (see `unet.data.preparing.checks`), `digest`. A row group is a chunk.
        """
        with self._samples() as parquet:
            return parquet.read(columns=columns and list(columns))

    def is_labelled(self, split: str) -> bool:
        """Whether any pixel of a split has a class, at the network's size."""
        with self._samples() as parquet:
            read = (parquet.read_row_group(group, columns=["pixels"]) for group in self._row_groups(split))
            return any(np.any(table["pixels"].combine_chunks().flatten()) for table in read)

    def class_pixels(self, split: str, samples: int) -> np.ndarray:
        """How many pixels of each class the first `samples` of a split have, at the network's size: int64 (C,)."""
        found, left = np.zeros(len(self.manifest.classes), np.int64), samples
        with self._samples() as parquet:
            for group in self._row_groups(split)[: -(-samples // CHUNK)]:
                counts = parquet.read_row_group(group, columns=["pixels"])["pixels"].combine_chunks().flatten()
                found += counts.to_numpy().reshape(-1, len(found))[:left].sum(0)
                left -= CHUNK
        return found

    def _row_groups(self, split: str) -> range:
        """Where the chunks of a split stand in `samples.parquet`."""
        first = sum(-(-self.count(s) // CHUNK) for s in SPLITS[: SPLITS.index(split)])
        return range(first, first + -(-self.count(split) // CHUNK))

    @contextlib.contextmanager
    def _samples(self) -> Iterator[pq.ParquetFile]:
        try:
            with self._parquet(SAMPLES) as parquet:
                yield parquet
        except (OSError, pa.ArrowInvalid) as error:
            reason = first_line(error)
            message = f"Cannot read {self.folder}/{SAMPLES} ({reason}): {REPREPARE.format(self.folder)}"
            raise InputError(message) from error

    def names(self, split: str) -> list[str]:
        """The names of a split in canonical order."""
        samples = self.samples(("name", "split"))
        return samples.filter(pc.equal(samples["split"], split))["name"].to_pylist()

    def names_at(self, split: str, places: Iterable[int]) -> list[str]:
        """The names of some samples of a split by their places in the canonical order; only their chunks are read."""
        places = list(places)
        chunks = {chunk: self.read_chunk(split, chunk, ("name",))["name"] for chunk in {p // CHUNK for p in places}}
        return [chunks[place // CHUNK][place % CHUNK].as_py() for place in places]


def pixels(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """A fixed-size binary column as uint8 (rows, *shape) without a copy."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    width = array.type.byte_width
    flat = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width : (array.offset + len(array)) * width]
    return flat.reshape(len(array), *shape)
