"""Turn raw pets, or your own photos and masks, into shards with a manifest; or verify such shards.

examples:
    python jobs/prepare.py --source FOLDER --output DIR --image-size 128
    python jobs/prepare.py --verify DIR
"""

import shlex
from typing import TYPE_CHECKING

from unet.commands import cli
from unet.config import DataSettings, PrepareSettings

if TYPE_CHECKING:
    from unet.terminal import Display


def run(settings: PrepareSettings) -> int:
    from unet.cluster.session import ray_session
    from unet.data.manifest import MANIFEST, REPORT
    from unet.data.preparing.pieces import Recipe
    from unet.data.preparing.prepare import prepare
    from unet.data.preparing.resolve import cache_of, kept_folder
    from unet.data.sources.find import check_source
    from unet.disk import at_the_door, check_writable
    from unet.runs.run import called
    from unet.storage import Folder
    from unet.terminal import Display

    part, display = settings.prepare, Display()
    if part.verify:
        return _verify(part.verify, display)
    recipe = Recipe(part.image_size, part.resize, part.val_fraction, part.shards, part.original_masks)
    storage = Folder(settings.store.storage_path)
    with at_the_door():
        check_source(part.source, prepared_too=False)
        folder = Folder(part.output) if part.output else kept_folder(part.source, recipe, storage)
        title = "Already prepared:" if folder.exists(MANIFEST) else "Prepared"
        if title == "Prepared":
            check_writable(folder, "--output" if part.output else "--storage-path")
    with ray_session(settings.command.debug), cli.work_is_kept(display):
        manifest = prepare(
            part.source, folder, recipe, part.strict, part.source_dir, cache_of(storage), display.working
        )
    display.problems(manifest)
    path = shlex.quote(folder.typed())
    flags = f" --image-size {manifest.image_size}" if manifest.image_size != DataSettings().image_size else ""
    flags += f" --resize {manifest.resize}" if manifest.resize != DataSettings().resize else ""
    rows = [
        ("splits", ", ".join(f"{split} {count:,}" for split, count in manifest.counts.items())),
        ("digest", manifest.data_digest),
        ("look", f"{folder}/{REPORT}"),
        ("train on it", f"{called('train')} --data {path}{flags}"),
        ("verify", f"{called('prepare')} --verify {path}"),
    ]
    display.table(f"{title} {folder}", rows)
    return cli.DONE


def _verify(folder: str, display: "Display") -> int:
    from unet.data.preparing.verify import verify
    from unet.storage import Folder

    try:
        damage = list(verify(Folder(folder), display.working))
    finally:
        display.close()
    for where, what in damage:
        display.say(f"{where}: {what}", "red")
    if damage:
        display.say(
            f"{folder} has changed since it was prepared ({len(damage)} findings): remove it, then prepare again."
        )
        return cli.FAILED
    display.say(f"{folder} is as it was prepared, byte for byte.")
    return cli.DONE


def main() -> None:
    cli.main(PrepareSettings, run, __doc__)
