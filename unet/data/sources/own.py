"""Your own photos and masks: `images/` and `masks/`, matched by name, and a `dataset.yaml` that says what masks mean.

Splits may be given by lists beside it, one photo per line: `trainval.txt` and `test.txt`, `train.txt` and `test.txt`
(val comes out of the first by hash of name), or `train.txt`, `val.txt` and `test.txt`; or by folders with these names.
"""

import unicodedata
from collections import defaultdict
from pathlib import Path

from unet.data.pictures import open_picture
from unet.data.sources import (
    SUFFIXES,
    Problem,
    Sample,
    Source,
    canonical,
    files_below,
    hash_fraction,
    is_plain,
    printable,
    split_of,
)
from unet.data.sources.description import DESCRIPTION, describe
from unet.data.sources.lists import LISTS, splits_by_folders, splits_by_lists
from unet.errors import InputError

FOLDERS = ("images", "masks")
FILES = (*FOLDERS, DESCRIPTION, *(f"{name}.txt" for name in LISTS))


def is_own_folder(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in FOLDERS)


def own(folder: Path, val_fraction: float) -> Source:
    """The samples of such a folder. A name is the photo's path below `images/` without its suffix; its folder is taken
    for its breed.

    Raises:
        InputError: `dataset.yaml` does not fit, or no photo has a mask.
    """
    description = describe(folder)
    source = Source("folder", [], description.labels(str(folder / DESCRIPTION)))
    photos = _by_name(folder / "images", source)
    masks = _by_name(folder / "masks", source, description.mask_suffix)
    if not photos.keys() & masks.keys():
        raise InputError(_no_pair(folder, photos, masks))
    splits, depth = _splits(folder, source, photos, masks, description.test_fraction, val_fraction)
    for name, split in splits.items():
        if missing := [part for part, found in zip(FOLDERS, (photos, masks), strict=True) if name not in found]:
            kind = "missing_image" if missing[0] == "images" else "missing_mask"
            source.left_out.append(Problem(name, kind, f"{missing[0]}/ holds no picture with this name", split))
        elif len(photos[name]) == len(masks[name]) == 1:  # else it was left out as ambiguous
            paths = str(photos[name][0]), str(masks[name][0])
            source.samples.append(Sample(name, split, "/".join(name.split("/")[depth:-1]), *paths))
    source.warnings += [Problem(n, "in_no_split", "not in any list") for n in sorted(photos.keys() - splits.keys())]
    source.left_out += [
        Problem(name, "missing_image", "masks/ holds a picture with this name, images/ does not")
        for name in sorted(masks.keys() - photos.keys() - splits.keys())
    ]
    if not source.samples:
        first = source.left_out[0]
        raise InputError(f"No sample of {folder} can be used. {first.name}: {first.detail}.")
    source.samples = canonical(source.samples)
    source.labels = description.labels(str(folder / DESCRIPTION), _palette(source.samples[0].mask))
    return source


def _palette(mask: str) -> dict[int, tuple[int, int, int]]:
    """The colours of a mask's palette, by their indices; none where it has none, or cannot be read."""
    try:
        image = open_picture(mask).image
    except Exception:  # whatever its damaged bytes lead Pillow to: the preparation finds it again, and says so
        return {}
    channels = (image.getpalette("RGB") or []) if image.mode == "P" else []
    return dict(enumerate(zip(channels[::3], channels[1::3], channels[2::3], strict=True)))


def _no_pair(folder: Path, photos: dict[str, list[Path]], masks: dict[str, list[Path]]) -> str:
    words = f"No photo in {folder / 'images'} has a mask of the same name in {folder / 'masks'}"
    if not photos or not masks:
        return f"{words}: {'images' if not photos else 'masks'}/ holds no picture that can be read."
    photo, mask = min(photos), min(masks)
    endings = {name.removeprefix(photo) for name in masks if name.startswith(photo)}
    for ending in sorted(ending for ending in endings if any(f"{name}{ending}" in masks for name in photos)):
        remedy = f"write `mask_suffix: {ending}` in {folder / DESCRIPTION}"
        return f"{words}, but `{photo}{ending}` is there: {remedy}."
    return f"{words}: the first photo is `{photo}`, the first mask `{mask}`; give them the same names."


def _by_name(folder: Path, source: Source, ending: str = "") -> dict[str, list[Path]]:
    """The pictures below a folder by name, without the given ending; what cannot be one is left out."""
    found = defaultdict(list)
    for path in files_below(folder):
        name = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
        if path.suffix.lower() not in SUFFIXES:
            words = f"{folder.name}/ holds {printable(path.name)}, which is not a picture that can be read"
            source.left_out.append(Problem(printable(name), "unknown_format", words))
        elif not is_plain(name):
            source.left_out.append(Problem(printable(name), "unsafe_name", f"a name in {folder.name}/ cannot be shown"))
        else:
            found[name.removesuffix(ending)].append(path)
    for name, paths in found.items():
        if len(paths) > 1:
            files = " and ".join(printable(path.name) for path in paths)
            source.left_out.append(Problem(name, "ambiguous", f"{folder.name}/ holds {files}"))
    return found


def _splits(
    folder: Path, source: Source, photos, masks, test_fraction: float, val_fraction: float
) -> tuple[dict[str, str], int]:
    """The split of each name, by lists or folders, else by hash of the name; how many of its folders name the split."""
    if by_lists := splits_by_lists(folder, photos.keys() | masks.keys(), FOLDERS, val_fraction):
        source.left_out += by_lists[1]
        return by_lists[0], 0
    if by_folders := splits_by_folders(photos.keys(), val_fraction):
        return by_folders, 1
    drawn = {name: "test" if hash_fraction(f"test/{name}") < test_fraction else "trainval" for name in photos}
    splits = {name: split_of(name, official, val_fraction) for name, official in drawn.items()}
    pairs = sorted((name for name in photos.keys() & masks.keys() if splits[name] != "test"), key=hash_fraction)
    if len(pairs) > 1 and splits[pairs[0]] == "train":  # of a few photos the hash may leave val none
        splits[pairs[0]] = "val"
    return splits, 0
