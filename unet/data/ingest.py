"""From shards to the batches of a worker, through Ray Data, in the order of `unet.data.order`.

Data that fit the memory budget are read once into the object store, where the workers of a node share them. Data
that do not fit are streamed by one execution of Ray Data for the whole run, training and validation in turn. Both
ways give the same samples in the same order; a streamed block says where it belongs, and the worker checks it.

Why: docs/decisions.md#kept-chunks-or-one-stream
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from unet.data.chunks import Chunks, LazyChunks, arrays, gather
from unet.data.order import CHUNK, PADDING, BatchPlan, epoch_order, sample_bytes, window_ends, window_of
from unet.data.shards import opened
from unet.data.streaming import DATA_CPUS, STREAM_TASKS
from unet.recipe.augment import draw, flips, mirror

KEEP_BYTES = 2**26
"""What a task reads at least of data that are kept: starting one takes longer than reading a small chunk."""


MOST_TASKS = 5_000
"""So many reading tasks a stream has at most, where it is not known how long the run will be: about 20 million samples
of 128 px. All are made when it starts."""


@dataclass(frozen=True)
class Batch:
    """A worker's rows of one global batch.

    Attributes:
        epoch: from 1.
        step: in the epoch, from 0.
        indices: int64 (rows,) canonical indices; `PADDING` for a row that only fills the batch.
        images: uint8 (rows, S, S, 3).
        masks: uint8 (rows, S, S) class ids; `IGNORE` throughout in a padding row.
        draws: float32 (rows, K), what a training step varies its samples by; None in an evaluation.
    """

    epoch: int
    step: int
    indices: np.ndarray
    images: np.ndarray
    masks: np.ndarray
    draws: np.ndarray | None = None


@dataclass(frozen=True)
class Ingest:
    """What a run reads: enough to compute every batch of every epoch for any number of workers.

    Attributes:
        folder: URI of the prepared folder.
        image_size: S.
        samples: how many samples of each split are used.
        batch_size: the global batch.
        seed: of order and augmentation.
        epochs: the last epoch; None: nobody knows which.
        kept: by split, references to the chunks in the object store; None when streaming.
        start: (epoch, step in the epoch) to start at.
        memory: bytes of object store that streaming may use.
        window: chunks of a window of the order; None: what `unet.data.order` takes for the image size.
        tasks: streaming tasks at a time.
        label_selector: Ray's, of the nodes that tasks may run on; {}: all.
    """

    folder: str
    image_size: int
    samples: dict[str, int]
    batch_size: int
    seed: int
    epochs: int | None
    start: tuple[int, int]
    memory: int
    kept: dict[str, list[ray.ObjectRef]] | None = None
    window: int | None = None
    tasks: int = STREAM_TASKS
    label_selector: dict[str, str] = field(default_factory=dict)

    @property
    def chunks_of_window(self) -> int:
        return self.window or window_of(self.image_size)

    def plan(self, split: str, world_size: int) -> BatchPlan:
        return BatchPlan(self.samples[split], self.batch_size, world_size)

    def order(self, split: str, epoch: int) -> np.ndarray:
        """Training is shuffled by (seed, epoch); an evaluation takes the canonical order."""
        if split == "train":
            return epoch_order(self.samples[split], self.seed, epoch, self.chunks_of_window)
        return np.arange(self.samples[split], dtype=np.int64)


def shards(ingest: Ingest, world_size: int) -> list["WorkerShard"]:
    """Each worker's shard; where the data are streamed, of one execution of Ray Data for all that is left to read."""
    if ingest.kept is None and ingest.epochs is None:
        first, windows = ingest.start[0], -(-ingest.samples["train"] // (CHUNK * ingest.chunks_of_window))
        ingest = replace(ingest, epochs=first + MOST_TASKS // (windows + 1))
    found = [WorkerShard(ingest, rank, world_size) for rank in range(world_size)]
    units = [] if ingest.kept is not None else list(_units(ingest, world_size))
    if units:  # none where only the test is left to do
        streams = _stream(ingest, units, world_size).streaming_split(world_size, equal=False)
        found = [replace(shard, stream=stream) for shard, stream in zip(found, streams, strict=True)]
    return found


@dataclass(frozen=True)
class WorkerShard:
    """One worker's way to its batches."""

    ingest: Ingest
    rank: int
    world_size: int
    stream: ray.data.DataIterator | None = None

    def reader(self) -> "Reader":
        """Open it in the worker."""
        return _Kept(self) if self.stream is None else _Streamed(self, self.stream)


class Reader:
    """Batches of a worker, assembled one ahead of their use in a thread."""

    def __init__(self, shard: WorkerShard):
        self.ingest, self.rank, self.world_size = shard.ingest, shard.rank, shard.world_size
        # One thread for all epochs: each new one would leave an arena of its own in the memory of the process.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def train(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on, flips applied and other changes drawn."""

        def varied(batch: Batch) -> Batch:
            mirror(batch.images, batch.masks, flips(batch.indices, self.ingest.seed, epoch))
            return replace(batch, draws=draw(batch.indices, self.ingest.seed, epoch))

        return self._one_ahead(map(varied, self._batches("train", epoch, first_step)))

    def validation(self, epoch: int, cut: bool = False) -> Iterator[Batch]:
        """After all batches of an epoch, or after some of the last one, which was `cut` short."""
        return self._one_ahead(self._batches("val", epoch, 0))

    def direct(self, split: str) -> Iterator[Batch]:
        """This worker's part of a split straight from its shards: for one pass, an execution would cost more to start.

        The parts are stretches of the canonical order, of equal length but for one sample, so no worker reads all
        chunks, and one may have a batch fewer than another.
        """
        samples, size = self.ingest.samples[split], self.ingest.image_size
        part = np.arange(self.rank * samples // self.world_size, (self.rank + 1) * samples // self.world_size)
        plan = BatchPlan(len(part), self.ingest.plan(split, self.world_size).share, 1)
        chunks = LazyChunks(opened(self.ingest.folder), split, part)
        return self._one_ahead(
            Batch(1, step, indices, *gather(indices, chunks, size)) for step, (indices,) in plan.shares(part)
        )

    def _one_ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Prepare the next batch in the thread while the current one is used."""
        iterator = iter(batches)
        pending = self._thread.submit(next, iterator, None)
        while (batch := pending.result()) is not None:
            pending = self._thread.submit(next, iterator, None)
            yield batch

    def _batches(self, split: str, epoch: int, first_step: int) -> Iterator[Batch]:
        raise NotImplementedError

    def _gathered(self, split: str, epoch: int, first_step: int, chunks: Chunks) -> Iterator[Batch]:
        plan = self.ingest.plan(split, self.world_size)
        for step, shares in plan.shares(self.ingest.order(split, epoch), first_step):
            indices = shares[self.rank]
            yield Batch(epoch, step, indices, *gather(indices, chunks, self.ingest.image_size))


class _Kept(Reader):
    def __init__(self, shard: WorkerShard):
        super().__init__(shard)
        self._chunks = {
            split: [arrays(table, self.ingest.image_size) for table in ray.get(refs)]
            for split, refs in (self.ingest.kept or {}).items()
        }

    def _batches(self, split: str, epoch: int, first_step: int) -> Iterator[Batch]:
        return self._gathered(split, epoch, first_step, self._chunks[split])


class _Streamed(Reader):
    def __init__(self, shard: WorkerShard, stream: ray.data.DataIterator):
        super().__init__(shard)
        whole_blocks: Any = None  # Ray takes it, and leaves it out of its types
        blocks = stream.iter_batches(batch_size=whole_blocks, batch_format="pyarrow", prefetch_batches=2)
        self._blocks: Iterator[pa.Table] = iter(blocks)

    def validation(self, epoch: int, cut: bool = False) -> Iterator[Batch]:
        if not cut:
            return super().validation(epoch)
        # In the stream the rest of the epoch's training comes first.
        shares = self.ingest.plan("val", self.world_size).shares(self.ingest.order("val", epoch))
        own = np.concatenate([share[self.rank] for _, share in shares])
        chunks = LazyChunks(opened(self.ingest.folder), "val", own[own != PADDING])
        return self._one_ahead(self._gathered("val", epoch, 0, chunks))

    def _batches(self, split: str, epoch: int, first_step: int) -> Iterator[Batch]:
        size = self.ingest.image_size
        for step in range(first_step, self.ingest.plan(split, self.world_size).steps):
            block = next(self._blocks)
            row = {name: block[name][0] for name in block.column_names}
            place = (row["split"].as_py(), *(row[key].as_py() for key in ("epoch", "step", "rank")))
            if len(block) != 1 or place != (split, epoch, step, self.rank):
                # Ray promises no order across the split, so it is checked, never assumed.
                raise RuntimeError(f"Ray Data delivered block {place} for {(split, epoch, step, self.rank)}.")
            indices, images, masks = (
                np.frombuffer(row[key].as_buffer(), dtype)
                for key, dtype in (("indices", np.int64), ("images", np.uint8), ("masks", np.uint8))
            )
            # Copies: the buffers are read-only memory of the object store, and flips work in place.
            yield Batch(
                epoch,
                step,
                indices,
                images.reshape(-1, size, size, 3).copy(),
                masks.reshape(-1, size, size).copy(),
            )


def keep(ingest: Ingest) -> Ingest:
    """Read the training and validation chunks once, by tasks of Ray Data, into the object store.

    The caller's process owns them, so they outlive the workers.
    """
    chunk_bytes = CHUNK * sample_bytes(ingest.image_size)
    together = max(1, KEEP_BYTES // chunk_bytes)
    chunks = {split: -(-ingest.samples[split] // CHUNK) for split in ("train", "val")}
    tasks: list[dict[str, Any]] = [
        {"split": split, "first": first, "last": min(count, first + together)}
        for split, count in chunks.items()
        for first in range(0, count, together)
    ]

    def read(row: dict) -> Iterator[pa.Table]:
        for chunk in range(int(row["first"][0]), int(row["last"][0])):
            yield opened(ingest.folder).read_checked(str(row["split"][0]), chunk)

    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    _in_order(dataset)
    # A chunk is a block: it has more bytes than this, or is the last of its task, which alone may be short.
    dataset.context.target_max_block_size = chunk_bytes - 1
    where = ingest.label_selector
    read_all = dataset.map_batches(read, batch_size=1, num_cpus=DATA_CPUS, label_selector=where)
    # Not `materialize`: it asks every node for its memory, and waits a minute for one that is cut off.
    blocks = [block for bundle in read_all.iter_internal_ref_bundles() for block in bundle.block_refs]
    numbers = [task["last"] - task["first"] for task in tasks]
    if len(blocks) != sum(numbers):
        raise RuntimeError(f"Ray Data returned {len(blocks)} blocks for {sum(numbers)} chunks.")
    kept: dict[str, list[ray.ObjectRef]] = {"train": [], "val": []}
    left = iter(blocks)
    for task, number in zip(tasks, numbers, strict=True):
        kept[task["split"]] += islice(left, number)
    return replace(ingest, kept=kept)


def _stream(ingest: Ingest, units: list[dict], world_size: int) -> ray.data.Dataset:
    """One dataset for the rest of the run: a row is one worker's share of one step, in the order of use."""
    dataset = ray.data.from_items(units, override_num_blocks=len(units))
    _in_order(dataset)
    dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=ingest.memory)
    # Blocks of one row: the splitter hands blocks out in turn, so each rank receives its own.
    dataset.context.target_max_block_size = 1

    first_epoch = units[0]["epoch"]

    def read(unit: dict) -> Iterator[pa.Table]:
        split, (epoch, first, last) = str(unit["split"][0]), (int(unit[k][0]) for k in ("epoch", "first", "last"))
        plan, order = ingest.plan(split, world_size), ingest.order(split, epoch)
        wanted = order[first * plan.batch_size : last * plan.batch_size]
        # Once a run the pixels are compared with their digests; after that the pages' checksums must do.
        chunks = LazyChunks(opened(ingest.folder), split, wanted, check=epoch == first_epoch)
        for step, shares in plan.shares(order, first):
            if step == last:
                return
            for rank, indices in enumerate(shares):
                images, masks = gather(indices, chunks, ingest.image_size)
                row = {"split": split, "epoch": epoch, "step": step, "rank": rank}
                row |= {"indices": indices.tobytes(), "images": images.tobytes(), "masks": masks.tobytes()}
                yield pa.Table.from_pylist([row])

    strategy, where = ray.data.TaskPoolStrategy(ingest.tasks), ingest.label_selector
    return dataset.map_batches(read, batch_size=1, num_cpus=DATA_CPUS, compute=strategy, label_selector=where)


def _units(ingest: Ingest, world_size: int) -> Iterator[dict]:
    """The reading tasks: the steps that begin in one window, and each epoch's validation."""
    first_epoch, first_step = ingest.start
    assert ingest.epochs is not None  # a stream has an end
    for epoch in range(first_epoch, ingest.epochs + 1):
        for end in window_ends(ingest.samples["train"], ingest.seed, epoch, ingest.chunks_of_window):
            last = -(-end // ingest.batch_size)
            if first_step < last:
                yield {"split": "train", "epoch": epoch, "first": first_step, "last": last}
                first_step = last
        first_step = 0
        if val_steps := ingest.plan("val", world_size).steps:
            yield {"split": "val", "epoch": epoch, "first": 0, "last": val_steps}


def _in_order(dataset: ray.data.Dataset) -> None:
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
