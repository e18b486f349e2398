"""The end of a training: the test split, photos with what the model says of them, and the packaged model."""

import numpy as np

from unet.data.resize import ignore_padding
from unet.data.shards import opened, pixels
from unet.models.trained import TrainedModel
from unet.packaging.model import package
from unet.training.loop import Loop

GALLERY = 8
"""How many validation photos are shown with their masks."""


def finish(loop: Loop) -> None:
    """Score the test split once with the chosen weights, show what they do on validation photos, package them."""
    chosen = loop.state.chosen
    loop.checkpoints.load(chosen, loop.learner)
    result = loop.evaluate("test", loop.reader.direct("test"))
    if loop.rank == 0:
        loop.link.event("test", result)
        loop.link.event("gallery", _gallery(loop))
        # Here, where TensorFlow is loaded already: another process would take ten seconds more.
        loop.link.event("package", package(TrainedModel.of_checkpoint(loop.checkpoints.run, chosen)))


def _gallery(loop: Loop) -> dict:
    """Photos of validation with their truth and what the model says: names and uint8 arrays.

    What the model says of a letterbox' padding becomes `IGNORE`: it is no part of the photo.
    """
    ingest = loop.reader.ingest
    prepared = opened(ingest.folder)
    split = "val" if ingest.samples["val"] else "train"
    columns = ("name", "image", "mask", "original_height", "original_width")
    table = prepared.read_chunk(split, 0, columns).slice(0, GALLERY)
    size = ingest.image_size
    images, truth = pixels(table["image"], (size, size, 3)), pixels(table["mask"], (size, size))
    predicted = np.concatenate([loop.learner.predict(images[i : i + 1]) for i in range(len(images))])
    if prepared.manifest.resize == "letterbox":
        shapes = zip(*(table[name].to_pylist() for name in columns[3:]), strict=True)
        predicted = np.stack([ignore_padding(mask, *shape) for mask, shape in zip(predicted, shapes, strict=True)])
    return {
        "names": table["name"].to_pylist(),
        "images": images.copy(),
        "truth": truth.copy(),
        "predicted": predicted,
    }
