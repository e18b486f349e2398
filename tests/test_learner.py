"""The step and the evaluation of a single worker, against plain NumPy and each other."""

import numpy as np
import pytest

from unet.config import TrainSettings, unflat
from unet.data.ingest import Batch
from unet.data.order import PADDING
from unet.data.synthetic import draw_pet
from unet.recipe.step import LOSS_SCALE_STEPS, Learner
from unet.training.scoring import score

SMALL = {"image_size": 32, "base_filters": 4, "depth": 1, "batch_size": 6, "dropout": 0.0, "precision": "float32"}


@pytest.fixture(scope="module")
def pets():
    drawn = [draw_pet(i, 32) for i in range(6)]
    return np.stack([d[0] for d in drawn]), np.stack([d[1] for d in drawn])


def recipe(classes=3, **changes):
    return unflat(TrainSettings, SMALL | changes).recipe(classes)


@pytest.fixture
def learner(learners):
    """Gives a learner of such settings; the same one again, as new, where they were asked for before."""
    return lambda classes=3, **changes: learners.get(recipe(classes, **changes))


def bits(one) -> bytes:
    return b"".join(w.numpy().tobytes() for w in one.model.weights)


def test_padding_changes_nothing(learner, pets):
    """A short batch, padded and ignored, gives the gradients of the batch alone."""
    images, masks = pets
    padded_images, padded_masks = images.copy(), masks.copy()
    padded_images[4:], padded_masks[4:] = 0, 255
    padded = learner().gradients(padded_images, padded_masks, 1)
    alone = learner(batch_size=4).gradients(images[:4], masks[:4], 1)
    for a, b in zip(padded, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("shards", [2, 3])
def test_micro_shards_make_the_gradient_of_the_batch(learner, pets, shards):
    """With dropout too, whose masks belong to places in the batch; a short batch leaves the last shards empty."""
    images, masks = pets[0].copy(), pets[1].copy()
    images[4:], masks[4:] = 0, 255
    whole = learner(dropout=0.3).gradients(images, masks, 1)
    parts = learner(dropout=0.3, grad_shards=shards).gradients(images, masks, 1)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_dropout_acts_in_training_by_step_and_nowhere_else(learner, pets):
    one, plain = learner(dropout=0.5), learner()
    first, again, second = (np.concatenate([g.ravel() for g in one.gradients(*pets, step)]) for step in (1, 1, 2))
    without = np.concatenate([g.ravel() for g in plain.gradients(*pets, 1)])
    assert bits(one) == bits(plain) and np.array_equal(first, again)
    assert not np.allclose(first, second, atol=1e-4) and not np.allclose(first, without, atol=1e-4)
    assert (one.evaluate(*pets)[1] == plain.evaluate(*pets)[1]).all()
    np.testing.assert_array_equal(one.predict(pets[0]), plain.predict(pets[0]))


@pytest.mark.bfloat16
@pytest.mark.parametrize("classes", [2, 21, 255])
def test_loss_and_confusion_are_those_of_numpy(learner, pets, classes):
    images, masks = pets[0], np.random.default_rng(0).integers(0, classes, pets[1].shape).astype(np.uint8)
    masks[0, :9], masks[1], masks[2, 0, 0] = 255, 255, classes - 1
    one = learner(classes, precision="mixed_bfloat16")
    assert one.train_step(images, masks, 1).loss_sums[1] == 4 * 32 * 32 + 23 * 32
    one.refresh_float32()
    confusion, loss_sums = one.evaluate(images, masks)
    logits = one.float32_model(images.astype(np.float32) / np.float32(255)).numpy().astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    valid = masks != 255
    expected = -np.take_along_axis(log_p, np.where(valid, masks, 0)[..., None], -1)[..., 0][valid].sum()
    assert loss_sums == pytest.approx([expected, valid.sum()], rel=1e-5)
    predicted, counts = logits.argmax(-1), np.zeros((classes, classes), np.int64)
    np.add.at(counts, (masks[valid], predicted[valid]), 1)
    np.testing.assert_array_equal(confusion, counts)
    assert confusion.dtype == np.int64
    np.testing.assert_array_equal(one.predict(images[:3]), predicted[:3])


@pytest.mark.bfloat16
def test_evaluation_of_a_mixed_model_runs_in_float32(learner, pets):
    """The same weights give the very numbers of a float32 model, which a bfloat16 graph would not."""
    mixed, plain = learner(precision="mixed_bfloat16"), learner()
    for weight, source in zip(plain.model.weights, mixed.model.weights, strict=True):
        weight.assign(source)
    mixed.refresh_float32()
    assert (mixed.evaluate(*pets)[1] == plain.evaluate(*pets)[1]).all()


@pytest.mark.parametrize("precision", [pytest.param("mixed_bfloat16", marks=pytest.mark.bfloat16), "mixed_float16"])
def test_a_mixed_model_is_scored_with_the_weights_of_now(learner, pets, precision):
    """And not with those it had when its float32 twin was built, or scored last."""

    def scored(one) -> dict:
        return score(one, [Batch(1, 0, np.arange(6), *pets)], 6, ("pet", "background", "outline"), lambda batch: None)

    mixed, plain = learner(precision=precision, learning_rate=0.01), learner()
    seen = [scored(mixed)]
    for step in (1, 2):
        assert mixed.train_step(*pets, step).finite
        plain.model.set_weights(mixed.model.get_weights())
        seen.append(scored(mixed))
        assert seen[-1] == scored(plain)
    assert len({one["loss"] for one in seen}) == 3


def test_a_split_of_which_an_image_was_not_scored_has_no_score(learner, pets):
    batches = [Batch(1, 0, np.array([0, 1, 2, 3, PADDING, PADDING]), *pets)]
    assert score(learner(), batches, 4, ("a", "b", "c"), lambda batch: None)["images"] == 4
    for images in (3, 5):
        with pytest.raises(RuntimeError, match=f"4 images were scored, there are {images}"):
            score(learner(), batches, images, ("a", "b", "c"), lambda batch: None)


def test_equal_seeds_are_bit_equal_and_others_are_not(pets):
    one, again = (Learner(recipe(seed=1, dropout=0.3)) for _ in range(2))
    assert bits(one) == bits(again) != bits(Learner(recipe(seed=2, dropout=0.3)))
    for step in range(3):
        assert one.train_step(*pets, step + 1) == again.train_step(*pets, step + 1)
    assert bits(one) == bits(again)


def test_float16_halves_its_loss_scale_when_numbers_overflow(learner, pets):
    one = learner(precision="mixed_float16")
    one.loss_scale.assign(2.0**127)
    before = bits(one)
    assert not one.train_step(*pets, 1).finite
    assert bits(one) == before and float(one.loss_scale.numpy()) == 2.0**126
    one.loss_scale.assign(2.0**10)
    assert one.train_step(*pets, 2).finite and bits(one) != before


def test_float16_doubles_its_loss_scale_after_so_many_finite_steps_in_a_row(learner, pets):
    one = learner(precision="mixed_float16")
    one.loss_scale.assign(64.0)
    one.good_steps.assign(LOSS_SCALE_STEPS - 2)
    seen = []
    for step in range(1, 5):
        assert one.train_step(*pets, step).finite
        seen.append((float(one.loss_scale.numpy()), int(one.good_steps.numpy())))
    assert seen == [(64.0, LOSS_SCALE_STEPS - 1), (128.0, 0), (128.0, 1), (128.0, 2)]
    one.loss_scale.assign(2.0**127)  # overflows, and the count begins anew
    assert not one.train_step(*pets, 5).finite and int(one.good_steps.numpy()) == 0


@pytest.mark.bfloat16
def test_only_float16_scales_its_loss(learner, pets):
    for precision in ("float32", "mixed_bfloat16"):
        one = learner(precision=precision)
        assert one.train_step(*pets, 1).finite
        assert (float(one.loss_scale.numpy()), int(one.good_steps.numpy())) == (1.0, 0)


def test_a_loss_scale_is_to_blame_only_for_gradients_and_only_above_the_least(learner, pets):
    one = Learner(recipe(precision="mixed_float16"))  # of its own, since this is traced
    one.batch._unscaled = lambda gradients, sums: [gradient * np.inf for gradient in gradients]
    one.loss_scale.assign(4.0)
    steps = [one.train_step(*pets, step) for step in (1, 2, 3)]
    assert [(result.finite, result.overflowed) for result in steps] == [(False, True), (False, True), (False, False)]
    assert float(one.loss_scale.numpy()) == 1.0
    two = learner(precision="mixed_float16")
    two.model.weights[0].assign(two.model.weights[0] * np.nan)  # no scale would help this loss
    step = two.train_step(*pets, 1)
    assert not step.finite and not step.overflowed


def test_counts_stay_exact_past_what_float32_can_count(learner):
    """More than 2**24 pixels in one batch, an odd number of them in one cell."""
    one = learner(image_size=128, base_filters=1, depth=1, batch_size=1028)
    images, masks = np.zeros((1028, 128, 128, 3), np.uint8), np.ones((1028, 128, 128), np.uint8)
    masks[0, 0, :3] = (255, 0, 2)
    confusion, _ = one.evaluate(images, masks)
    assert confusion[1].sum() == 1028 * 128 * 128 - 3 > 2**24
    assert np.float32(confusion[1].sum()) != confusion[1].sum()  # a float32 counter would not have held it
    assert confusion[0].sum() == confusion[2].sum() == 1


def test_a_restarted_learner_is_a_new_one_bit_for_bit():
    """As a warm process of a sweep uses it: other settings and another width in between, dropout and rate changed."""
    from unet.tuning.trial import Learners

    base = {"image_size": 16, "depth": 1, "batch_size": 4, "base_filters": 4, "precision": "float32"}
    first = unflat(TrainSettings, base | {"dropout": 0.2, "learning_rate": 0.003})
    changes = ({"dropout": 0.4}, {"base_filters": 2}, {"learning_rate": 0.1}, {"dropout": 0.0})
    others = [unflat(TrainSettings, base | {"dropout": 0.2, "learning_rate": 0.003} | o) for o in changes]
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (4, 16, 16, 3), np.uint8), rng.integers(0, 3, (4, 16, 16), np.uint8)

    def train(learner):
        for step in range(1, 4):
            learner.train_step(images, masks, step)
        return [variable.numpy() for variable in learner.variables().values()]

    learners = Learners()
    used = [train(learners.get(settings.recipe(3))) for settings in (first, *others, first)]
    alone = {settings.model.dropout: train(Learner(settings.recipe(3))) for settings in (first, others[-1])}
    for place, dropout in ((0, 0.2), (-1, 0.2), (-2, 0.0)):
        assert all(np.array_equal(a, b) for a, b in zip(alone[dropout], used[place], strict=True)), place
    assert len(learners._kept) == 3  # one network served three of them
    assert not all(np.array_equal(a, b) for a, b in zip(used[0], used[1], strict=True))
