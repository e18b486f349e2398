"""Photos of validation with what the network says of them: after some epochs, and at the end."""

import numpy as np

from unet.data.resize import ignore_padding
from unet.data.shards import opened, pixels
from unet.training.loop import Loop

IN_EPOCHS = 4
"""How many photos are shown after an epoch."""


def is_shown(epoch: int) -> bool:
    """Whether the masks after an epoch are shown: 1, 2, 3, 4, 6, 8, 12, 16, 24, …: twenty times in a thousand."""
    return epoch.bit_count() == 1 or (epoch % 3 == 0 and (epoch // 3).bit_count() == 1)


def show(loop: Loop, epoch: int) -> None:
    """Tell the driver what the network says of the same few photos, while its scores on all are fresh."""
    if loop.rank == 0 and loop.job.score_test and is_shown(epoch):
        loop.link.event("shown", {"epoch": epoch, **photos(loop, IN_EPOCHS)})


def photos(loop: Loop, count: int) -> dict:
    """Photos of validation with their truth and what the evaluated model says: names and uint8 arrays.

    What the model says of a letterbox' padding becomes `IGNORE`: it is no part of the photo.
    """
    ingest = loop.reader.ingest
    prepared = opened(ingest.folder)
    split = "val" if ingest.samples["val"] else "train"
    columns = ("name", "image", "mask", "original_height", "original_width")
    table = prepared.read_chunk(split, 0, columns).slice(0, count)
    size = ingest.image_size
    images, truth = pixels(table["image"], (size, size, 3)), pixels(table["mask"], (size, size))
    parts = range(0, len(images), loop.learner.share)
    predicted = np.concatenate([loop.learner.predict(images[i : i + loop.learner.share]) for i in parts])
    if prepared.manifest.resize == "letterbox":
        shapes = zip(*(table[name].to_pylist() for name in columns[3:]), strict=True)
        predicted = np.stack([ignore_padding(mask, *shape) for mask, shape in zip(predicted, shapes, strict=True)])
    return {
        "names": table["name"].to_pylist(),
        "images": images.copy(),
        "truth": truth.copy(),
        "predicted": predicted,
    }
