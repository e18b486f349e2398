"""Which source a name or folder means."""

import shutil
from importlib.metadata import version
from pathlib import Path

from unet.config import SOURCES
from unet.data.manifest import MANIFEST
from unet.data.sources import Progress, Source, fingerprint, tfds
from unet.data.sources.archives import ARCHIVES, FOLDERS, archives, extract, is_archive_folder
from unet.data.sources.description import DESCRIPTION, describe
from unet.data.sources.drawn import count_of, drawn, is_drawn
from unet.data.sources.own import FILES, is_own_folder, own
from unet.data.sources.own import FOLDERS as OWN
from unet.errors import InputError
from unet.storage import Folder

TFDS = "oxford_iiit_pet"
RULES = "r3"
"""How your own masks and lists are read; what was prepared by other rules is prepared again."""
PHOTOS_OF_VOC, MASKS_OF_VOC = "JPEGImages", ("SegmentationClassPNG", "SegmentationClass")
"""The folders of Pascal VOC; where LabelMe has written both of masks, the second holds arrays."""
OUTLINES = (".json", ".xml")
"""How files of labelling tools end that hold polygons in the place of masks."""


def kind_of(folder: Path) -> str | None:
    """`folder` for own photos and masks, `archives` for the official layout, None for neither."""
    if is_own_folder(folder) and ((folder / DESCRIPTION).exists() or not is_archive_folder(folder)):
        return "folder"
    return "archives" if is_archive_folder(folder) else None


def check_source(source: str, prepared_too: bool = True) -> None:
    """Refuse a `--data` (or, not `prepared_too`, a `--source`) that names nothing usable, before anything starts.

    Raises:
        InputError: with what to give instead.
    """
    folder = Path(source)
    if is_drawn(source):
        count_of(source)
        return
    is_prepared = "://" in source or (folder / MANIFEST).is_file()
    if "://" in source:
        Folder(source)  # refuses what is not a storage
    if source == TFDS or (is_prepared and prepared_too):
        return
    known = (
        "a folder with images.tar.gz and annotations.tar.gz, a folder with images/, masks/ and dataset.yaml, or a "
        f"name: {' or '.join(SOURCES)}."
    )
    known = f"Give a prepared folder, {known}" if prepared_too else f"Give {known}"
    if is_prepared:
        raise InputError(f"{source} is not a source of raw pictures. {known}")
    if not folder.exists():
        raise InputError(f"There is no data at {source}. {known}")
    if not folder.is_dir() or not any(folder.iterdir()):
        raise InputError(f"{source} is not a folder with data in it. {known}")
    kind = kind_of(folder)
    if kind is None:
        held = _held(folder) or "holds neither prepared data nor pictures in a known layout."
        raise InputError(f"{source} {held} {known}")
    if kind == "folder":
        describe(folder)


def _held(folder: Path) -> str | None:
    """What a folder holds in the place of photos and masks, and what to do; None where nobody knows."""
    there = {path.name for path in folder.iterdir() if path.is_dir()}
    if masks := next((name for name in MASKS_OF_VOC if name in there), None):
        photos = f"{PHOTOS_OF_VOC}/" if PHOTOS_OF_VOC in there else "the folder with its photos"
        return (
            f"is laid out as Pascal VOC: rename {photos} to images/ and {masks}/ to masks/, and write {DESCRIPTION} "
            "beside them."
        )
    parts = [part for part in OWN if part in there]
    if len(parts) == 1:
        return f"holds {parts[0]}/, but no {next(part for part in OWN if part not in parts)}/."
    if any(path.suffix in OUTLINES for pattern in ("*", "*/*") for path in folder.glob(pattern)):
        return "holds outlines in JSON or XML, which are not read: have the labelling tool write masks, a PNG a photo."
    return None


def version_of(source: str) -> str:
    """What identifies a source's content, cheaply: of files, their names, sizes and times."""
    if is_drawn(source):
        return f"{count_of(source)}-drawn-v1"
    if source == TFDS:
        return f"tensorflow-datasets {version('tensorflow-datasets')}"
    folder = Path(source)
    if kind_of(folder) == "folder":
        return f"{fingerprint(folder, FILES)}-{RULES}"
    return fingerprint(folder, (*ARCHIVES, *FOLDERS))


def open_source(
    source: str, val_fraction: float, raw: Path, source_dir: Path | None, cache: Path | None, progress: Progress
) -> Source:
    """The samples of a source; what has to be unpacked or downloaded for it is put under `raw`."""
    if is_drawn(source):
        return drawn(source, val_fraction)
    if source == TFDS:
        return _through_tfds(val_fraction, raw, source_dir, cache or raw / "cache", progress)
    folder = Path(source).resolve()
    if kind_of(folder) == "folder":
        return own(folder, val_fraction)
    return archives(extract(folder, raw, progress), val_fraction)


def _through_tfds(val_fraction: float, raw: Path, source_dir: Path | None, cache: Path, progress: Progress) -> Source:
    what = "reads the archives" if source_dir else "builds the data set (once: downloads 800 MB)"
    progress(f"TensorFlow Datasets {what}", 0, 0)
    pets = raw / "pets"
    shutil.rmtree(pets, ignore_errors=True)  # of a killed start; only a new export says what was re-encoded
    exported = tfds.export_in_task(pets, cache, source_dir, lambda done, total: progress("exporting", done, total))
    source = archives(pets, val_fraction)
    source.kind = TFDS
    source.repairs = dict.fromkeys(exported.reencoded, "re-encoded by TensorFlow Datasets")
    return source
