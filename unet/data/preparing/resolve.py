"""Which prepared folder a source means: the one that it is, or the one that the storage path keeps of it."""

import hashlib
from pathlib import Path

from unet.config import Resize, is_source_name
from unet.data.manifest import MANIFEST, SCHEMA_VERSION
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.shards import Prepared
from unet.data.sources import Progress
from unet.data.sources.find import TFDS, version_of
from unet.errors import InputError
from unet.storage import Folder


def resolve(data: str, image_size: int, resize: Resize, storage: Folder, progress: Progress) -> Prepared:
    """The prepared folder that `--data` means; any other source is prepared on first use and kept.

    Raises:
        InputError: there are no data, or they cannot be used.
    """
    if "://" in data or (Path(data) / MANIFEST).is_file():
        prepared = Prepared(Folder(data if "://" in data else Path(data).resolve()))
        manifest = prepared.manifest
        for flag, wanted, found in (
            ("image-size", image_size, manifest.image_size),
            ("resize", resize, manifest.resize),
        ):
            if wanted != found:
                how = f"at {found} px" if flag == "image-size" else f"with --resize {found}"
                raise InputError(
                    f"{data} was prepared {how}: give --{flag} {found}, or prepare it again with --{flag} {wanted}."
                )
        return prepared
    recipe = Recipe(image_size, resize)
    target = kept_folder(data, recipe, storage)
    if not target.exists(MANIFEST):
        prepare(data, target, recipe, cache=cache_of(storage), progress=progress)
    return Prepared(target)


def kept_folder(source: str, recipe: Recipe, storage: Folder) -> Folder:
    """Where the storage path keeps the data prepared from a source."""
    name = f"{source.replace(':', '-')}-{recipe.image_size}px"
    if not is_source_name(source):
        folder = Path(source).resolve()
        key = hashlib.sha256(f"{folder}|{version_of(source)}".encode()).hexdigest()[:8]
        name = f"{folder.name}-{recipe.image_size}px-{key}"
    letterbox = "-letterbox" if recipe.resize == "letterbox" else ""
    val = f"-val{recipe.val_fraction:g}" if recipe.val_fraction != Recipe.val_fraction else ""
    return storage / "data" / f"{name}{letterbox}{val}-v{SCHEMA_VERSION}"


def cache_of(storage: Folder) -> Path | None:
    """Where downloads are kept; None if the storage is not a local disk."""
    return Path(storage.path) / "data" / TFDS if storage.is_local else None
