"""The end of a training: the test split, photos with what the model says of them, and the packaged model."""

from unet.models.trained import TrainedModel
from unet.packaging.model import package
from unet.training.loop import Loop
from unet.training.shown import photos

GALLERY = 8
"""How many validation photos are shown with their masks."""


def finish(loop: Loop) -> None:
    """Score the test split once with the chosen weights, show what they do on validation photos, package them."""
    chosen = loop.state.chosen
    loop.checkpoints.load(chosen, loop.learner)
    result = loop.evaluate("test", loop.reader.direct("test"))
    if loop.rank == 0:
        loop.link.event("test", result)
        loop.link.event("gallery", photos(loop, GALLERY))
        # Here, where TensorFlow is loaded already: another process would take ten seconds more.
        loop.link.event("package", package(TrainedModel.of_checkpoint(loop.checkpoints.run, chosen)))
