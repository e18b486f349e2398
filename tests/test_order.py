"""The order of samples, flips and shares: pure functions, checked over many values."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unet.data.augment import flips, mirror
from unet.data.order import CHUNK, PADDING, BatchPlan, epoch_order

sizes, seeds, epochs = st.integers(1, 3000), st.integers(0, 2**32 - 1), st.integers(1, 10_000)


@given(sizes, seeds, epochs, st.integers(1, 5))
def test_every_sample_once_and_near_its_window(samples, seed, epoch, window):
    order = epoch_order(samples, seed, epoch, window)
    assert sorted(order) == list(range(samples))
    assert np.array_equal(order, epoch_order(samples, seed, epoch, window))
    # A window in hand is enough to stream: each stretch of `window` chunks holds whole chunks only.
    start, full = 0, -(-samples // CHUNK)
    seen = 0
    while start < samples:
        chunks = min(window, full - seen)
        count = next(
            n for n in range(1, window * CHUNK + 1) if _whole_chunks(order[start : start + n], samples, chunks)
        )
        start, seen = start + count, seen + chunks


def _whole_chunks(indices, samples, chunks):
    touched = set((indices // CHUNK).tolist())
    size = sum(min((c + 1) * CHUNK, samples) - c * CHUNK for c in touched)
    return len(touched) == chunks and size == len(indices)


def test_epochs_and_seeds_differ():
    assert not np.array_equal(epoch_order(1000, 0, 1), epoch_order(1000, 0, 2))
    assert not np.array_equal(epoch_order(1000, 0, 1), epoch_order(1000, 1, 1))
    # Chunks move too, not only the samples inside a window.
    firsts = {int(epoch_order(5000, 0, e, window=1)[0]) // CHUNK for e in range(1, 30)}
    assert len(firsts) > 5


@given(sizes, st.integers(1, 70), st.integers(1, 5), st.data())
def test_shares_of_any_number_of_workers_make_the_same_batches(samples, batch_size, workers, data):
    workers = min(workers, batch_size)
    order = epoch_order(samples, 3, 1)
    plan = BatchPlan(samples, batch_size, workers)
    first = data.draw(st.integers(0, plan.steps))
    batches = dict(plan.shares(order, first))
    assert list(batches) == list(range(first, plan.steps))
    for step, shares in batches.items():
        assert shares.shape == (workers, plan.share)
        rows = shares.reshape(-1)
        assert rows[rows != PADDING].tolist() == order[step * batch_size : (step + 1) * batch_size].tolist()


@given(seeds, epochs, st.permutations(range(50)))
def test_a_flip_belongs_to_the_sample(seed, epoch, places):
    alone = np.array([flips(np.array([i]), seed, epoch)[0] for i in places])
    assert np.array_equal(alone, flips(np.array(places), seed, epoch))


def test_flips_are_fair_and_drawn_anew():
    drawn = np.stack([flips(np.arange(4000), 0, epoch) for epoch in (1, 2, 3)])
    assert (abs(drawn.mean(1) - 0.5) < 0.04).all()
    assert abs((drawn[0] == drawn[1]).mean() - 0.5) < 0.04


def test_mirror_turns_photo_and_mask_together():
    images = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    masks = images[..., 0].copy()
    mirrored, mirrored_masks = images.copy(), masks.copy()
    mirror(mirrored, mirrored_masks, np.array([True, False]))
    assert (
        mirrored[0, 0, 0].tolist() == images[0, 0, 2].tolist()
        and mirrored[0, 1, 2].tolist() == images[0, 1, 0].tolist()
    )
    assert np.array_equal(mirrored[1], images[1])
    assert np.array_equal(mirrored[..., 0], mirrored_masks)
