"""Turn raw pets, or own photos and masks, into shards with a manifest; or verify such shards.

python jobs/prepare.py --source FOLDER --output DIR --image-size 128
python jobs/prepare.py --verify DIR
"""

from unet import cli
from unet.config import PrepareSettings


def run(settings: PrepareSettings) -> int | None:
    from unet.data.pieces import Recipe
    from unet.data.prepare import cache_of, kept_folder, prepare
    from unet.data.sources.find import check_source
    from unet.session import ray_session
    from unet.storage import Folder
    from unet.terminal import Display

    part, display = settings.prepare, Display()
    if part.verify:
        return verify(part.verify, display)
    check_source(part.source)
    recipe = Recipe(part.image_size, part.resize, part.val_fraction, part.shards, part.original_masks)
    storage = Folder(settings.store.storage_path)
    folder = Folder(part.output) if part.output else kept_folder(part.source, recipe, storage)
    with ray_session(settings.door.debug):
        try:
            manifest = prepare(
                part.source, folder, recipe, part.strict, part.source_dir, cache_of(storage), display.working
            )
        finally:
            display.close()
    display.problems(manifest)
    letterbox = " --resize letterbox" if manifest.resize == "letterbox" else ""
    size = f" --image-size {manifest.image_size}" if manifest.image_size != 128 else ""
    rows = [
        ("splits", ", ".join(f"{split} {count:,}" for split, count in manifest.counts.items())),
        ("digest", manifest.data_digest),
        ("look", f"{folder}/data_report.html"),
        ("train on it", f"python jobs/train.py --data {folder}{size}{letterbox}"),
        ("verify", f"python jobs/prepare.py --verify {folder}"),
    ]
    display.table(f"Prepared {folder}", rows)


def verify(folder: str, display) -> int:
    from unet.data.verify import verify
    from unet.storage import Folder

    try:
        damage = list(verify(Folder(folder), display.working))
    finally:
        display.close()
    for place, words in damage:
        display.say(f"{place}: {words}", "red")
    if damage:
        display.say(f"{folder} is not what was prepared ({len(damage)} findings): remove it and prepare it again.")
        return cli.FAILED
    display.say(f"{folder} is as it was prepared, byte for byte.")
    return cli.DONE


if __name__ == "__main__":
    cli.main(PrepareSettings, run, __doc__)
