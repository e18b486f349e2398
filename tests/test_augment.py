"""Augmentation: its numbers, what the step makes of them beside SciPy and NumPy, and that it continues exactly."""

import numpy as np
import pytest
from conftest import state_of
from scipy import ndimage

from unet.classes import IGNORE
from unet.config import TrainSettings, unflat
from unet.data.order import PADDING
from unet.data.synthetic import draw_pet
from unet.errors import InputError
from unet.recipe.augment import DRAWS, NEUTRAL, TRANSFORMS, draw, flips
from unet.recipe.schedule import Horizon
from unet.recipe.step import Learner
from unet.runs.checkpoint import Checkpoints
from unet.storage import Folder

SMALL = {"image_size": 32, "base_filters": 4, "depth": 1, "batch_size": 6, "dropout": 0.0, "precision": "float32"}
GEOMETRY = "scale+rotate+shift"
COLOURS = np.uint8([[230, 20, 20], [20, 230, 20], [20, 20, 230]])
"""Each class has the channel of its id, so that a picture tells its mask."""


def learner(**changes) -> Learner:
    return Learner(unflat(TrainSettings, SMALL | changes).recipe(3))


def numbers(count: int, **given) -> np.ndarray:
    """Draws that change nothing but what is given by name."""
    found = np.full((count, len(DRAWS)), NEUTRAL, np.float32)
    for name, values in given.items():
        found[:, DRAWS.index(name)] = values
    return found


@pytest.fixture(scope="module")
def pets():
    return tuple(np.stack(part) for part in zip(*(draw_pet(i, 32) for i in range(6)), strict=True))


def test_draws_belong_to_the_sample_and_the_epoch():
    places = np.array([5, 900_001, 0, PADDING, 5])
    together = draw(places, 3, 2)
    assert together.shape == (5, len(DRAWS)) and together.dtype == np.float32
    for place, row in zip(places, together, strict=True):
        assert np.array_equal(draw(np.array([place]), 3, 2)[0], row)
    assert (together[3] == NEUTRAL).all() and len(np.unique(together[:3])) == 3 * len(DRAWS)
    assert not np.isin(draw(places, 3, 3)[:3], together).any() and not np.isin(draw(places, 4, 2)[:3], together).any()


def test_draws_are_those_of_splitmix64():
    """In whole numbers, after the published algorithm; another stream would break every run under way."""
    bits, key = 2**64 - 1, int(np.random.Philox(key=[3, 2], counter=[0, 0, 0, 2]).random_raw())

    def following(state: int) -> int:
        z = (state + 0x9E3779B97F4A7C15) & bits
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & bits
        z = (z ^ z >> 27) * 0x94D049BB133111EB & bits
        return z ^ z >> 31

    state = following(5 ^ key)
    expected = [(following(state + place * 0x9E3779B97F4A7C15) >> 40) / 2**24 for place in range(len(DRAWS))]
    assert draw(np.array([5]), 3, 2)[0].tolist() == expected


def test_draws_are_even_and_independent():
    found = draw(np.arange(20_000), 0, 1).astype(np.float64)
    assert found.min() >= 0 and found.max() < 1
    histograms = np.stack([np.histogram(column, 10, (0, 1))[0] for column in found.T])
    assert np.abs(histograms - 2000).max() < 6 * np.sqrt(1800)
    columns = np.column_stack([found, flips(np.arange(20_000), 0, 1), np.roll(found[:, 0], 1)])
    assert np.abs(np.corrcoef(columns.T) - np.eye(columns.shape[1])).max() < 6 / np.sqrt(20_000)


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.5])
def test_the_map_is_that_of_scipy(strength):
    """Pixel by pixel, for images and masks, far outside of the picture too, where it is reflected."""
    generator = np.random.default_rng(0)
    images, masks = (
        generator.integers(0, 256, (6, 32, 32, 3), np.uint8),
        generator.integers(0, 3, (6, 32, 32), np.uint8),
    )
    masks[:, 10:14] = IGNORE
    draws = draw(np.arange(6), 1, 1)
    one = learner(augment=strength, augment_with=GEOMETRY)
    moved, labels = one.augmented(images, masks, draws)
    for i in range(6):
        by = {name: 2 * float(value) - 1 for name, value in zip(DRAWS, draws[i], strict=True)}
        angle = strength * np.deg2rad(20) * by["angle"]
        zoom, aspect = 1.5 ** (strength * by["zoom"]), 1.15 ** (strength * by["aspect"])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])  # of (x, y)
        there = np.diag([1 / (zoom * np.sqrt(aspect)), np.sqrt(aspect) / zoom]) @ turn
        shift = 0.12 * 32 * strength * np.array([by["shift_x"], by["shift_y"]])
        matrix, offset = there[::-1, ::-1], (shift + 15.5 - there @ [15.5, 15.5])[::-1]
        rows, columns = np.indices((32, 32)).reshape(2, -1)
        y, x = matrix @ [rows, columns] + offset[:, None]
        clear = np.all([np.abs(v - np.floor(v) - 0.5) > 1e-3 for v in (x, y)], 0).reshape(32, 32)
        assert clear.mean() > 0.95  # elsewhere rounding decides about the nearest pixel
        nearest = ndimage.affine_transform(masks[i], matrix, offset, order=0, mode="reflect")
        assert np.array_equal(labels[i][clear], nearest[clear])
        for band in range(3):
            expected = ndimage.affine_transform(
                images[i, ..., band].astype(float), matrix, offset, order=1, mode="reflect"
            )
            assert np.abs(moved[i, ..., band] - expected).max() < 0.51


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_pictures_and_masks_move_alike(pets, mix):
    """Colours tell the classes: away from their borders picture and mask say the same, whatever is done to them."""
    masks = pets[1].copy()
    masks[:, :9, 20:] = 1
    one = learner(augment=1.0, augment_with=f"{GEOMETRY}+0.3*colour+0.5*blur", mix=mix)
    seen, labels = one.augmented(COLOURS[masks], masks, draw(np.arange(6), 0, 1))
    inside = np.stack([ndimage.maximum_filter(m, 5) == ndimage.minimum_filter(m, 5) for m in labels])
    assert inside.mean() > 0.4 and np.mean(seen.argmax(-1) == labels, where=inside) > 0.999
    assert np.mean(labels == masks, axis=(1, 2)).max() < 0.99


def test_colours_are_those_of_numpy(pets):
    names = ("saturation", "contrast", "brightness", "red", "green", "blue")
    draws = draw(np.arange(6), 0, 1)
    seen, labels = learner(augment=1.5, augment_with="colour").augmented(*pets, draws)
    assert np.array_equal(labels, pets[1])
    grey = np.array([0.299, 0.587, 0.114])
    for image, row, found in zip(pets[0] / 255, draws, seen, strict=True):
        by = {name: 1.5 * (2 * row[DRAWS.index(name)] - 1) for name in names}
        own = (image @ grey)[..., None]
        pale = own + np.exp(0.5 * by["saturation"]) * (image - own)
        flat = own.mean() + np.exp(0.35 * by["contrast"]) * (pale - own.mean())
        expected = flat + 0.2 * by["brightness"] + 0.06 * np.array([by[name] for name in names[3:]])
        assert np.abs(found - 255 * expected.clip(0, 1)).max() < 0.51


def test_blur_is_that_of_scipy(pets):
    draws = numbers(6, blurred=[0.1, 0.2, 0.3, 0.4, 0.6, 0.9], blur=0.75)
    seen, _ = learner(augment=1.0, augment_with="blur").augmented(*pets, draws)
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    smooth = ndimage.convolve1d(ndimage.convolve1d(pets[0].astype(float), kernel, 1), kernel, 2)
    expected = np.where((np.arange(6) < 4)[:, None, None, None], 0.25 * pets[0] + 0.75 * smooth, pets[0])
    assert np.abs(seen - expected).max() < 0.51


def test_a_rectangle_is_cut_out_of_a_share_of_the_pictures(pets):
    draws = numbers(6, cut=[0.1, 0.2, 0.49, 0.51, 0.6, 0.9], cut_height=0.5, cut_width=0.0, cut_y=0.25, cut_x=0.0)
    seen, labels = learner(augment=1.0, augment_with="cutout").augmented(*pets, draws)
    expected = pets[0].astype(float)
    expected[:3, 4:12, :2] = expected[:3].mean((1, 2))[:, None, None]  # a quarter high, an eighth wide, half outside
    assert np.abs(seen - expected).max() < 0.51 and np.array_equal(labels, pets[1])


def test_a_share_of_the_samples_gets_a_rectangle_of_its_neighbour(pets):
    """And padding neither gives nor takes: it has no label then, and a sample stays whole beside it."""
    images, masks = pets[0][:5].copy(), pets[1][:5].copy()
    images[3], masks[3] = 0, IGNORE
    draws = numbers(5, mixed=[0.2, 0.7, 0.1, 0.1, 0.1], mix_area=0.25, mix_y=0.5, mix_x=1.0)
    seen, labels = learner(mix=0.5).augmented(images, masks, draws)
    expected, classes = images.copy(), masks.copy()
    expected[0, 8:24, 24:], classes[0, 8:24, 24:] = images[1, 8:24, 24:], masks[1, 8:24, 24:]
    assert np.array_equal(seen, expected) and np.array_equal(labels, classes)


def test_padding_and_ignored_pixels_stay_ignored(pets):
    images, masks = pets[0].copy(), pets[1].copy()
    images[4:], masks[4:], masks[:, :, :8] = 0, IGNORE, IGNORE
    one = learner(augment=2.0, mix=1.0)
    seen, labels = one.augmented(images, masks, draw(np.array([0, 1, 2, 3, PADDING, PADDING]), 0, 1))
    assert (labels[4:] == IGNORE).all() and not seen[4:].any()
    assert set(np.unique(labels)) == {0, 1, 2, IGNORE} and (labels[:4] == IGNORE).any((1, 2)).all()
    # Those alone give the same gradient, but for rounding.
    draws = draw(np.array([0, 1, 2, 3, PADDING, PADDING]), 0, 1)
    whole = one.gradients(images, masks, 1, draws)
    alone = learner(augment=2.0, mix=1.0, batch_size=4).gradients(images[:4], masks[:4], 1, draws[:4])
    for a, b in zip(whole, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7, rtol=1e-4)


def test_strength_zero_is_without_augmentation_and_numbers_that_change_nothing_do_not(pets):
    plain = learner().gradients(*pets, 1)
    for a, b in zip(plain, learner(augment_with="blur").gradients(*pets, 1, draw(np.arange(6), 0, 1)), strict=True):
        np.testing.assert_array_equal(a, b)
    seen, labels = learner(augment=1.0).augmented(*pets, numbers(6, blurred=0.9, cut=0.9))
    assert np.array_equal(labels, pets[1]) and np.array_equal(seen, pets[0])
    with pytest.raises(ValueError, match="a step needs the draws of its samples"):
        learner(mix=0.5).train_step(*pets, 1)


def test_the_last_part_of_a_run_sees_its_samples_as_they_are(pets):
    varied, plain = learner(augment=1.0, mix=1.0, augment_except_last="40%"), learner()
    losses = []
    for step in range(1, 6):  # of five, of which two are 40 %
        plain.model.set_weights(varied.model.get_weights())
        expected = plain.train_step(*pets, 1).loss
        found = varied.train_step(*pets, step, horizon=Horizon(5, 1), draws=draw(np.arange(6), 0, step)).loss
        losses.append(found == pytest.approx(expected, rel=1e-5))
    assert losses == [False] * 3 + [True] * 2


@pytest.mark.parametrize("part", ["100%", "some", "-1"])
def test_a_last_part_that_is_none_is_refused(part):
    with pytest.raises(InputError, match=f"--augment-except-last {part} is"):
        learner(augment_except_last=part)


def test_a_run_that_is_continued_ends_bit_equal_and_scores_what_is_not_varied(pets, tmp_path):
    settings = unflat(TrainSettings, SMALL | {"augment": 1.0, "mix": 0.5, "learning_rate": 0.01})
    one = Learner(settings.recipe(3))

    def train(epochs: range) -> dict[str, np.ndarray]:
        for epoch in epochs:
            assert one.train_step(*pets, epoch, draws=draw(np.arange(6), 0, epoch)).finite
        return {name: variable.numpy() for name, variable in one.variables().items()}

    Folder(tmp_path).write_text("config.yaml", "")
    checkpoints = Checkpoints(Folder(tmp_path))
    train(range(1, 3))
    name = checkpoints.save(one, state_of(settings, step=2))
    whole = train(range(3, 5))
    one.restart(settings.recipe(3))
    checkpoints.load(name, one)
    for name, value in train(range(3, 5)).items():
        np.testing.assert_array_equal(value, whole[name])
    plain = learner()
    plain.model.set_weights(one.model.get_weights())
    assert all(np.array_equal(a, b) for a, b in zip(one.evaluate(*pets), plain.evaluate(*pets), strict=True))


def test_one_traced_step_serves_every_strength(pets):
    """As a warm process of a sweep uses it."""
    from unet.tuning.trial import Learners

    def train(one: Learner) -> list[np.ndarray]:
        for step in (1, 2):
            one.train_step(*pets, step, draws=draw(np.arange(6), 0, step))
        return [variable.numpy() for variable in one.variables().values()]

    learners = Learners()
    recipes = [unflat(TrainSettings, SMALL | {"augment": a, "mix": m}).recipe(3) for a, m in ((0.4, 0.9), (1.2, 0.3))]
    used = [train(learners.get(recipe)) for recipe in recipes]
    assert len(learners._kept) == 1 and not all(np.array_equal(a, b) for a, b in zip(*used, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(used[1], train(Learner(recipes[1])), strict=True))


def test_wrong_settings_are_refused_in_words():
    for values, words in (
        ({"augment": -1}, "--augment -1: .* greater than or equal to 0"),
        ({"mix": 1.5}, "--mix 1.5: .* less than or equal to 1"),
        ({"augment_with": "zoom"}, f"'zoom' is not known: write NAME .* are {', '.join(TRANSFORMS)}"),
    ):
        with pytest.raises(InputError, match=words):
            unflat(TrainSettings, values)
