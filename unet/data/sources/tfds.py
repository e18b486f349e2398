"""The pets through TensorFlow Datasets: what its `oxford_iiit_pet` builder keeps, written back in the official layout.

So the project's one decoder serves every source. The bytes are those of the archives, except for the few photos that
the builder re-encodes. TensorFlow is loaded by `export` and stays loaded; `export_in_task` gives it its own process.
"""

import contextlib
import fcntl
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unet.errors import InputError

LISTS = {"train": "trainval", "test": "test"}
"""Splits of the builder and the official lists they are made from."""
TIMEOUT = 10
"""Seconds that the archives' host may take to answer."""
NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""What `requests` reads of the environment; processes of a running cluster have that of its start."""

Progress = Callable[[int, int], None]
"""Called with (samples written, samples in all)."""


@dataclass(frozen=True)
class Exported:
    """The version of the builder, and the samples among the exported whose photos it re-encodes."""

    version: str
    reencoded: tuple[str, ...]


def export(
    target: Path,
    cache: Path,
    source_dir: Path | None = None,
    builder_class=None,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Build the data set under `cache`, unless it is there, and write it to the new folder `target`.

    Args:
        target: appears whole, or not at all: `images/` and `annotations/` as the official archives hold them.
        cache: keeps what is downloaded and built.
        source_dir: holds the official archives; nothing is downloaded then.
        builder_class: a builder with other checksums, for tests.
        progress: called while samples are written.

    Raises:
        InputError: the archives cannot be downloaded, are not the official ones, or the disk is full.
    """
    return _follow(_export(target, cache, source_dir, builder_class), progress)


def export_in_task(
    target: Path, cache: Path, source_dir: Path | None = None, progress: Progress = lambda done, total: None
) -> Exported:
    """`export` in a process of Ray on this machine, which ends with it.

    Raises:
        InputError: as `export`.
    """
    network = {name: value for name, value in os.environ.items() if name.upper() in NETWORK}
    task = ray.remote(  # type: ignore[call-overload]  # its types know no strategy that names a node
        num_cpus=0,  # never waits for CPUs of the one node on which the paths surely mean the same
        max_calls=1,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
        runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": "-1", **network}},
    )(_export)
    steps = task.remote(target.absolute(), cache.absolute(), source_dir and source_dir.absolute(), None)
    try:
        return _follow(map(ray.get, steps), progress)
    except InputError as error:
        # Ray's own subclass, whose text is the traceback of the task.
        raise InputError(str(getattr(error, "cause", error))) from None


def _follow(steps: Iterable, progress: Progress) -> Exported:
    for step in steps:
        if isinstance(step, Exported):
            exported = step
        else:
            progress(*step)
    return exported


def _export(target: Path, cache: Path, source_dir: Path | None, builder_class) -> Iterator[tuple[int, int] | Exported]:
    """The steps of `export`: its progress, then its result."""
    from tensorflow_datasets.datasets.oxford_iiit_pet import oxford_iiit_pet_dataset_builder as official

    if target.exists():
        raise InputError(f"{target} already exists: give another folder, or remove it.")
    builder_class = builder_class or official.Builder
    try:
        builder = _build(builder_class, cache, source_dir)
        names = yield from _write(builder, target)
    except Exception as error:
        sentence = _sentence(error, builder_class.url_infos, cache, source_dir)
        if sentence is None:
            raise
        raise InputError(sentence) from error
    yield Exported(str(builder.version), tuple(sorted(names.intersection(official._CORRUPT_SAMPLES))))


def _build(builder_class, cache: Path, source_dir: Path | None):
    """The builder of the prepared data set. One at a time: the folders for downloads and extraction are shared."""
    from tensorflow_datasets import download

    names = [info.filename for info in builder_class.url_infos.values()]
    missing = [name for name in names if source_dir and not (source_dir / name).is_file()]
    if missing:
        raise InputError(f"{source_dir} lacks {' and '.join(missing)}: put {' and '.join(names)} there.")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder, downloads, extracted = builder_class(data_dir=cache), cache / "downloads", cache / "extracted"
        if builder.data_path.exists():
            return builder
        if not source_dir:
            _check_host(builder.url_infos, downloads)
        config = download.DownloadConfig(
            manual_dir=source_dir, extract_dir=extracted, try_download_gcs=False, force_checksums_validation=True
        )
        shutil.rmtree(extracted, ignore_errors=True)  # an extraction would be reused by its name, whatever it holds
        try:
            with _quiet():
                builder.download_and_prepare(download_dir=downloads, download_config=config)
        finally:
            for left in (extracted, *downloads.rglob("*.tmp.*"), *cache.glob(f"{builder.name}/*incomplete*")):
                shutil.rmtree(left, ignore_errors=True)
    return builder


def _write(builder, target: Path) -> Generator[tuple[int, int], None, set[str]]:
    """Write all records; the progress is yielded, the names are returned."""
    import tensorflow_datasets

    skip = tensorflow_datasets.decode.SkipDecoding()
    names: set[str] = set()
    total = sum(builder.info.splits[split].num_examples for split in LISTS)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=target.parent) as scratch:
        folder = Path(scratch) / "pets"
        images, trimaps = folder / "images", folder / "annotations" / "trimaps"
        images.mkdir(parents=True)
        trimaps.mkdir(parents=True)
        for split, listing in LISTS.items():
            lines = []
            records = builder.as_dataset(split=split, decoders={"image": skip, "segmentation_mask": skip})
            for record in tensorflow_datasets.as_numpy(records):
                name = record["file_name"].decode().removesuffix(".jpg")
                (images / f"{name}.jpg").write_bytes(record["image"])
                (trimaps / f"{name}.png").write_bytes(record["segmentation_mask"])
                lines.append(f"{name} {record['label'] + 1} {record['species'] + 1} 1\n")  # the breed's id is not kept
                names.add(name)
                if len(names) % 64 == 0 or len(names) == total:
                    yield len(names), total
            (folder / "annotations" / f"{listing}.txt").write_text("".join(sorted(lines)), "utf-8")
        folder.rename(target)
    return names


def _check_host(url_infos, downloads: Path) -> None:
    """Ask once for each archive not downloaded yet: TensorFlow Datasets would try for minutes, without a timeout."""
    import requests
    from tensorflow_datasets.core.download.resource import get_dl_fname

    for url, info in url_infos.items():
        if not any(downloads.rglob(get_dl_fname(url, info.checksum))):
            with requests.get(url, stream=True, timeout=TIMEOUT) as response:
                response.raise_for_status()


@contextlib.contextmanager
def _quiet():
    """Without the bars, warnings and announcements of TensorFlow Datasets."""
    import tensorflow_datasets

    tensorflow_datasets.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _sentence(error: Exception, url_infos, cache: Path, source_dir: Path | None) -> str | None:
    """What happened and what to do, if the user can remedy it."""
    import requests
    from tensorflow_datasets import download
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.extractor import ExtractError

    text, origin = " ".join(str(error).split()), source_dir or cache / "downloads"
    names = " and ".join(info.filename for info in url_infos.values())
    by_hand = f"put {names} into a folder and give --source-dir FOLDER, or use --source synthetic"
    if "No space left" in text or "Not enough disk space" in text:  # of several types, partly RuntimeError
        return f"No space left under {cache} or for the export: make room for about 4 GB."
    if isinstance(error, NonMatchingChecksumError):
        wrong = next(info.filename for url, info in url_infos.items() if url in text)
        remedy = f"fetch {wrong} again" if source_dir else f"start again, or {by_hand}"
        return f"{wrong} of {origin} is truncated or not the official archive (its SHA-256 differs): {remedy}."
    if isinstance(error, requests.RequestException | download.DownloadError):
        found = re.search(
            r"\[Errno -?\d+\] [^\"')]+|Tunnel connection failed: [^\"')]+|HTTP code: \d+|^\d{3} [^:]+", text
        )
        reason = f"{type(error).__name__}: {found[0] if found else text}"
        host = urlsplit(next(iter(url_infos))).hostname
        return f"Cannot download from {host} ({reason}): set HTTPS_PROXY if there is a proxy, or {by_hand}."
    if isinstance(error, ExtractError | OSError) or type(error).__module__.startswith("tensorflow."):
        return f"TensorFlow Datasets cannot build from {origin}: {text}"
    return None
