"""From raw samples to shards: a Ray Data pipeline that decodes in parallel, and one writer.

The output appears whole under its name or not at all.
"""

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from unet.classes import PETS
from unet.data import sources
from unet.data.order import CHUNK
from unet.data.shards import (
    MANIFEST,
    SCHEMA_VERSION,
    SPLITS,
    Manifest,
    Prepared,
    data_digest,
    sample_digest,
    shard_schema,
)
from unet.errors import InputError
from unet.storage import Folder

VAL_FRACTION = 0.1
Progress = Callable[[int, int], None]
"""Called with (samples written, samples in all)."""


def resolve(data: str, image_size: int, storage: Folder, progress: Progress) -> Prepared:
    """The prepared folder that `--data` means; archives and drawn pets are prepared on first use and kept.

    Raises:
        InputError: there is nothing at that place, or what is there cannot be used.
    """
    if "://" in data or (Path(data) / MANIFEST).is_file():
        prepared = Prepared(Folder(data if "://" in data else Path(data).resolve()))
        if prepared.manifest.image_size != image_size:
            raise InputError(
                f"{data} was prepared at {prepared.manifest.image_size} px: "
                f"give --image-size {prepared.manifest.image_size}, or prepare it again at {image_size}."
            )
        return prepared
    target = kept_folder(data, image_size, storage)
    if not target.exists(MANIFEST):
        prepare(data, target, image_size, progress=progress)
    return Prepared(target)


def kept_folder(data: str, image_size: int, storage: Folder) -> Folder:
    """Where the storage path keeps what is prepared of a source."""
    return storage / "data" / _kept_name(data, image_size)


def check_source(data: str) -> None:
    """Refuse a `--data` or `--source` that names nothing usable, before anything starts.

    Raises:
        InputError: with what to give instead.
    """
    folder = Path(data)
    if data == "synthetic" or "://" in data or (folder / MANIFEST).is_file():
        return
    known = "Give a prepared folder, a folder with images.tar.gz and annotations.tar.gz, or `synthetic`."
    if not folder.exists():
        raise InputError(f"There is no data at {data}. {known}")
    if not folder.is_dir() or not any(folder.iterdir()):
        raise InputError(f"{data} is not a folder with data in it. {known}")
    if not sources.is_archive_folder(folder):
        raise InputError(f"{data} holds neither shards nor the official archives. {known}")


def prepare(
    source: str,
    target: Folder,
    image_size: int,
    shards: int = 4,
    val_fraction: float = VAL_FRACTION,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Write the shards and the manifest of a source; at most `shards` files a split.

    Raises:
        InputError: the source cannot be read, or a sample is unusable (the first one is named).
    """
    check_source(source)
    if target.names():
        raise InputError(f"{target} is not empty: give another --output, or remove what is there.")
    base = Path(target.path).parent if target.is_local else None
    if base:
        base.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".preparing-", dir=base))
    try:
        if source == "synthetic":
            samples = sources.synthetic_samples(val_fraction)
        else:
            extracted = sources.extract(Path(source).resolve(), scratch)
            samples = sources.archive_samples(extracted, val_fraction)
        unfinished = Folder(scratch / "shards") if target.is_local else target
        files, digests = _write_shards(samples, unfinished, image_size, shards, progress)
        manifest = Manifest(
            image_size=image_size,
            resize="stretch",
            classes=[c.name for c in PETS.classes],
            colours=[list(c.colour) for c in PETS.classes],
            sha256={},
            counts={split: sum(s.split == split for s in samples) for split in SPLITS},
            files=files,
            data_digest=data_digest(digests),
            source="synthetic" if source == "synthetic" else "archives",
            source_version="1" if source == "synthetic" else _archive_version(Path(source)),
            val_fraction=val_fraction,
        )
        unfinished.write_text(MANIFEST, manifest.to_json())
        if target.is_local:
            try:
                (scratch / "shards").rename(target.path)
            except OSError:
                if not target.exists(MANIFEST):  # else another job was quicker, with the same data
                    raise
        return manifest
    except ray.exceptions.RayError as error:
        raise InputError(f"Preparing the data failed: {str(error).splitlines()[0]}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_shards(samples, folder: Folder, image_size: int, shards: int, progress: Progress):
    """Decode every sample over the cluster and write them in canonical order; the files and digests of all."""
    totals = Counter(s.split for s in samples)
    schema, digests = shard_schema(image_size), {}
    files = {split: _file_names(split, totals[split], shards) for split in SPLITS}
    folder.fs.create_dir(folder.path, recursive=True)
    waiting, split, chunk, writer = None, None, 0, None

    def write(table):
        nonlocal chunk, writer
        names, chunks = files[split], -(-totals[split] // CHUNK)
        file = chunk * len(names) // chunks
        if chunk == 0 or (chunk - 1) * len(names) // chunks != file:
            if writer:
                writer.close()
            # Stored plain: pixels hardly compress, and reading a row group is then a copy of memory.
            writer = pq.ParquetWriter(
                folder._at(names[file]), schema, filesystem=folder.fs, compression="NONE", use_dictionary=False
            )
        writer.write_table(table.combine_chunks(), row_group_size=CHUNK)
        chunk += 1

    for table in _decoded(samples, image_size):
        _refuse_bad(table)
        digests |= zip(table["name"].to_pylist(), table["digest"].to_pylist(), strict=True)
        for part in _by_split(table.select(schema.names).cast(schema)):
            if part["split"][0].as_py() != split:
                if waiting is not None and len(waiting):
                    write(waiting)
                waiting, split, chunk = None, part["split"][0].as_py(), 0
            waiting = part if waiting is None else pa.concat_tables([waiting, part])
            while len(waiting) >= CHUNK:
                write(waiting.slice(0, CHUNK))
                waiting = waiting.slice(CHUNK)
        progress(len(digests), len(samples))
    if waiting is not None and len(waiting):
        write(waiting)
    if writer:
        writer.close()
    return files, digests


def _decoded(samples, image_size: int):
    """Tables of decoded samples in the given order, from tasks of Ray Data."""
    dataset = ray.data.from_items([asdict(s) for s in samples], override_num_blocks=-(-len(samples) // 64))
    dataset.context.execution_options.preserve_order = True
    decoded = dataset.map_batches(
        _decode_batch, fn_kwargs={"image_size": image_size}, batch_size=None, batch_format="pyarrow", num_cpus=0.5
    )
    return decoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def _decode_batch(batch: pa.Table, image_size: int) -> pa.Table:
    rows = []
    for fields in batch.to_pylist():
        sample = sources.Sample(**fields)
        row = {"name": sample.name, "split": sample.split, "breed": sample.breed, "error": ""}
        try:
            decoded = sources.load(sample, image_size)
        except InputError as error:
            # An error column instead of an exception: the reader names the sample in one sentence.
            blank = {"image": b"", "mask": b"", "digest": b"", "original_height": 0, "original_width": 0}
            rows.append(row | blank | {"error": str(error)})
            continue
        rows.append(
            row
            | {
                "image": decoded.image.tobytes(),
                "mask": decoded.mask.tobytes(),
                "original_height": decoded.original_height,
                "original_width": decoded.original_width,
                "digest": sample_digest(sample.name, sample.split, decoded.image, decoded.mask),
            }
        )
    return pa.Table.from_pylist(rows)


def _refuse_bad(table: pa.Table) -> None:
    errors = [e for e in table["error"].to_pylist() if e]
    if errors:
        raise InputError(errors[0])


def _by_split(table: pa.Table):
    """The runs of rows of one split; the input is sorted by split, so there are at most a few."""
    splits = table["split"].to_pylist()
    cuts = [0, *(i for i in range(1, len(splits)) if splits[i] != splits[i - 1]), len(splits)]
    return [table.slice(a, b - a) for a, b in pairwise(cuts) if b > a]


def _file_names(split: str, samples: int, shards: int) -> list[str]:
    count = min(shards, -(-samples // CHUNK))
    return [f"{split}-{i:05d}-of-{count:05d}.parquet" for i in range(count)]


def _archive_version(folder: Path) -> str:
    """A fingerprint of the archives' names, sizes and times: a cheap answer to "are they still the same?"."""
    parts = []
    for archive in sources.ARCHIVES:
        for path in (folder / archive, folder / archive.split(".")[0]):
            if path.exists():
                stat = path.stat()
                parts.append(f"{path.name}:{stat.st_size if path.is_file() else ''}:{stat.st_mtime_ns}")
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _kept_name(data: str, image_size: int) -> str:
    if data == "synthetic":
        return f"synthetic-{image_size}px-v{SCHEMA_VERSION}"
    folder = Path(data).resolve()
    key = hashlib.sha256(f"{folder}|{_archive_version(folder)}|{SCHEMA_VERSION}".encode()).hexdigest()[:8]
    return f"{folder.name}-{image_size}px-{key}"
