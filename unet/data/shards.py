"""Prepared data: Parquet files of plain Arrow types with a manifest beside them.

One row group is a chunk of 256 samples of the split's canonical order (by hash of name), whatever the number of
files, so the order of training does not depend on how the data were sharded.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet.classes import Classes, ClassInfo
from unet.config import Resize
from unet.data.order import CHUNK, sample_bytes
from unet.data.plain import open_parquet
from unet.errors import InputError, first_line
from unet.storage import Folder

SCHEMA_VERSION = 2
REPREPARE = "remove {} and prepare the data again (`jobs/prepare.py --verify` shows all that is damaged)."
MANIFEST, SAMPLES, REPORT = "manifest.json", "samples.parquet", "data_report.html"
SPLITS = ("train", "val", "test")


def name_hash(name: str) -> bytes:
    """What the canonical order sorts by and what decides the split."""
    return hashlib.sha256(name.encode()).digest()


def sample_digest(name: str, split: str, image: np.ndarray, mask: np.ndarray) -> bytes:
    """sha256 of a sample's name, split, shape and pixels; image uint8 (S, S, 3), mask uint8 (S, S)."""
    header = f"{name}\0{split}\0{'x'.join(map(str, image.shape))}\0"
    found = hashlib.sha256(header.encode())
    found.update(np.ascontiguousarray(image).data)
    found.update(np.ascontiguousarray(mask).data)
    return found.digest()


def data_digest(digests: dict[str, bytes]) -> str:
    """The passport of a data set: sha256 over the samples' digests sorted by name, independent of sharding."""
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


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


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        image_size: side of the square pictures, in pixels.
        resize: how photos became square: `stretch` or `letterbox`.
        classes: names, in the order of the ids.
        colours: of the classes, RGB 0-255.
        counts: samples by split.
        files: the shards by split, in canonical order.
        sha256: of every file beside the manifest.
        data_digest: of names, splits and pixels, independent of sharding.
        source, source_version: what it was made from.
        val_fraction: share of trainval that became val.
        shards: files of a split, at most.
        original_masks: whether the shards hold `mask_original`.
        left_out: samples that could not be used: {name, split, problem, detail}.
        repaired: samples that were repaired: {name, repair}.
        warnings: what looks wrong but was kept: {name, problem, detail}; an empty name concerns the whole set.
        totals: of these three, how many there are of each problem or repair. The lists hold the first of each
            (`unet.data.findings`); empty where older preparations listed all.
    """

    image_size: int
    resize: Resize
    classes: list[str]
    colours: list[list[int]]
    counts: dict[str, int]
    files: dict[str, list[str]]
    sha256: dict[str, str]
    data_digest: str
    source: str
    source_version: str
    val_fraction: float
    shards: int = 4
    original_masks: bool = False
    left_out: list[dict] = field(default_factory=list)
    repaired: list[dict] = field(default_factory=list)
    warnings: list[dict] = field(default_factory=list)
    totals: dict[str, dict[str, int]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def kinds(self, found: str) -> Counter[str]:
        """How many samples of `left_out`, `repaired` or `warnings` there are of each problem or repair."""
        key = "repair" if found == "repaired" else "problem"
        return Counter(self.totals[found] if found in self.totals else (row[key] for row in getattr(self, found)))

    @property
    def class_infos(self) -> Classes:
        """The classes with their colours."""
        pairs = zip(self.classes, self.colours, strict=True)
        return tuple(ClassInfo(name, (red, green, blue)) for name, (red, green, blue) in pairs)

    def to_json(self) -> str:
        """With `manifest_digest`, the sha256 of all the rest, so that no edit goes unnoticed."""
        content = asdict(self)
        return json.dumps(content | {"manifest_digest": _digest_of(content)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The manifest of a file's content.

        Raises:
            ValueError, TypeError, KeyError: it is not what `to_json` wrote.
        """
        content = json.loads(text)
        if content["schema_version"] != SCHEMA_VERSION:
            raise InputError(
                f"the data were prepared with schema version {content['schema_version']}, but this program reads "
                f"{SCHEMA_VERSION}: prepare them again"
            )
        if content.pop("manifest_digest") != _digest_of(content):
            raise ValueError("its content was changed")
        manifest = cls(**content)
        for file in (*manifest.sha256, *(file for files in manifest.files.values() for file in files)):
            if not file or file == ".." or Path(file).name != file:
                raise ValueError(f"it names {file!r}, which is not a file beside it")
        if empty := next((s for s in SPLITS if manifest.counts[s] and not manifest.files[s]), None):
            raise ValueError(f"it names no shard of {empty}")
        return manifest


def _digest_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def files_of_chunks(samples: int, shards: int) -> list[int]:
    """For each chunk of a split, which of its files, `shards` at most, holds it."""
    chunks = -(-samples // CHUNK)
    return [chunk * min(shards, chunks) // chunks for chunk in range(chunks)]


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
        `ignored` (pixels), `repairs`, `mask_fit` (see `unet.data.checks`), `digest`. A row group is a chunk.
        """
        with self._samples() as parquet:
            return parquet.read(columns=columns and list(columns))

    def is_labelled(self, split: str) -> bool:
        """Whether any pixel of a split has a class, at the network's size."""
        with self._samples() as parquet:
            read = (parquet.read_row_group(group, columns=["pixels"]) for group in self._row_groups(split))
            return any(np.any(table["pixels"].combine_chunks().flatten()) for table in read)

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
