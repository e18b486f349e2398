"""A model over a split in the training loop: exact scores in float32, every image counted once."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from unet import metrics
from unet.data.ingest import Batch
from unet.data.order import PADDING

if TYPE_CHECKING:
    from unet.recipe.step import Learner


def score(
    learner: "Learner", batches: Iterable[Batch], images: int, names: Sequence[str], report: Callable[[Batch], None]
) -> dict:
    """Scores by class name over the batches of all workers of the learner, with `loss` and `images`.

    `report` is called with each batch that is done.

    Raises:
        RuntimeError: another number of images than `images` came by.
    """
    learner.refresh_float32()
    confusion, sums = np.zeros((len(names), len(names)), np.int64), np.zeros(learner.loss.size + 1)
    for batch in batches:
        matrix, loss_sums = learner.evaluate(batch.images, batch.masks)
        confusion += matrix
        sums += *loss_sums, np.count_nonzero(batch.indices != PADDING)
        report(batch)
    confusion, (*total, counted) = learner.sum_over_workers(confusion), learner.sum_over_workers(sums)
    if counted != images:
        raise RuntimeError(f"{counted:.0f} images were scored, there are {images}.")
    return metrics.scores(confusion, names) | {"loss": learner.loss.mean_of(total), "images": int(counted)}
