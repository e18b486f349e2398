"""Models over a split on the cluster, through Ray Data: a record of each image comes back, no pixels.

Tasks read chunks of the shards and check them; processes with one TensorFlow thread each score them in batches of one
size, so that an image's numbers depend neither on the rest of its batch nor on the number of processes: the kernels
that TensorFlow takes, and with them the last bits, may depend on threads and batch size.

Why: docs/decisions.md#batches-of-one-size-one-tensorflow-thread-a-process
"""

import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import ray
from PIL import Image

from unet.borders import near_border
from unet.classes import IGNORE
from unet.cluster.devices import start_tensorflow
from unet.cluster.nodes import cluster_nodes
from unet.cluster.placement import Placement
from unet.cluster.planner import READERS, WORKER_BYTES
from unet.config import Resize
from unet.data.packed import packed, unpacked
from unet.data.resize import ignore_padding
from unet.data.shards import Prepared, opened, pixels
from unet.data.sources.archives import species_of
from unet.data.sources.drawn import is_drawn
from unet.data.sources.find import TFDS
from unet.data.streaming import DATA_CPUS
from unet.errors import InputError, RunFailed, first_line, own_words
from unet.evaluation.counts import cells_of
from unet.evaluation.records import record_schema
from unet.metrics import confusion_of
from unet.models.inference import Network
from unet.models.trained import TrainedModel
from unet.recipe.loss import Loss, LossSettings
from unet.recipe.terms import Pixels

BATCH = 16
"""Images that a network takes at a time; fewer if they are large."""
BATCH_BYTES = 0.5e9
"""What the feature maps of a batch may take."""
START_SECONDS = 300
"""How long processes may take to start: TensorFlow's import takes 5 s on an idle core."""
MODEL = "model"


@dataclass(frozen=True)
class Split:
    """What is scored: all that is needed to read it in any process."""

    folder: str
    name: str
    source: str
    image_size: int
    resize: Resize
    classes: int
    band: int

    @classmethod
    def of(cls, prepared: Prepared, split: str, band: int) -> "Split":
        m = prepared.manifest
        return cls(prepared.folder.uri, split, m.source, m.image_size, m.resize, len(m.classes), band)


def batch_size(models: Sequence[TrainedModel]) -> int:
    """How many images the networks take at a time."""
    widest = [max(layer.channels / layer.stride**2 for layer in m.description.layers) for m in models]
    image = max(3 * channels * m.image_size**2 * 4 for channels, m in zip(widest, models, strict=True))
    return max(1, min(BATCH, int(BATCH_BYTES / image)))


def scorer_bytes(models: Sequence[TrainedModel]) -> float:
    """An estimate of a scoring process' memory: TensorFlow, the weights (twice at its start), a batch."""
    return WORKER_BYTES + 2 * sum(w.nbytes for m in models for w in m.weights.values()) + 1.5 * BATCH_BYTES


def score_split(
    models: Sequence[TrainedModel],
    prepared: Prepared,
    split: str,
    workers: Placement,
    band: int,
    batch: int,
    report: Callable[[int, int, float | None], None],
) -> list[pa.Table]:
    """The records of every image for each model (`unet.evaluation.records`), sorted by name.

    All models take the same prepared images. `report` gets the images done, their total and the images/s since the
    first batch.

    Raises:
        InputError: the shards are damaged.
        RunFailed: scoring failed.
        RuntimeError: not every image came back exactly once for each model.
    """
    what, chunks = Split.of(prepared, split, band), len(prepared.chunks[split])
    kept = [ray.put(replace(model, run=None)) for model in models]
    tables: list[pa.Table] = []
    total, first = prepared.count(split), None
    dataset = _dataset(what, chunks, kept, workers, batch)
    report(0, total, None)
    done = 0.0
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            tables.append(table)
            done += len(table) / len(models)
            first = first or (time.monotonic(), done)
            seconds = time.monotonic() - first[0]
            report(int(done), total, (done - first[1]) / seconds if seconds > 1 else None)
    except ray.exceptions.RayError as error:
        raise _explained(error) from error
    schema = record_schema().append(pa.field(MODEL, pa.int32()))
    records = pa.concat_tables(tables).cast(schema) if tables else schema.empty_table()
    found = [
        records.filter(pa.compute.equal(records[MODEL], i)).drop_columns([MODEL]).sort_by("name").combine_chunks()
        for i in range(len(models))
    ]
    expected = prepared.names(split)
    for table in found:
        check_names(table["name"].to_pylist(), expected)
    return found


def check_names(found: list[str], expected: list[str]) -> None:
    """Raises RuntimeError unless each expected name was found exactly once, and no other."""
    missing, extra = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    if missing or extra:
        name, what = (next(iter(missing)), "was not scored") if missing else (next(iter(extra)), "was scored too often")
        raise RuntimeError(
            f"{len(found)} images were scored, there are {len(expected)}: {name} {what}"
            + (
                f", and {missing.total() + extra.total() - 1} more differ."
                if missing.total() + extra.total() > 1
                else "."
            )
        )


def _dataset(what: Split, chunks: int, kept: list[ray.ObjectRef], workers: Placement, batch: int) -> ray.data.Dataset:
    dataset = ray.data.from_items([{"chunk": chunk} for chunk in range(chunks)], override_num_blocks=max(1, chunks))
    context = dataset.context
    context.enable_progress_bars = False
    # A block is one row, which holds a batch: what a process takes at a time, and what progress counts.
    context.target_max_block_size = batch * what.image_size**2 * 4
    context.wait_for_min_actors_s = START_SECONDS
    context.raise_original_map_exception = True  # else it is wrapped in a page about Ray's logs
    read = dataset.map_batches(
        _read_batches,  # type: ignore[arg-type]  # Ray's types do not count fn_args
        fn_args=(what, batch),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=DATA_CPUS,
        compute=ray.data.TaskPoolStrategy(min(chunks, READERS * len(cluster_nodes()))),
    )
    return read.map_batches(
        _BatchScorer,
        fn_constructor_args=(what, kept, workers.use_gpu),
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=workers.num_workers),
        num_cpus=workers.cpus_per_worker,
        num_gpus=int(workers.use_gpu),
    )


def _read_batches(rows: pa.Table, what: Split, batch: int) -> Iterator[pa.Table]:
    for table in _read(rows, what, batch):
        yield packed(table)


def _read(rows: pa.Table, what: Split, batch: int) -> Iterator[pa.Table]:
    """A chunk of the split, compared with the digests of its preparation, in batches."""
    prepared = opened(what.folder)
    columns = ["name", "breed", "original_height", "original_width", "image", "mask"]
    columns += ["mask_original"] if prepared.manifest.original_masks else []
    for chunk in rows["chunk"].to_pylist():
        table = prepared.read_checked(what.name, chunk, tuple(columns))
        for first in range(0, len(table), batch):
            yield table.slice(first, batch).combine_chunks()


class Scorer:
    """A process that scores batches with the networks of all models."""

    def __init__(self, what: Split, models: Sequence[ray.ObjectRef], use_gpu: bool = False):
        start_tensorflow(1, use_gpu)
        self.what, trained = what, [ray.get(model) for model in models]
        judges = {model.loss: _judge(what.image_size, what.classes, model.loss) for model in trained}
        self._networks = [(Network(model), batch_size([model]), judges[model.loss]) for model in trained]
        self._enlarge = _enlarge(what.image_size, what.classes, what.resize)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The records of a batch for each model, with its number."""
        what = self.what
        size = what.image_size
        images, masks = pixels(table["image"], (size, size, 3)), pixels(table["mask"], (size, size))
        bands = near_border(masks, what.band)
        facts = table.select(["name", "breed", "original_height", "original_width"]).to_pylist()
        originals: list[np.ndarray | None] = [None] * len(table)
        if "mask_original" in table.column_names:
            originals = [np.asarray(Image.open(io.BytesIO(png))) for png in table["mask_original"].to_pylist()]
        rows = []
        for number, (network, batch, judge) in enumerate(self._networks):
            rows += [
                self._record(*of_image) | {MODEL: number}
                for of_image in zip(
                    facts, masks, bands, originals, self._judged(network, batch, judge, images, masks), strict=True
                )
            ]
        schema = record_schema().append(pa.field(MODEL, pa.int32()))
        return pa.Table.from_pylist(rows, schema)

    def _judged(
        self, network: Network, batch: int, judge: Callable, images: np.ndarray, masks: np.ndarray
    ) -> Iterator[tuple]:
        """Logits, class ids, loss sums and doubt of each image; the last batch is filled with ignored ones."""
        for first in range(0, len(images), batch):
            rows = slice(first, first + batch)
            count = len(images[rows])
            padding = [(0, batch - count), (0, 0), (0, 0)]
            logits = network.logits(np.pad(images[rows], [*padding, (0, 0)]))
            judged = judge(logits, np.pad(masks[rows], padding, constant_values=IGNORE))
            yield from zip(logits[:count], *(part.numpy()[:count] for part in judged), strict=True)

    def _record(self, facts, mask, band, original, judged) -> dict:
        logits, predicted, loss_sums, doubt = judged
        what, height, width = self.what, facts["original_height"], facts["original_width"]
        own = None
        if original is not None:
            enlarged = self._enlarge(logits, *original.shape).numpy()
            own = cells_of(confusion_of(original, enlarged, what.classes))
        shown = ignore_padding(predicted, height, width) if what.resize == "letterbox" else predicted
        png = io.BytesIO()
        Image.fromarray(shown).save(png, "PNG")
        return {
            "name": facts["name"],
            "split": what.name,
            "breed": facts["breed"],
            "species": _species(facts["breed"], what.source),
            "height": height,
            "width": width,
            "confusion": cells_of(confusion_of(mask, predicted, what.classes)),
            "confusion_band": cells_of(confusion_of(mask[band], predicted[band], what.classes)),
            "confusion_own": own,
            "loss_sums": loss_sums,
            "doubt": doubt if np.isfinite(doubt) else None,
            "predicted": png.getvalue(),
        }


class _BatchScorer(Scorer):
    def __call__(self, row: pa.Table) -> pa.Table:
        return super().__call__(unpacked(row))


def _species(breed: str, source: str) -> str:
    """cat or dog if the source says so; a drawn pet's breed is its species."""
    if source in ("archives", TFDS):
        return species_of(breed)
    return breed if is_drawn(source) else ""


def _judge(size: int, classes: int, loss: LossSettings) -> Callable:
    """What a batch's logits say of each image, for models that were trained with this loss."""
    import tensorflow as tf

    terms = Loss(loss, classes)
    logits = tf.TensorSpec((None, size, size, classes))

    @tf.function(input_signature=[logits, tf.TensorSpec((None, size, size), tf.uint8)], autograph=False)
    def judge(logits, masks):
        """Class ids uint8 (N, S, S), float64 (N, terms.size) sums of the loss, doubts (N,), NaN without a label."""
        pixels = Pixels.of(logits, masks, by_image=True)
        probabilities = tf.nn.softmax(logits)
        doubts = tf.reduce_max(probabilities, -1) - tf.gather(probabilities, pixels.labels, batch_dims=3)
        weights = tf.cast(pixels.valid, tf.float32)
        predicted = tf.cast(tf.argmax(logits, -1), tf.uint8)
        return predicted, terms.sums(pixels), pixels.add(doubts * weights) / pixels.add(weights)

    return judge


def _enlarge(size: int, classes: int, resize: Resize) -> Callable:
    """The class ids of an image at its photo's own size, from its logits."""
    import tensorflow as tf

    from unet.prediction.resizing import at_photo_size

    number = tf.TensorSpec((), tf.int32)

    @tf.function(input_signature=[tf.TensorSpec((size, size, classes)), number, number], autograph=False)
    def enlarge(logits, height, width):
        return at_photo_size(logits[None], height, width, resize)[0]

    return enlarge


def _explained(error: ray.exceptions.RayError) -> Exception:
    """What a process of the cluster raised, as one sentence."""
    cause: BaseException = error
    while isinstance(inner := getattr(cause, "cause", None) or cause.__cause__, BaseException):
        cause = inner
        if isinstance(cause, InputError) and not isinstance(cause, ray.exceptions.RayError):
            return InputError(first_line(cause))
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return RunFailed(
            f"The scoring workers did not start within {START_SECONDS} s: another job may hold the cluster's CPUs "
            "(`ray status` shows them); wait for it, or give fewer --num-workers."
        )
    if own := own_words(str(error)):  # of a process that could not start
        return RunFailed(own)
    return RunFailed(f"Scoring failed: {first_line(cause)}")
