"""The official archives of Oxford-IIIT Pet, packed or extracted.

`images/NAME.jpg`, `annotations/trimaps/NAME.png`, and `annotations/{trainval,test}.txt` whose lines begin with NAME.
"""

import tarfile
from pathlib import Path

from unet.data.sources import Problem, Progress, Sample, Source, canonical, is_plain, printable, split_of
from unet.data.sources.lists import listed, refuse_unmatched
from unet.errors import InputError

ARCHIVES = ("images.tar.gz", "annotations.tar.gz")
FOLDERS = ("images", "annotations")


def is_archive_folder(folder: Path) -> bool:
    """Whether a folder looks like the official layout, packed or extracted."""
    return all((folder / a).exists() or (folder / f).is_dir() for a, f in zip(ARCHIVES, FOLDERS, strict=True))


def extract(folder: Path, target: Path, progress: Progress) -> Path:
    """Unpack what is packed into `target`, once; give the folder that holds `images/` and `annotations/`.

    Raises:
        InputError: an archive is damaged, or holds an entry that would leave the target (absolute, `..`), a link or a
            device.
    """
    if all((folder / f).is_dir() for f in FOLDERS):
        return folder
    target.mkdir(parents=True, exist_ok=True)
    for name, archive in zip(FOLDERS, ARCHIVES, strict=True):
        if (target / name).exists():
            continue
        if (folder / name).is_dir():
            (target / name).symlink_to((folder / name).resolve())
            continue
        _unpack(folder / archive, name, target, progress)
    return target


def _unpack(archive: Path, name: str, target: Path, progress: Progress) -> None:
    """The archive's folder `name` below `target`: whole, or not there."""
    unfinished, size, shown = target / f"{name}.unpacking", archive.stat().st_size >> 20, 0
    try:
        with open(archive, "rb") as file, tarfile.open(fileobj=file) as tar:
            for entry in tar:
                # Where a link leads is not known before it is followed.
                if entry.name.startswith("/") or not (entry.isreg() or entry.isdir()):
                    raise ValueError(f"{entry.name} is not a file or folder below it")
                tar.extract(entry, unfinished, filter="data")
                if file.tell() >> 20 > shown:
                    shown = file.tell() >> 20
                    progress(f"unpacking {archive.name}, MB", shown, size)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise InputError(f"Cannot unpack {archive}: {error}. Fetch the archive again.") from error
    if not (unfinished / name).is_dir():
        raise InputError(f"{archive} holds no folder {name}/: it is not the official archive.")
    (unfinished / name).rename(target / name)


def archives(folder: Path, val_fraction: float) -> Source:
    """The samples that the official lists name, from an extracted folder.

    Raises:
        InputError: a list is missing, cannot be read, or names no sample.
    """
    source = Source("archives", [])
    seen: dict[str, str] = {}
    for official in ("trainval", "test"):
        listing = folder / "annotations" / f"{official}.txt"
        if not listing.is_file():
            raise InputError(f"{listing} is missing: the folder does not have the layout of the official archives.")
        lines, before = listed(listing), len(seen)
        for _, line in lines:
            name = line.split()[0]
            split = split_of(name, official, val_fraction)
            if problem := _problem(folder, name, seen):
                source.left_out.append(Problem(printable(name), *problem, split=split))
                continue
            seen[name] = official
            image, mask = _paths(folder, name)
            source.samples.append(Sample(name, split, name.rpartition("_")[0], str(image), str(mask)))
        if lines and len(seen) == before:
            refuse_unmatched(listing, lines, [path.stem for path in (folder / "images").glob("*.jpg")], "images/")
    if not seen:
        raise InputError(f"The lists in {folder / 'annotations'} name no samples.")
    source.samples = canonical(source.samples)
    known = seen.keys() | {problem.name for problem in source.left_out}
    source.warnings += [
        Problem(printable(path.stem), "in_no_split", f"{printable(path.name)} is not in any list")
        for path in sorted((folder / "images").glob("*.jpg"))
        if path.stem not in known
    ]
    return source


def species_of(breed: str) -> str:
    """cat or dog: names of cats begin with a capital letter, those of dogs do not (the README of the annotations)."""
    return ("cat" if breed[0].isupper() else "dog") if breed else ""


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / "images" / f"{name}.jpg", folder / "annotations" / "trimaps" / f"{name}.png"


def _problem(folder: Path, name: str, seen: dict[str, str]) -> tuple[str, str] | None:
    """Why a listed name cannot be a sample: a short name and a description."""
    if not is_plain(name) or "/" in name:
        return "unsafe_name", f"the list names {printable(name)}, which is not a plain file name"
    if name in seen:
        return "listed_twice", f"listed twice, first in {seen[name]}"
    image, mask = _paths(folder, name)
    if not image.exists():
        return "missing_image", f"images/{image.name} is missing"
    if not mask.exists():
        return "missing_mask", f"annotations/trimaps/{mask.name} is missing"
    return None
