"""A model over a split: exact scores in float32, every image counted once."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unet import metrics
from unet.classes import IGNORE
from unet.config import MAY_CHANGE, EvaluateSettings, TrainSettings, unflat
from unet.data.ingest import Batch, Ingest, Shard
from unet.data.order import PADDING
from unet.data.prepare import resolve
from unet.data.shards import Prepared, pixels
from unet.data.sources.find import check_source
from unet.errors import Damaged, InputError
from unet.session import silenced
from unet.storage import Folder
from unet.terminal import Display
from unet.training.checkpoint import STATE, Checkpoints


def score(learner, batches: Iterable[Batch], images: int, names: Sequence[str], tell: Callable[[Batch], None]) -> dict:
    """Scores by class name over the batches of all workers of the learner, with `loss` and `images`.

    `tell` is called with each batch that is done.

    Raises:
        RuntimeError: another number of images than `images` came by.
    """
    learner.refresh_float32()
    confusion, sums = np.zeros((len(names), len(names)), np.int64), np.zeros(2)
    for batch in batches:
        matrix, loss_sum = learner.evaluate(batch.images, batch.masks)
        confusion += matrix
        sums += loss_sum, np.count_nonzero(batch.indices != PADDING)
        tell(batch)
    confusion, (loss_sum, counted) = learner.sum_over_workers(confusion), learner.sum_over_workers(sums)
    if counted != images:
        raise RuntimeError(f"{counted:.0f} images were scored, there are {images}.")
    pixels = int(confusion.sum())
    return metrics.scores(confusion, names) | {"loss": loss_sum / pixels if pixels else None, "images": int(counted)}


def score_own_size(learner, prepared: Prepared, split: str, tell: Callable[[int, int], None]) -> dict:
    """Scores of a split at each photo's own size, against the masks that were kept at it (`--original-masks`)."""
    import tensorflow as tf

    from unet.prediction.resizing import at_photo_size

    manifest = prepared.manifest
    size, names = manifest.image_size, manifest.classes
    number = tf.TensorSpec((), tf.int32)

    @tf.function(input_signature=[tf.TensorSpec((None, size, size, 3), tf.uint8)])
    def logits_of(images):
        return learner.float32_model(tf.cast(images, tf.float32) / 255.0, training=False)

    @tf.function(input_signature=[tf.TensorSpec((size, size, len(names))), number, number])
    def enlarged(logits, height, width):
        return at_photo_size(logits[None], height, width, manifest.resize)[0]

    confusion, done = np.zeros(len(names) ** 2, np.int64), 0
    for chunk in range(len(prepared.chunks[split])):
        table = prepared.read_chunk(split, chunk, ("image", "mask_original"))
        images = pixels(table["image"], (size, size, 3))
        for first in range(0, len(images), learner.share):
            truths = table["mask_original"][first : first + learner.share].to_pylist()
            for logits, png in zip(logits_of(images[first : first + learner.share]), truths, strict=True):
                truth = np.asarray(Image.open(io.BytesIO(png)))
                predicted = enlarged(logits, *truth.shape).numpy()
                cells = truth.astype(np.int64) * len(names) + predicted
                confusion += np.bincount(cells[truth != IGNORE], minlength=len(confusion))
            done += len(truths)
            tell(done, manifest.counts[split])
    return metrics.scores(confusion.reshape(len(names), -1), names) | {"images": done}


def find_checkpoint(model: str, storage: Folder) -> tuple[Folder, str]:
    """The run's folder and checkpoint that `--model` means: a run's best one, or the one whose folder is given.

    Raises:
        InputError: there is no such run or checkpoint.
    """
    if (Path(model) / STATE).is_file():
        path = Path(model).resolve()
        return Folder(path.parent.parent), path.name
    run = storage / model
    latest = Checkpoints(run).latest()
    if latest is None:
        raise InputError(f"{model!r} is neither a run with a checkpoint under {storage} nor a checkpoint folder.")
    return run, latest[1].best_checkpoint or latest[0]


def evaluate(settings: EvaluateSettings, display: Display) -> dict:
    """Score a run's best checkpoint (or a given one) on a split, in this process.

    Raises:
        InputError: there is no such model, or the data have other classes than it.
    """
    part = settings.evaluate
    check_source(part.data)
    storage = Folder(settings.store.storage_path)
    run, checkpoint = find_checkpoint(part.model, storage)
    checkpoints = Checkpoints(run)
    try:
        state, weights = checkpoints.state(checkpoint), checkpoints.weights(checkpoint)
    except Damaged as error:
        others = [name for name in checkpoints.whole() if name != checkpoint]
        hint = f"give --model {checkpoints.folder}/{others[-1]}" if others else "bring back a copy of it"
        raise InputError(f"The checkpoint {error} of {run} cannot be scored: {hint}.") from error
    # What concerns the machine of the training does not concern this one.
    trained = unflat(TrainSettings, {k: v for k, v in state.settings.items() if k not in MAY_CHANGE})
    trained = trained.model_copy(update={"training": trained.training.model_copy(update={"grad_shards": 1})})
    prepared = resolve(part.data, trained.data.image_size, trained.data.resize, storage, display.working)
    names, found = [c.name for c in state.class_infos], prepared.manifest.classes
    if names != found:
        raise InputError(
            f"{part.model} was trained for the classes {', '.join(names)}, {prepared.folder} has {', '.join(found)}: "
            "give data that were prepared with the model's classes."
        )

    with silenced(settings.door.debug):
        from unet.training.learner import Learner

        learner = Learner(trained, len(names))
    learner.model.set_weights(weights)
    counts = prepared.manifest.counts
    reading = Ingest(
        prepared.folder.uri, trained.data.image_size, counts, trained.training.batch_size, 0, 1, (1, 0), 0, {}
    )
    batches = Shard(reading, 0, 1).reader().direct(part.split)
    steps = reading.plan(part.split, 1).steps
    result = score(learner, batches, counts[part.split], names, lambda batch: display.scoring(batch.step + 1, steps))
    if prepared.manifest.original_masks:
        tell = lambda done, total: display.working("scoring at the photos' own size", done, total)  # noqa: E731
        result["own_size"] = score_own_size(learner, prepared, part.split, tell)
    what = {"model": part.model, "checkpoint": checkpoint, "split": part.split}
    return what | {"data_digest": prepared.manifest.data_digest} | result
