"""From shards to the batches of a worker, through Ray Data, in the order of `unet.data.order`.

Data that fit the memory budget are read once into the object store, where the workers of a node share them. Data
that do not fit are streamed by one execution of Ray Data for the whole run, training and validation in turn. Both
ways give the same samples in the same order; a streamed block says where it belongs and the worker checks it.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import ray

from unet.classes import IGNORE
from unet.data.augment import flips, mirror
from unet.data.order import CHUNK, PADDING, WINDOW, BatchPlan, epoch_order
from unet.data.shards import Prepared, pixels
from unet.storage import Folder

DATA_CPUS = 0.2
"""What a reading task asks of Ray: reading hardly computes, and the workers need the cores."""
STREAM_TASKS = 2
"""Streaming tasks at a time: the one whose blocks are used and the next. Each holds a window in memory."""


@dataclass(frozen=True)
class Batch:
    """A worker's rows of one global batch.

    Attributes:
        epoch: from 1.
        step: in the epoch, from 0.
        indices: int64 (rows,) canonical indices; `PADDING` where a row only fills up.
        images: uint8 (rows, S, S, 3).
        masks: uint8 (rows, S, S) class ids; `IGNORE` all over in a padding row.
    """

    epoch: int
    step: int
    indices: np.ndarray
    images: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class Ingest:
    """What a run reads: enough to compute every batch of every epoch for any number of workers.

    Attributes:
        folder: URI of the prepared folder.
        image_size: S.
        samples: how many samples of each split are used.
        batch_size: the global batch.
        seed: of order and flips.
        epochs: the last epoch.
        kept: by split, references to the chunks held in the object store; None when streaming.
        start: (epoch, step in the epoch) to start at.
        memory: bytes of object store that streaming may use.
    """

    folder: str
    image_size: int
    samples: dict[str, int]
    batch_size: int
    seed: int
    epochs: int
    start: tuple[int, int]
    memory: int
    kept: dict[str, list[ray.ObjectRef]] | None = None

    def plan(self, split: str, world_size: int) -> BatchPlan:
        return BatchPlan(self.samples[split], self.batch_size, world_size)

    def order(self, split: str, epoch: int) -> np.ndarray:
        """Training is shuffled by (seed, epoch); an evaluation takes the canonical order."""
        if split == "train":
            return epoch_order(self.samples[split], self.seed, epoch)
        return np.arange(self.samples[split], dtype=np.int64)


def shards(ingest: Ingest, world_size: int) -> list["Shard"]:
    """Each worker's shard; where the data are streamed, of one execution of Ray Data for all that is left to read."""
    found = [Shard(ingest, rank, world_size) for rank in range(world_size)]
    units = [] if ingest.kept is not None else list(_units(ingest, world_size))
    if units:  # none where only the test is left to do
        streams = _stream(ingest, units, world_size).streaming_split(world_size, equal=False)
        found = [replace(shard, stream=stream) for shard, stream in zip(found, streams, strict=True)]
    return found


@dataclass(frozen=True)
class Shard:
    """One worker's way to its batches."""

    ingest: Ingest
    rank: int
    world_size: int
    stream: ray.data.DataIterator | None = None

    def reader(self) -> "Reader":
        """Open it in the worker."""
        return _Kept(self) if self.stream is None else _Streamed(self)


class Reader:
    """Batches of a worker, assembled one ahead of their use in a thread."""

    def __init__(self, shard: Shard):
        self.ingest, self.rank, self.world_size = shard.ingest, shard.rank, shard.world_size
        # One thread for all epochs: each new one would leave an arena of its own in the memory of the process.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def train(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on, flips applied."""

        def flipped(batch: Batch) -> Batch:
            mirror(batch.images, batch.masks, flips(batch.indices, self.ingest.seed, epoch))
            return batch

        return self._one_ahead(map(flipped, self._batches("train", epoch, first_step)))

    def validation(self, epoch: int) -> Iterator[Batch]:
        return self._one_ahead(self._batches("val", epoch, 0))

    def direct(self, split: str) -> Iterator[Batch]:
        """A split straight from its shards: for one pass, starting an execution would cost more than reading."""
        chunks = _LazyChunks(Prepared(Folder(self.ingest.folder)), split)
        return self._one_ahead(self._gathered(split, 1, 0, chunks))

    def _one_ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Prepare the next batch in the thread while the current one is used."""
        iterator = iter(batches)
        pending = self._thread.submit(next, iterator, None)
        while (batch := pending.result()) is not None:
            pending = self._thread.submit(next, iterator, None)
            yield batch

    def _batches(self, split: str, epoch: int, first_step: int) -> Iterator[Batch]:
        raise NotImplementedError

    def _gathered(self, split, epoch, first_step, chunks) -> Iterator[Batch]:
        plan = self.ingest.plan(split, self.world_size)
        for step, shares in plan.shares(self.ingest.order(split, epoch), first_step):
            indices = shares[self.rank]
            yield Batch(epoch, step, indices, *_gather(indices, chunks, self.ingest.image_size))


class _Kept(Reader):
    def __init__(self, shard: Shard):
        super().__init__(shard)
        self._chunks = {
            split: [_arrays(table, self.ingest.image_size) for table in ray.get(refs)]
            for split, refs in (self.ingest.kept or {}).items()
        }

    def _batches(self, split, epoch, first_step):
        return self._gathered(split, epoch, first_step, self._chunks[split])


class _Streamed(Reader):
    def __init__(self, shard: Shard):
        super().__init__(shard)
        self._blocks = iter(shard.stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))

    def _batches(self, split, epoch, first_step):
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
    chunks = [
        {"split": split, "chunk": chunk}
        for split in ("train", "val")
        for chunk in range(-(-ingest.samples[split] // CHUNK))
    ]

    def read(row: dict) -> pa.Table:
        return Prepared(Folder(ingest.folder)).read_checked(row["split"][0], int(row["chunk"][0]))

    dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks))
    _in_order(dataset)
    dataset.context.target_max_block_size = None  # a chunk is a block, whatever its size
    blocks = dataset.map_batches(read, batch_size=1, num_cpus=DATA_CPUS).materialize().to_arrow_refs()
    if len(blocks) != len(chunks):
        raise RuntimeError(f"Ray Data gave {len(blocks)} blocks for {len(chunks)} chunks.")
    kept = {"train": [], "val": []}
    for block, chunk in zip(blocks, chunks, strict=True):
        kept[chunk["split"]].append(block)
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
        plan, prepared = ingest.plan(split, world_size), Prepared(Folder(ingest.folder))
        # Once a run the pixels are compared with their digests; after that the pages' checksums must do.
        chunks = _LazyChunks(prepared, split, keep=split == "train", check=epoch == first_epoch)
        for step, shares in plan.shares(ingest.order(split, epoch), first):
            if step == last:
                return
            for rank, indices in enumerate(shares):
                images, masks = _gather(indices, chunks, ingest.image_size)
                row = {"split": split, "epoch": epoch, "step": step, "rank": rank}
                row |= {"indices": indices.tobytes(), "images": images.tobytes(), "masks": masks.tobytes()}
                yield pa.Table.from_pylist([row])

    return dataset.map_batches(read, batch_size=1, num_cpus=DATA_CPUS, compute=ray.data.TaskPoolStrategy(STREAM_TASKS))


def _units(ingest: Ingest, world_size: int) -> Iterator[dict]:
    """The reading tasks: runs of steps that begin in one window, and each epoch's validation."""
    first_epoch, first_step = ingest.start
    for epoch in range(first_epoch, ingest.epochs + 1):
        steps = ingest.plan("train", world_size).steps
        window_steps = max(1, WINDOW * CHUNK // ingest.batch_size)
        while first_step < steps:
            last = min(steps, (first_step // window_steps + 1) * window_steps)
            yield {"split": "train", "epoch": epoch, "first": first_step, "last": last}
            first_step = last
        first_step = 0
        if val_steps := ingest.plan("val", world_size).steps:
            yield {"split": "val", "epoch": epoch, "first": 0, "last": val_steps}


def _in_order(dataset: ray.data.Dataset) -> None:
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False


class _LazyChunks:
    """Chunks read when first asked for: the latest only, or all of a window where `keep` is set.

    With `check`, their pixels are compared with the digests of when they were prepared.
    """

    def __init__(self, prepared: Prepared, split: str, keep: bool = False, check: bool = True):
        self._prepared, self._split, self._keep, self._read = prepared, split, keep, {}
        self._load = prepared.read_checked if check else prepared.read_chunk

    def __getitem__(self, chunk: int):
        if chunk not in self._read:
            if not self._keep:
                self._read.clear()
            table = self._load(self._split, chunk)
            self._read[chunk] = _arrays(table, self._prepared.manifest.image_size)
        return self._read[chunk]


def _arrays(table: pa.Table, size: int) -> tuple[np.ndarray, np.ndarray]:
    return pixels(table["image"], (size, size, 3)), pixels(table["mask"], (size, size))


def _gather(indices: np.ndarray, chunks, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of canonical indices, copied out of their chunks; padding rows are black and ignored."""
    images = np.empty((len(indices), size, size, 3), np.uint8)
    masks = np.empty((len(indices), size, size), np.uint8)
    for row, index in enumerate(indices.tolist()):
        if index == PADDING:
            images[row], masks[row] = 0, IGNORE
        else:
            chunk_images, chunk_masks = chunks[index // CHUNK]
            images[row], masks[row] = chunk_images[index % CHUNK], chunk_masks[index % CHUNK]
    return images, masks
