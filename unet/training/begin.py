"""What a training shows at its beginning: training samples as its network will see them."""

import numpy as np

from unet.data.shards import opened, pixels
from unet.recipe.augment import draw, flips, mirror
from unet.training.loop import Loop

SHOWN, SHOWN_PIXELS = 16, 2**22
"""How many training samples are shown, and pixels in all: of large ones fewer, since each is varied in float32."""


def begin(loop: Loop) -> None:
    """Tell the driver what the first epoch's augmentation makes of the first samples, if this is a run's first step.

    By the graph of the step itself. Where samples are mixed, each with its neighbour here, which is another one in
    training.
    """
    if loop.rank == 0 and loop.state.step == 0 and loop.settings.augment.is_on:
        loop.link.event("augmented", _augmented(loop))


def _augmented(loop: Loop) -> dict:
    """Their names, images uint8 (N, S, S, 3) and masks uint8 (N, S, S)."""
    ingest = loop.reader.ingest
    size = ingest.image_size
    count = min(SHOWN, ingest.samples["train"], max(1, SHOWN_PIXELS // size**2))
    table = opened(ingest.folder).read_chunk("train", 0, ("name", "image", "mask")).slice(0, count)
    images, masks = pixels(table["image"], (size, size, 3)).copy(), pixels(table["mask"], (size, size)).copy()
    indices = np.arange(count)
    mirror(images, masks, flips(indices, ingest.seed, 1))
    images, masks = loop.learner.augmented(images, masks, draw(indices, ingest.seed, 1))
    return {"names": table["name"].to_pylist(), "images": images, "masks": masks}
