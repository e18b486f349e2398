"""The same samples in the same order: kept or streamed, by any number of workers, from any step."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from conftest import state_of

from unet.cluster.planner import Plan
from unet.config import TrainSettings
from unet.data import ingest
from unet.data.chunks import LazyChunks
from unet.data.ingest import Ingest, keep, shards
from unet.data.order import CHUNK, PADDING, epoch_order
from unet.data.packed import packed, unpacked
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.shards import Prepared, pixels
from unet.recipe.augment import draw, flips
from unet.storage import Folder
from unet.supervise.reading import Reading


@pytest.fixture(scope="module")
def pets(ray_cluster, tmp_path_factory) -> Prepared:
    """Three chunks of training samples, the last one short."""
    target = Folder(tmp_path_factory.mktemp("ingest") / "pets")
    prepare("synthetic:800", target, Recipe(16))
    return Prepared(target)


def reading(pets, epochs=2, start=(1, 0), batch_size=48, window=None) -> Ingest:
    counts = pets.manifest.counts
    return Ingest(pets.folder.uri, 16, counts, batch_size, 11, epochs, start, int(256e6), window=window)


def readers(plan: Ingest, workers: int):
    return [shard.reader() for shard in shards(plan, workers)]


def truth(pets, split):
    tables = [pets.read_chunk(split, c) for c in range(len(pets.chunks[split]))]
    return [
        np.concatenate([pixels(t[key], shape) for t in tables])
        for key, shape in (("image", (16, 16, 3)), ("mask", (16, 16)))
    ]


def walk(plan, workers, first=(1, 0)):
    """(split, epoch, step, rank, batch) of a whole run, the ranks in turn as in training."""
    all_readers = readers(plan, workers)
    for epoch in range(first[0], plan.epochs + 1):
        from_step = first[1] if epoch == first[0] else 0
        for split in ("train", "val"):
            open_now = [r.train(epoch, from_step) if split == "train" else r.validation(epoch) for r in all_readers]
            # Together, as workers do: a stream starts when all of its consumers ask.
            with ThreadPoolExecutor(workers) as pool:
                while (batches := list(pool.map(lambda b: next(b, None), open_now)))[0] is not None:
                    for rank, batch in enumerate(batches):
                        yield split, epoch, rank, batch


def check(pets, plan, workers, first=(1, 0)):
    """Every batch against the order, the shards and what is drawn, worked out anew; the indices of each epoch."""
    seen = {}
    images, masks = {}, {}
    for split in ("train", "val"):
        images[split], masks[split] = truth(pets, split)
    for split, epoch, _rank, batch in walk(plan, workers, first):
        seen.setdefault((split, epoch), []).extend(batch.indices[batch.indices != PADDING].tolist())
        drawn = draw(batch.indices, plan.seed, epoch) if split == "train" else None
        assert np.array_equal(batch.draws, drawn)
        for row, index in enumerate(batch.indices.tolist()):
            if index == PADDING:
                assert (batch.masks[row] == 255).all() and not batch.images[row].any()
                continue
            image, mask = images[split][index], masks[split][index]
            if split == "train" and flips(np.array([index]), plan.seed, epoch)[0]:
                image, mask = image[:, ::-1], mask[:, ::-1]
            assert np.array_equal(batch.images[row], image) and np.array_equal(batch.masks[row], mask)
    return seen


@pytest.mark.versions
@pytest.mark.parametrize("mode", ["kept", "streamed"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_reads_every_sample_once_an_epoch_in_order(pets, mode, workers):
    plan = reading(pets)
    seen = check(pets, keep(plan) if mode == "kept" else plan, workers)
    for epoch in (1, 2):
        assert seen["train", epoch] == epoch_order(plan.samples["train"], 11, epoch, 1024).tolist()
        assert seen["val", epoch] == list(range(plan.samples["val"]))


@pytest.mark.versions
@pytest.mark.parametrize("mode", ["kept", "streamed"])
def test_a_run_continues_at_any_step(pets, mode):
    plan = reading(pets, start=(2, 5))
    seen = check(pets, keep(plan) if mode == "kept" else plan, 2, first=(2, 5))
    assert seen["train", 2] == epoch_order(plan.samples["train"], 11, 2, 1024).tolist()[5 * 48 :]
    assert set(seen) == {("train", 2), ("val", 2)}


@pytest.mark.parametrize("mode", ["kept", "streamed"])
def test_windows_smaller_than_an_epoch_give_their_own_order(pets, mode):
    """Batches that straddle windows need samples of two of them. A run that began with another window keeps it."""
    plan = reading(pets, epochs=1, batch_size=50, window=1)
    seen = check(pets, keep(plan) if mode == "kept" else plan, 2)
    assert seen["train", 1] == epoch_order(plan.samples["train"], 11, 1, 1).tolist()
    assert seen["train", 1] != epoch_order(plan.samples["train"], 11, 1, 1024).tolist()


def test_a_streaming_task_holds_a_window_and_lets_go_of_it(pets):
    plan = reading(pets, epochs=1, batch_size=50, window=1)
    for unit in (unit for unit in ingest._units(plan, 2) if unit["split"] == "train"):
        wanted = plan.order("train", 1)[unit["first"] * 50 : unit["last"] * 50]
        chunks, held = LazyChunks(pets, "train", wanted), []
        for index in wanted.tolist():
            chunks[index // CHUNK]
            held.append(len(chunks._read))
        # Of the window before, the first batch may miss a few; of the next, the last may need a few.
        assert max(held) <= 2 and held[len(held) // 2] == 1 and not chunks._read


def test_a_block_out_of_place_is_refused(pets):
    first, second = readers(reading(pets, epochs=1), 2)
    first._blocks, second._blocks = second._blocks, first._blocks

    def refused(reader):
        with pytest.raises(RuntimeError, match="delivered block"):
            next(reader.train(1))
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(refused, (first, second)))


@pytest.mark.parametrize("rows", [0, 3])
def test_a_table_comes_back_from_its_row(rows):
    table = pa.table({"id": pa.array(range(rows), pa.int64()), "bytes": pa.array([b"x" * 9] * rows, pa.large_binary())})
    row = packed(table)
    assert len(row) == 1 and unpacked(pa.concat_tables([packed(table), row]).slice(1)).equals(table)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_workers_share_the_chunks_of_a_split_that_is_read_once(pets, workers, monkeypatch):
    """Each sample comes to one worker, and no worker reads all chunks: of 634 training samples, in three chunks."""
    read, whole = [], Prepared.read_chunk
    monkeypatch.setattr(Prepared, "read_chunk", lambda self, *place: read.append(place) or whole(self, *place))
    plan, found, images = reading(pets), [], []
    for reader in readers(keep(plan), workers):
        for batch in reader.direct("train"):
            assert batch.images.shape == (plan.plan("train", workers).share, 16, 16, 3)
            padding = batch.indices == PADDING
            assert (batch.masks[padding] == 255).all()
            found += batch.indices[~padding].tolist()
            images.append(batch.images[~padding])
    assert found == list(range(plan.samples["train"]))
    assert len(read) <= len(pets.chunks["train"]) + workers - 1
    assert np.array_equal(np.concatenate(images), truth(pets, "train")[0])


def test_a_run_goes_on_in_the_windows_that_it_began_with(pets):
    state = state_of(TrainSettings(), epoch=2, window=3)
    plan = Plan(2, 0.75, 1, False, False, 10**9, 10**8, stream_tasks=1)
    run = Reading(reading(pets))
    assert run.begin(None, plan).chunks_of_window == 1024
    assert (run.begin(state, plan).chunks_of_window, run.ingest.tasks, run.ingest.start) == (3, 1, (2, 0))
