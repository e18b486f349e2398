"""Where raw samples come from: the official archives (packed or extracted) or pets drawn by the program.

A source lists its samples; loading one gives its photo and mask at the size of the network. Decoding is here
and nowhere else, so that every way in gives the same pixels.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from unet.classes import IGNORE, PETS
from unet.data import synthetic
from unet.data.shards import is_validation, name_hash
from unet.errors import InputError

ARCHIVES = ("images.tar.gz", "annotations.tar.gz")
SYNTHETIC_TRAINVAL, SYNTHETIC_TEST = 1600, 400

_TRIMAP_TABLE = np.full(256, IGNORE, np.uint8)
_TRIMAP_TABLE[list(PETS.values)] = list(PETS.values.values())


@dataclass(frozen=True)
class Sample:
    """A sample before it is decoded. `image` and `mask` are paths, empty for a drawn one; `index` is its drawing's."""

    name: str
    split: str
    breed: str
    image: str = ""
    mask: str = ""
    index: int = -1


@dataclass(frozen=True)
class Decoded:
    """A sample at the network's size: image uint8 (S, S, 3), mask uint8 (S, S) of class ids, and its original size."""

    image: np.ndarray
    mask: np.ndarray
    original_height: int
    original_width: int


def synthetic_samples(val_fraction: float) -> list[Sample]:
    """The drawn pets, whatever the machine: 1,600 of trainval and 400 of test."""
    samples = []
    for index in range(SYNTHETIC_TRAINVAL + SYNTHETIC_TEST):
        name = f"synthetic_{index:05d}"
        official = "trainval" if index < SYNTHETIC_TRAINVAL else "test"
        samples.append(Sample(name, _split(name, official, val_fraction), synthetic.species_of(index), index=index))
    return canonical(samples)


def is_archive_folder(folder: Path) -> bool:
    """Whether a folder looks like the official layout, packed or extracted."""
    return all((folder / a).exists() or (folder / a.split(".")[0]).is_dir() for a in ARCHIVES)


def extract(folder: Path, target: Path) -> Path:
    """Unpack what is packed into `target`; give the folder that holds `images/` and `annotations/`.

    Members that would leave the target (absolute, `..`, links outward, devices) are refused.
    """
    if all((folder / a.split(".")[0]).is_dir() for a in ARCHIVES):
        return folder
    for archive in ARCHIVES:
        extracted = folder / archive.split(".")[0]
        if extracted.is_dir():
            (target / extracted.name).symlink_to(extracted.resolve())
            continue
        try:
            with tarfile.open(folder / archive) as tar:
                tar.extractall(target, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise InputError(f"Cannot unpack {folder / archive}: {error}. Fetch the archive again.") from error
    return target


def archive_samples(folder: Path, val_fraction: float) -> list[Sample]:
    """The samples that the official lists name, from an extracted folder."""
    annotations = folder / "annotations"
    samples = []
    for official in ("trainval", "test"):
        listing = annotations / f"{official}.txt"
        if not listing.is_file():
            raise InputError(f"{listing} is missing: the folder is not in the layout of the official archives.")
        for line in listing.read_text().splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            name = line.split()[0]
            if Path(name).name != name or "\0" in name:
                raise InputError(f"{listing} names {name!r}, which is not a plain file name.")
            image, mask = folder / "images" / f"{name}.jpg", annotations / "trimaps" / f"{name}.png"
            for path in (image, mask):
                if not path.is_file():
                    raise InputError(f"{listing} names {name}, but {path} is missing.")
            split = _split(name, official, val_fraction)
            samples.append(Sample(name, split, name.rpartition("_")[0], str(image), str(mask)))
    if not samples:
        raise InputError(f"The lists in {annotations} name no sample.")
    names = [s.name for s in samples]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InputError(f"The lists in {annotations} name {twice} twice.")
    return canonical(samples)


def canonical(samples: list[Sample]) -> list[Sample]:
    """By split, then by hash of name: the order in which samples are written."""
    return sorted(samples, key=lambda s: (s.split, name_hash(s.name), s.name))


def load(sample: Sample, image_size: int) -> Decoded:
    """Decode and resize a sample: the photo antialiased (Pillow's bilinear), the mask by nearest neighbour.

    Raises:
        InputError: a picture cannot be read, the sizes differ, or the mask holds an unknown label.
    """
    if sample.index >= 0:
        return Decoded(*synthetic.draw_pet(sample.index, image_size), image_size, image_size)
    photo = _open(sample.image).convert("RGB")
    trimap = _open(sample.mask)
    if photo.size != trimap.size:
        raise InputError(
            f"{sample.name}: the mask is {trimap.size[0]}x{trimap.size[1]}, its photo "
            f"{photo.size[0]}x{photo.size[1]}. Both must have one size."
        )
    labels = np.asarray(trimap)
    mask = _TRIMAP_TABLE[labels] if labels.ndim == 2 and labels.dtype == np.uint8 else None
    if mask is None or (mask == IGNORE).any():
        found = f"label {labels[mask == IGNORE].flat[0]}" if mask is not None else f"{trimap.mode} pixels"
        raise InputError(f"{sample.name}: the mask holds {found}; known are 1 (pet), 2 (background), 3 (outline).")
    size = (image_size, image_size)
    return Decoded(
        np.asarray(photo.resize(size, Image.Resampling.BILINEAR)),
        np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)),
        photo.size[1],
        photo.size[0],
    )


def _open(path: str) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"Cannot read the picture {path}: {error}.") from error
    return image


def _split(name: str, official: str, val_fraction: float) -> str:
    if official == "test":
        return "test"
    return "val" if is_validation(name, val_fraction) else "train"
