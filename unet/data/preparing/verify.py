"""Whether prepared data are still what was prepared: every byte is read again."""

from collections.abc import Iterator
from itertools import zip_longest

import pyarrow as pa

from unet.data.manifest import MANIFEST, SAMPLES, SPLITS, Manifest, data_digest, files_of_chunks
from unet.data.plain import open_parquet
from unet.data.preparing.pieces import sha256_of
from unet.data.shards import Prepared
from unet.data.sources import Progress
from unet.errors import InputError, first_line
from unet.storage import Folder

MISSING = "is missing"
Damage = tuple[str, str]
"""(file, or file and sample; what is wrong with it)."""


def verify(folder: Folder, progress: Progress) -> Iterator[Damage]:
    """What differs from the manifest: files that are missing, added or changed, and the samples they touch.

    Raises:
        InputError: there is no manifest.
    """
    if not folder.exists(MANIFEST):
        raise InputError(f"{folder} holds no {MANIFEST}: it was not prepared, or not completely. Prepare it first.")
    try:
        manifest = Manifest.from_json(folder.read_text(MANIFEST))
    except (ValueError, TypeError, KeyError) as error:
        yield MANIFEST, f"is damaged: {first_line(error)}"
        return
    for file in sorted(set(folder.names()) - manifest.sha256.keys() - {MANIFEST}):
        yield file, "is not in the manifest"
    changed = {}
    for done, (file, sha256) in enumerate(manifest.sha256.items(), 1):
        try:
            if not folder.exists(file):
                changed[file] = MISSING
            elif sha256_of(folder, file) != sha256:
                changed[file] = "has changed: its SHA-256 differs"
        except OSError as error:
            changed[file] = f"cannot be read: {first_line(error)}"
        progress("reading files", done, len(manifest.sha256))
    yield from changed.items()
    if SAMPLES not in changed:
        yield from _samples(Prepared(folder, manifest), changed, progress)


def _samples(prepared: Prepared, changed: dict[str, str], progress: Progress) -> Iterator[Damage]:
    """The samples whose pixels are not those of their digest."""
    manifest, seen = prepared.manifest, 0
    found: dict[str, bytes] = {}
    for split in SPLITS:
        files = manifest.files[split]
        owners = [files[file] for file in files_of_chunks(manifest.counts[split], manifest.shards)]
        for chunk, file in enumerate(owners):
            expected = prepared.known(split, chunk)
            group, seen = chunk - owners.index(file), seen + len(expected)
            try:
                rows = prepared.digests(split, _row_group(prepared, file, group))
            except (OSError, ValueError, KeyError) as error:
                if changed.get(file) != MISSING:
                    yield file, f"its samples {expected[0][0]} to {expected[-1][0]} cannot be read: {first_line(error)}"
                continue
            for before, now in zip_longest(expected, rows, fillvalue=("beyond the last", b"")):
                if before != now:
                    yield file, f"sample {before[0]} has changed: its digest differs"
            found |= dict(rows)
            progress("comparing samples", seen, sum(manifest.counts.values()))
    if not changed and data_digest(found) != manifest.data_digest:
        yield MANIFEST, "its data_digest is not that of the samples"


def _row_group(prepared: Prepared, file: str, group: int) -> pa.Table:
    # Without the pages' checksums, which would only show that something in 256 samples is wrong.
    with prepared.folder.fs.open_input_file(prepared.folder.at(file)) as stream:
        return open_parquet(stream).read_row_group(group, columns=["name", "image", "mask"]).combine_chunks()
