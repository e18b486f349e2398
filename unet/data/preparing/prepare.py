"""From raw samples to shards: decoded in parallel, checked as a whole, written whole or not at all.

What a killed preparation has done is kept beside the output, and the same command goes on from there.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from unet.data.manifest import MANIFEST, REPORT, SAMPLES, SCHEMA_VERSION, SPLITS, Manifest, data_digest, files_of_chunks
from unet.data.masks import WORDS
from unet.data.order import CHUNK
from unet.data.preparing import checks
from unet.data.preparing.findings import FINDINGS, Findings
from unet.data.preparing.look import data_report
from unet.data.preparing.output import OutputFolder
from unet.data.preparing.pieces import (
    Piece,
    Recipe,
    ShardFile,
    cut,
    decode_piece,
    facts_schema,
    read_table,
    samples_of_a_piece,
    sha256_of,
    write_shard,
)
from unet.data.shards import Prepared
from unet.data.sources import Problem, Progress, Source
from unet.data.sources.find import check_source, open_source, version_of
from unet.errors import InputError, RunFailed, first_line
from unet.storage import Folder

SAMPLE_COLUMNS = (
    *("name", "split", "breed", "original_height", "original_width"),
    *("pixels", "ignored", "repairs", "mask_fit", "digest"),
)


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
    check_source(source, prepared_too=False)
    output = OutputFolder.of(target)
    version = version_of(source)
    wanted = asdict(recipe) | {"source": source, "source_version": version, "schema_version": SCHEMA_VERSION}
    wanted |= {"samples_of_a_piece": samples_of_a_piece(recipe.image_size), "facts": facts_schema(1).names}
    if output.target.exists(MANIFEST):
        return _existing(output, recipe, version, strict)
    with output.locked(progress):
        if output.target.exists(MANIFEST):  # another job was quicker
            return _existing(output, recipe, version, strict)
        with output.unfinished(wanted):
            try:
                preparation = _Preparation(source, output, recipe, version, progress)
                return preparation.run(strict, source_dir, cache)
            except ray.exceptions.RayError as error:
                cause = first_line(getattr(error, "cause", None) or error)
                raise RunFailed(f"Preparing the data failed: {cause}. The same command continues from here.") from error


def _existing(output: OutputFolder, recipe: Recipe, version: str, strict: bool) -> Manifest:
    """The manifest of a target that holds just what is wanted."""
    manifest = Prepared(output.target).manifest
    found = asdict(manifest)
    wanted = asdict(recipe) | {"source_version": version}
    if differing := [key for key in wanted if wanted[key] != found[key]]:
        words = ", ".join(f"{key} {found[key]} there, {wanted[key]} here" for key in differing)
        raise InputError(f"{output.target} holds other data ({words}): give another --output, or remove it.")
    if strict and manifest.left_out:
        raise _refused(Problem(**manifest.left_out[0]), manifest.kinds("left_out").total())
    output.clear()  # a kill may have come between the last step and this one
    return manifest


def _refused(first: Problem, count: int) -> InputError:
    words = f"{first.name}: {first.detail}" + (f", and {count - 1} more samples cannot be used" if count > 1 else "")
    return InputError(f"{words}. Leave --strict out to go on without them; the manifest will list them.")


@dataclass
class _Preparation:
    """One source on its way into one output folder."""

    source: str
    output: OutputFolder
    recipe: Recipe
    version: str
    progress: Progress

    def run(self, strict: bool, source_dir: Path | None, cache: Path | None) -> Manifest:
        source = open_source(self.source, self.recipe.val_fraction, self.output.raw, source_dir, cache, self.progress)
        facts = self._decode(source)
        if version_of(self.source) != self.version:
            raise InputError(f"{self.source} was changed while it was read: prepare it again.")
        _refuse_mixed(facts, source)
        kept, left_out, warnings = _check(facts, source, self.recipe.image_size)
        if not len(kept):
            first = left_out[0]
            raise InputError(f"None of the {len(left_out)} samples can be used. {first.name}: {first.detail}.")
        if strict and left_out:
            raise _refused(left_out[0], len(left_out))
        if "train" in checks.unlabelled_splits(kept):
            size = self.recipe.image_size
            raise InputError(f"No pixel of the train split has a label at {size} px: give a larger --image-size.")
        manifest = self._manifest(source, kept, left_out, warnings, self._write(kept))
        self.output.publish()
        return manifest

    def _decode(self, source: Source) -> pa.Table:
        """What is known of every sample, with `piece` and `row`: where its pixels are. Nothing is decoded twice."""
        work = self.output.work
        pieces = cut(source.samples, self.recipe.image_size)
        task, labels, recipe = ray.remote(num_cpus=1)(decode_piece), ray.put(source.labels), ray.put(self.recipe)
        missing = [piece for piece in pieces if not work.exists(piece.facts)]
        calls = ((task, piece, labels, recipe, work.uri) for piece in missing)
        total, done = len(source.samples), len(source.samples) - sum(len(p.samples) for p in missing)
        for index, _ in _each(calls):
            done += len(missing[index].samples)
            self.progress("preparing data", done, total)
        return pa.concat_tables(_placed(read_table(work, piece.facts), piece) for piece in pieces)

    def _write(self, kept: pa.Table) -> dict[str, str]:
        """The sha256 of each shard and of `samples.parquet`, once they are written."""
        work, target = self.output.work, self.output.shards
        shards = [shard for split in SPLITS for shard in _cut_files(kept, split, self.recipe.shards)]
        task, recipe = ray.remote(num_cpus=1)(write_shard), ray.put(self.recipe)
        digests: dict[str, str] = {}
        for index, digest in _each((task, shard, recipe, work.uri, target.uri) for shard in shards):
            digests[shards[index].file] = digest
            self.progress("writing shards", len(digests), len(shards))
        samples = kept.select(SAMPLE_COLUMNS)
        with (
            target.writing(SAMPLES) as stream,
            pq.ParquetWriter(stream, samples.schema, write_page_checksum=True) as writer,
        ):
            for split in SPLITS:
                if len(rows := _of_split(samples, split)):  # even no rows would make a row group
                    writer.write_table(rows, row_group_size=CHUNK)
        return dict(sorted((digests | {SAMPLES: sha256_of(target, SAMPLES)}).items()))

    def _manifest(
        self, source: Source, kept: pa.Table, left_out: list[Problem], warnings: list[Problem], sha256: dict[str, str]
    ) -> Manifest:
        """Write the manifest, last of all, and before it the page that shows the data."""
        shards, findings = self.output.shards, Findings.of(kept, source, left_out, warnings)
        if findings.write(shards):
            sha256 |= {FINDINGS: sha256_of(shards, FINDINGS)}
        counts = Counter(kept["split"].to_pylist())
        digests = dict(zip(kept["name"].to_pylist(), kept["digest"].to_pylist(), strict=True))
        manifest = Manifest(
            **asdict(self.recipe),
            classes=[c.name for c in source.labels.classes],
            colours=[list(c.colour) for c in source.labels.classes],
            counts={split: counts[split] for split in SPLITS},
            files={split: [file for file in sha256 if file.startswith(f"{split}-")] for split in SPLITS},
            sha256=sha256,
            data_digest=data_digest(digests),
            source=source.kind,
            source_version=self.version,
            **findings.entries(),
        )
        self.progress("drawing data_report.html", 0, 0)
        shards.write_text(REPORT, data_report(Prepared(shards, manifest)))
        manifest = replace(manifest, sha256=sha256 | {REPORT: sha256_of(shards, REPORT)})
        shards.write_text(MANIFEST, manifest.to_json())
        return manifest


def _refuse_mixed(facts: pa.Table, source: Source) -> None:
    """Refuse masks that were read in different ways, each in the only one that fits it: one of them fits by chance."""
    rows = zip(facts["name"].to_pylist(), facts["reading"].to_pylist(), strict=True)
    found = {reading: name for name, reading in rows if reading}
    if len(found) > 1:
        (first, name), (second, other) = sorted(found.items())[:2]
        where = source.labels.described_in
        remedy = f"write `masks: {first}` or `masks: {second}` in {where}" if where else "save all masks alike"
        raise InputError(
            f"Of the mask of {name} only the {WORDS[first]} fit the classes, of the mask of {other} only the "
            f"{WORDS[second]}: {remedy}."
        )


def _check(facts: pa.Table, source: Source, image_size: int) -> tuple[pa.Table, list[Problem], list[Problem]]:
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
    # The samples came by split and hash; what remains is the order of the splits.
    places = np.array([order[split] for split in kept["split"].to_pylist()])
    kept = kept.take(pa.array(np.argsort(places, kind="stable")))
    suspects = checks.suspects(kept, [c.name for c in source.labels.classes], image_size)
    return kept, left_out + across, [*source.warnings, *warnings, *suspects]


def _placed(facts: pa.Table, piece: Piece) -> pa.Table:
    facts = facts.append_column("piece", pa.array(np.full(len(facts), piece.number)))
    return facts.append_column("row", pa.array(np.arange(len(facts))))


def _cut_files(kept: pa.Table, split: str, shards: int) -> list[ShardFile]:
    """The split's samples in at most `shards` files of whole chunks."""
    rows = _of_split(kept, split)
    chunks = Counter(files_of_chunks(len(rows), shards))
    found, first = [], 0
    for file, count in sorted(chunks.items()):
        name = f"{split}-{file:05d}-of-{len(chunks):05d}.parquet"
        found.append(ShardFile(name, rows.slice(first * CHUNK, count * CHUNK)))
        first += count
    return found


def _of_split(samples: pa.Table, split: str) -> pa.Table:
    return samples.filter(pa.compute.equal(samples["split"], split))


def _each(calls: Iterator[tuple]) -> Iterator[tuple[int, Any]]:
    """(number of the call, its result) as the tasks end; a few more are started than there are CPUs."""
    ahead = int(2 * ray.cluster_resources().get("CPU", 1)) + 1
    running: dict[ray.ObjectRef, int] = {}
    for number, (task, *arguments) in enumerate(calls):
        running[task.remote(*arguments)] = number
        if len(running) >= ahead:
            yield _next(running)
    while running:
        yield _next(running)


def _next(running: dict[ray.ObjectRef, int]) -> tuple[int, Any]:
    (done,), _ = ray.wait(list(running))
    try:
        return running.pop(done), ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from error
        raise
