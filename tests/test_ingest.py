"""The same samples in the same order: kept or streamed, by any number of workers, from any step."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from unet.data import ingest
from unet.data.augment import flips
from unet.data.ingest import Ingest, keep, shards
from unet.data.order import PADDING, epoch_order
from unet.data.packed import packed, unpacked
from unet.data.pieces import Recipe
from unet.data.prepare import prepare
from unet.data.shards import Prepared, pixels
from unet.storage import Folder


@pytest.fixture(scope="module")
def pets(ray_cluster, tmp_path_factory) -> Prepared:
    """Three chunks of training samples, the last one short."""
    target = Folder(tmp_path_factory.mktemp("ingest") / "pets")
    prepare("synthetic:800", target, Recipe(16))
    return Prepared(target)


def reading(pets, epochs=2, start=(1, 0), batch_size=48) -> Ingest:
    counts = pets.manifest.counts
    return Ingest(pets.folder.uri, 16, counts, batch_size, 11, epochs, start, int(256e6))


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
    """Every batch against the order, the shards and the flips, worked out anew; the indices of each epoch."""
    seen = {}
    images, masks = {}, {}
    for split in ("train", "val"):
        images[split], masks[split] = truth(pets, split)
    for split, epoch, _rank, batch in walk(plan, workers, first):
        seen.setdefault((split, epoch), []).extend(batch.indices[batch.indices != PADDING].tolist())
        for row, index in enumerate(batch.indices.tolist()):
            if index == PADDING:
                assert (batch.masks[row] == 255).all() and not batch.images[row].any()
                continue
            image, mask = images[split][index], masks[split][index]
            if split == "train" and flips(np.array([index]), plan.seed, epoch)[0]:
                image, mask = image[:, ::-1], mask[:, ::-1]
            assert np.array_equal(batch.images[row], image) and np.array_equal(batch.masks[row], mask)
    return seen


@pytest.mark.parametrize("mode", ["kept", "streamed"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_reads_every_sample_once_an_epoch_in_order(pets, mode, workers):
    plan = reading(pets)
    seen = check(pets, keep(plan) if mode == "kept" else plan, workers)
    for epoch in (1, 2):
        assert seen["train", epoch] == epoch_order(plan.samples["train"], 11, epoch).tolist()
        assert seen["val", epoch] == list(range(plan.samples["val"]))


@pytest.mark.parametrize("mode", ["kept", "streamed"])
def test_a_run_continues_at_any_step(pets, mode):
    plan = reading(pets, start=(2, 5))
    seen = check(pets, keep(plan) if mode == "kept" else plan, 2, first=(2, 5))
    assert seen["train", 2] == epoch_order(plan.samples["train"], 11, 2).tolist()[5 * 48 :]
    assert set(seen) == {("train", 2), ("val", 2)}


def test_windows_smaller_than_an_epoch_stream_alike(pets, monkeypatch):
    """Batches that straddle windows need samples of two of them."""
    monkeypatch.setattr(ingest, "WINDOW", 1)
    check(pets, reading(pets, epochs=1, batch_size=50), 2)


def test_a_block_out_of_place_is_refused(pets):
    first, second = readers(reading(pets, epochs=1), 2)
    first._blocks, second._blocks = second._blocks, first._blocks

    def refused(reader):
        with pytest.raises(RuntimeError, match="delivered block"):
            next(reader.train(1))
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(refused, (first, second)))


def test_direct_reading_gives_a_split_in_order(pets):
    (reader,) = readers(keep(reading(pets)), 1)
    batches = list(reader.direct("test"))
    assert np.concatenate([b.indices for b in batches])[: len(pets.names("test"))].tolist() == list(range(160))
    images, _ = truth(pets, "test")
    assert np.array_equal(np.concatenate([b.images for b in batches])[: len(images)], images)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_table_comes_back_from_its_row(rows):
    table = pa.table({"id": pa.array(range(rows), pa.int64()), "bytes": pa.array([b"x" * 9] * rows, pa.large_binary())})
    row = packed(table)
    assert len(row) == 1 and unpacked(pa.concat_tables([packed(table), row]).slice(1)).equals(table)
