"""From raw samples to shards: decoded in parallel, checked as a whole, written whole or not at all.

What a killed preparation has done is kept beside the output, and the same command goes on from there.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from unet.config import Resize
from unet.data import checks
from unet.data.look import data_report
from unet.data.order import CHUNK
from unet.data.pieces import Piece, Recipe, Shard, cut, decode_piece, read_table, sha256_of, write_shard
from unet.data.shards import MANIFEST, REPORT, SAMPLES, SCHEMA_VERSION, SPLITS, Manifest, Prepared, data_digest
from unet.data.sources import Problem, Source
from unet.data.sources.find import TFDS, check_source, open_source, version_of
from unet.errors import InputError, RunFailed
from unet.storage import Folder

RECIPE = "recipe.json"
SAMPLE_COLUMNS = (
    *("name", "split", "breed", "original_height", "original_width"),
    *("pixels", "ignored", "repairs", "mask_fit", "digest"),
)

Progress = Callable[[str, int, int], None]
"""Called with (what is done, how far, out of how much)."""


def resolve(data: str, image_size: int, resize: Resize, storage: Folder, progress: Progress) -> Prepared:
    """The prepared folder that `--data` means; any other source is prepared on first use and kept.

    Raises:
        InputError: there is nothing at that place, or what is there cannot be used.
    """
    if "://" in data or (Path(data) / MANIFEST).is_file():
        prepared = Prepared(Folder(data if "://" in data else Path(data).resolve()))
        manifest = prepared.manifest
        for flag, wanted, found in (
            ("image-size", image_size, manifest.image_size),
            ("resize", resize, manifest.resize),
        ):
            if wanted != found:
                at = f"{found} px" if flag == "image-size" else f"--resize {found}"
                raise InputError(
                    f"{data} was prepared at {at}: give --{flag} {found}, or prepare it again with --{flag} {wanted}."
                )
        return prepared
    recipe = Recipe(image_size, resize)
    target = kept_folder(data, recipe, storage)
    if not target.exists(MANIFEST):
        prepare(data, target, recipe, cache=cache_of(storage), progress=progress)
    return Prepared(target)


def kept_folder(source: str, recipe: Recipe, storage: Folder) -> Folder:
    """Where the storage path keeps what is prepared of a source."""
    folder, version = Path(source).resolve(), version_of(source)
    name = f"{source.replace(':', '-')}-{recipe.image_size}px"
    if version.startswith("files-"):
        key = hashlib.sha256(f"{folder}|{version}|{SCHEMA_VERSION}".encode()).hexdigest()[:8]
        name = f"{folder.name}-{recipe.image_size}px-{key}"
    letterbox = "-letterbox" if recipe.resize == "letterbox" else ""
    return storage / "data" / f"{name}{letterbox}-v{SCHEMA_VERSION}"


def cache_of(storage: Folder) -> Path | None:
    """Where downloads are kept; None where the storage is no local disk."""
    return Path(storage.path) / "data" / TFDS if storage.is_local else None


def prepare(
    source: str,
    target: Folder,
    recipe: Recipe,
    strict: bool = False,
    source_dir: Path | None = None,
    cache: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Manifest:
    """Write the shards, the manifest and `samples.parquet` of a source; what is there already is only read.

    Args:
        strict: refuse where a sample would be left out.
        source_dir: where the archives of `oxford_iiit_pet` lie already.
        cache: where downloads are kept.

    Raises:
        InputError: the source cannot be read, nothing in it can be used, or the target holds something else.
    """
    check_source(source)
    version = version_of(source, source_dir)
    wanted = asdict(recipe) | {"source": source, "source_version": version, "schema_version": SCHEMA_VERSION}
    with _workplace(target, wanted, progress) as work:
        if target.exists(MANIFEST):
            return _existing(target, recipe, version)
        try:
            return _Preparation(source, target, recipe, version, work, progress).run(strict, source_dir, cache)
        except ray.exceptions.RayError as error:
            raise RunFailed(
                f"Preparing the data failed: {_cause(error)}. The same command goes on from here."
            ) from error


@contextlib.contextmanager
def _workplace(target: Folder, wanted: dict, progress: Progress) -> Iterator[Folder]:
    """A folder for unfinished work, found again by the same wish and emptied for any other; gone when all is done."""
    place = _scratch(target).with_suffix(".lock")
    place.parent.mkdir(exist_ok=True)
    lock = filelock.FileLock(place)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        progress("waiting for another job that prepares these data", 0, 0)
        lock.acquire()
    with lock:
        lock.release()  # the context holds it once more
        path = Path(target.path)
        work = Folder(path.with_name(f".preparing-{path.name}")) if target.is_local else target / ".preparing"
        if target.exists(MANIFEST):
            yield work
            return
        text = json.dumps(wanted, indent=2)
        begun = work.exists(RECIPE) and work.read_text(RECIPE) == text
        if not begun:
            if any(name != ".preparing" for name in target.names()):
                raise InputError(f"{target} is not empty: give another --output, or remove what is there.")
            _clear(work, target)
            work.write_text(RECIPE, text)
        try:
            yield work
        except InputError:
            _clear(work, target)  # it would end the same way again
            raise
        _clear(work, target)


def _scratch(target: Folder) -> Path:
    """A place on the local disk that belongs to a target."""
    return Path(tempfile.gettempdir()) / "unet-preparing" / hashlib.sha256(target.uri.encode()).hexdigest()[:12]


def _clear(work: Folder, target: Folder) -> None:
    if work.exists():
        work.fs.delete_dir(work.path)
    shutil.rmtree(_scratch(target), ignore_errors=True)


def _existing(target: Folder, recipe: Recipe, version: str) -> Manifest:
    """The manifest of a target that holds just what is wanted."""
    manifest = Prepared(target).manifest
    found = asdict(manifest)
    wanted = asdict(recipe) | {"source_version": version}
    if differing := [key for key in wanted if wanted[key] != found[key]]:
        words = ", ".join(f"{key} {found[key]} there, {wanted[key]} here" for key in differing)
        raise InputError(f"{target} holds other data ({words}): give another --output, or remove it.")
    return manifest


@dataclass
class _Preparation:
    """One source on its way into one target."""

    source: str
    target: Folder
    recipe: Recipe
    version: str
    work: Folder
    progress: Progress

    def run(self, strict: bool, source_dir: Path | None, cache: Path | None) -> Manifest:
        raw = Path(self.work.path) / "raw" if self.work.is_local else _scratch(self.target)
        source = open_source(self.source, self.recipe.val_fraction, raw, source_dir, cache, self.progress)
        facts = self._decode(source)
        kept, left_out, warnings = _check(facts, source)
        if not len(kept):
            first = left_out[0]
            raise InputError(f"None of the {len(left_out)} samples can be used. {first.name}: {first.detail}.")
        if strict and left_out:
            first, more = left_out[0], len(left_out) - 1
            raise InputError(
                f"{first.name}: {first.detail}"
                + (f", and {more} more samples cannot be used" if more else "")
                + ". Leave --strict out to go on without them; the manifest will list them."
            )
        return self._write(source, kept, left_out, warnings)

    def _decode(self, source: Source) -> pa.Table:
        """What is known of every sample, with `piece` and `row`: where its pixels are. What is decoded is not again."""
        pieces = cut(source.samples, self.recipe.image_size)
        task, labels, recipe = ray.remote(num_cpus=1)(decode_piece), ray.put(source.labels), ray.put(self.recipe)
        missing = [piece for piece in pieces if not self.work.exists(piece.facts)]
        calls = ((task, piece, labels, recipe, self.work.uri) for piece in missing)
        total, done = len(source.samples), len(source.samples) - sum(len(p.samples) for p in missing)
        for index, _ in _each(calls):
            done += len(missing[index].samples)
            self.progress("preparing data", done, total)
        return pa.concat_tables(_placed(read_table(self.work, piece.facts), piece) for piece in pieces)

    def _write(self, source: Source, kept: pa.Table, left_out: list[Problem], warnings: list[Problem]) -> Manifest:
        shards = self.work / "shards" if self.target.is_local else self.target
        files = {split: _cut_files(kept, split, self.recipe.shards) for split in SPLITS}
        every = [shard for split in SPLITS for shard in files[split]]
        task, recipe = ray.remote(num_cpus=1)(write_shard), ray.put(self.recipe)
        calls = ((task, shard, recipe, self.work.uri, shards.uri) for shard in every)
        digests = {}
        for index, digest in _each(calls):
            digests[every[index].file] = digest
            self.progress("writing shards", len(digests), len(every))
        samples = kept.select(SAMPLE_COLUMNS)
        with (
            shards.writing(SAMPLES) as stream,
            pq.ParquetWriter(stream, samples.schema, write_page_checksum=True) as writer,
        ):
            for split in SPLITS:
                writer.write_table(_of_split(samples, split), row_group_size=CHUNK)
        digests[SAMPLES] = sha256_of(shards, SAMPLES)
        counts = Counter(kept["split"].to_pylist())
        known = dict(zip(kept["name"].to_pylist(), kept["digest"].to_pylist(), strict=True))
        manifest = Manifest(
            image_size=self.recipe.image_size,
            resize=self.recipe.resize,
            classes=[c.name for c in source.labels.classes],
            colours=[list(c.colour) for c in source.labels.classes],
            counts={split: counts[split] for split in SPLITS},
            files={split: [shard.file for shard in files[split]] for split in SPLITS},
            sha256=dict(sorted(digests.items())),
            data_digest=data_digest(known),
            source=source.kind,
            source_version=self.version,
            val_fraction=self.recipe.val_fraction,
            shards=self.recipe.shards,
            original_masks=self.recipe.original_masks,
            left_out=[asdict(p) for p in left_out],
            repaired=_repairs(kept, source),
            warnings=[asdict(p) for p in warnings],
        )
        shards.write_text(MANIFEST, manifest.to_json())
        self.progress("drawing data_report.html", 0, 0)
        shards.write_text(REPORT, data_report(Prepared(shards)))
        if self.target.is_local:
            Path(shards.path).rename(self.target.path)
        return manifest


def _check(facts: pa.Table, source: Source) -> tuple[pa.Table, list[Problem], list[Problem]]:
    """The samples that stay, what is left out and why, and what only looks wrong."""
    bad = facts.filter(pa.compute.not_equal(facts["problem"], ""))
    left_out = [
        *source.left_out,
        *(Problem(**row) for row in bad.select(["name", "problem", "detail", "split"]).to_pylist()),
    ]
    good = facts.filter(pa.compute.equal(facts["problem"], ""))
    across, warnings = checks.duplicates(good)
    gone = pa.array([problem.name for problem in across], pa.string())
    kept = good.filter(pa.compute.invert(pa.compute.is_in(good["name"], gone)))
    order = {split: place for place, split in enumerate(SPLITS)}
    # The samples came by split and hash; what is left to do is the splits' own order.
    places = np.array([order[split] for split in kept["split"].to_pylist()])
    kept = kept.take(pa.array(np.argsort(places, kind="stable")))
    suspects = checks.suspects(kept, [c.name for c in source.labels.classes])
    return kept, left_out + across, [*source.warnings, *warnings, *suspects]


def _placed(facts: pa.Table, piece: Piece) -> pa.Table:
    facts = facts.append_column("piece", pa.array(np.full(len(facts), piece.number)))
    return facts.append_column("row", pa.array(np.arange(len(facts))))


def _cut_files(kept: pa.Table, split: str, shards: int) -> list[Shard]:
    """The split's samples in at most so many files of whole chunks."""
    rows = _of_split(kept, split)
    chunks = -(-len(rows) // CHUNK)
    count = min(shards, chunks)
    edges = [-(-i * chunks // count) * CHUNK for i in range(count)] + [len(rows)]
    return [
        Shard(f"{split}-{i:05d}-of-{count:05d}.parquet", rows.slice(edges[i], edges[i + 1] - edges[i]))
        for i in range(count)
    ]


def _of_split(samples: pa.Table, split: str) -> pa.Table:
    return samples.filter(pa.compute.equal(samples["split"], split))


def _repairs(kept: pa.Table, source: Source) -> list[dict]:
    pairs = zip(kept["name"].to_pylist(), kept["repairs"].to_pylist(), strict=True)
    found = [{"name": name, "repair": repair} for name, repairs in pairs for repair in repairs]
    return found + [{"name": name, "repair": repair} for name, repair in source.repairs.items()]


def _each(calls: Iterator[tuple]) -> Iterator[tuple[int, object]]:
    """(number of the call, its result) as the tasks end, with a few more begun than there are CPUs."""
    ahead = int(2 * ray.cluster_resources().get("CPU", 1)) + 1
    running = {}
    for number, (task, *arguments) in enumerate(calls):
        running[task.remote(*arguments)] = number
        if len(running) >= ahead:
            yield _next(running)
    while running:
        yield _next(running)


def _next(running: dict) -> tuple[int, object]:
    (done,), _ = ray.wait(list(running))
    return running.pop(done), ray.get(done)


def _cause(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return " ".join(str(cause).split()) or type(cause).__name__
