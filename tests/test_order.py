"""The order of samples, flips and shares: pure functions, checked over many values."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unet.data.order import CHUNK, PADDING, BatchPlan, epoch_order, sample_bytes, window_ends, window_of
from unet.recipe.augment import flips, mirror

sizes, seeds, epochs = st.integers(1, 3000), st.integers(0, 2**32 - 1), st.integers(1, 10_000)


@given(sizes, seeds, epochs, st.integers(1, 5))
def test_every_sample_once_and_near_its_window(samples, seed, epoch, window):
    order = epoch_order(samples, seed, epoch, window)
    assert sorted(order) == list(range(samples))
    assert np.array_equal(order, epoch_order(samples, seed, epoch, window))
    # A window in hand is enough to stream: each stretch up to its end holds whole chunks only, `window` of them.
    ends, left = window_ends(samples, seed, epoch, window), -(-samples // CHUNK)
    for start, end in zip([0, *ends], ends, strict=False):
        touched = set((order[start:end] // CHUNK).tolist())
        assert len(touched) == min(window, left)
        assert end - start == sum(min((chunk + 1) * CHUNK, samples) - chunk * CHUNK for chunk in touched)
        left -= len(touched)
    assert left == 0 and ends[-1] == samples


def test_a_window_is_one_of_bytes():
    """4,096 samples at 128 px, as ever; at any size of at most 512 px no more than 268 MB, and not half of it."""
    assert window_of(128) == 16 and window_of(512) == 1 and window_of(2048) == 1
    for size in range(16, 513, 16):
        taken = window_of(size) * CHUNK * sample_bytes(size)
        assert 2**27 < taken <= 2**28


def test_epochs_and_seeds_differ():
    assert not np.array_equal(epoch_order(1000, 0, 1, 16), epoch_order(1000, 0, 2, 16))
    assert not np.array_equal(epoch_order(1000, 0, 1, 16), epoch_order(1000, 1, 1, 16))
    # Chunks move too, not only the samples inside a window.
    firsts = {int(epoch_order(5000, 0, e, window=1)[0]) // CHUNK for e in range(1, 30)}
    assert len(firsts) > 5


@given(sizes, st.integers(1, 70), st.integers(1, 5), st.data())
def test_shares_of_any_number_of_workers_make_the_same_batches(samples, batch_size, workers, data):
    workers = min(workers, batch_size)
    order = epoch_order(samples, 3, 1, 16)
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
