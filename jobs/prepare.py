"""Turn raw pets into shards with a manifest.

python jobs/prepare.py --source FOLDER_WITH_ARCHIVES --output DIR --image-size 128
"""

from unet import cli
from unet.config import PrepareSettings


def run(settings: PrepareSettings) -> None:
    from unet.data.prepare import check_source, kept_folder, prepare
    from unet.session import ray_session
    from unet.storage import Folder
    from unet.terminal import Display

    part = settings.prepare
    check_source(part.source)
    with ray_session(settings.door.debug):
        display, storage = Display(), Folder(settings.store.storage_path)
        folder = Folder(part.output) if part.output else kept_folder(part.source, part.image_size, storage)
        try:
            manifest = prepare(part.source, folder, part.image_size, part.shards, part.val_fraction, display.preparing)
        finally:
            display.close()
    rows = [("splits", ", ".join(f"{k} {v:,}" for k, v in manifest.counts.items())), ("digest", manifest.data_digest)]
    display.table(f"Prepared {folder}", [*rows, ("train on it", f"python jobs/train.py --data {folder}")])


if __name__ == "__main__":
    cli.main(PrepareSettings, run, __doc__)
