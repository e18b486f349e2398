"""Tests of the synthetic pets: the same arguments give the same picture, and shape tells the classes, not colour."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet.data.synthetic import BACKGROUND, OUTLINE, PET, draw_pet, species_of

LEVELS = 16  # per channel: fine enough for every colour there is to learn, coarse enough for 300 pictures to fill


@pytest.fixture(scope="module")
def pictures() -> list[tuple[np.ndarray, np.ndarray]]:
    return [draw_pet(index, 128) for index in range(400)]


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 2**40), seed=st.integers(0, 2**40), size=st.sampled_from((16, 17, 32, 45, 128)))
def test_every_picture_is_whole(index, seed, size):
    image, mask = draw_pet(index, size, seed)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert mask.shape == (size, size) and mask.dtype == np.uint8
    assert set(np.unique(mask)) == {PET, BACKGROUND, OUTLINE}
    pet, background = mask == PET, mask == BACKGROUND
    beside = np.zeros_like(pet)
    beside[1:] |= pet[:-1]
    beside[:-1] |= pet[1:]
    beside[:, 1:] |= pet[:, :-1]
    beside[:, :-1] |= pet[:, 1:]
    assert not np.any(beside & background), "the outline has a gap"


def test_a_picture_follows_from_its_arguments():
    image, mask = draw_pet(3, 64, seed=5)
    np.random.seed(0)  # the global state must not matter
    again, mask_again = draw_pet(3, 64, seed=5)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(mask, mask_again)
    for other in (draw_pet(4, 64, seed=5), draw_pet(3, 64, seed=6), draw_pet(5, 64, seed=3)):
        assert not np.array_equal(image, other[0]) and not np.array_equal(mask, other[1])


def test_every_size_shows_the_same_scene(pictures):
    for index, (image, mask) in enumerate(pictures[:20]):
        small_image, small_mask = draw_pet(index, 64)
        assert np.mean(small_mask == mask[::2, ::2]) > 0.9
        assert np.abs(small_image - image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))).mean() < 15


def test_species_are_even_and_stable():
    species = [species_of(index, seed=1) for index in range(1000)]
    assert set(species) == {"cat", "dog"} and 400 < species.count("cat") < 600
    assert species == [species_of(index, seed=1) for index in range(1000)]


def test_a_size_too_small_is_refused():
    with pytest.raises(ValueError, match="at least 16 pixels"):
        draw_pet(0, 8)


def test_class_shares_are_close_to_the_real_ones(pictures):
    """Oxford-IIIT Pet holds about 0.30 pet, 0.59 background and 0.11 outline."""
    masks = np.stack([mask for _, mask in pictures])
    pet, background, outline = (np.mean(masks == label) for label in (PET, BACKGROUND, OUTLINE))
    assert 0.25 < pet < 0.36 and 0.52 < background < 0.66 and 0.08 < outline < 0.13
    share = np.mean(masks == PET, axis=(1, 2))
    assert np.percentile(share, 5) < 0.15 and np.percentile(share, 95) > 0.5, "sizes vary too little"


def test_pictures_have_colour_light_and_detail(pictures):
    images = np.stack([image for image, _ in pictures[:100]]).astype(np.float32)
    assert 60 < images.mean() < 160
    assert np.std(images.mean(axis=(1, 2, 3))) > 15, "all pictures are equally bright"
    assert np.median(images.std(axis=(1, 2)).mean(axis=1)) > 20, "the pictures are flat"


def test_colour_alone_does_not_tell_the_classes(pictures):
    """The best guess any classifier of single pixels can make: the most frequent class of each colour."""

    def codes(image):
        return (image.astype(np.int64) // (256 // LEVELS)) @ (LEVELS**2, LEVELS, 1)

    seen = np.zeros((LEVELS**3, 3), np.int64)
    for image, mask in pictures[:300]:
        seen += np.bincount((codes(image) * 3 + mask).ravel(), minlength=seen.size).reshape(seen.shape)
    guess = np.where(seen.any(axis=1), seen.argmax(axis=1), BACKGROUND)
    confusion = np.zeros((3, 3), np.int64)
    for image, mask in pictures[300:]:
        confusion += np.bincount((mask * 3 + guess[codes(image)]).ravel(), minlength=9).reshape(3, 3)
    hits = confusion.diagonal()
    mean_iou = np.mean(hits / (confusion.sum(axis=0) + confusion.sum(axis=1) - hits))
    assert mean_iou < 0.38
