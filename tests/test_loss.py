"""The loss as a list of terms: each against NumPy, and all of them through step, validation and evaluation."""

import re

import numpy as np
import pytest
import toys
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from unet.config import TrainSettings, unflat
from unet.data.ingest import Batch
from unet.data.synthetic import draw_pet
from unet.errors import InputError
from unet.recipe import loss as losses
from unet.recipe.loss import LossSettings, parse, weights_by_frequency
from unet.recipe.step import Learner
from unet.recipe.terms import Dice, Jaccard, Pixels
from unet.training.scoring import score

SMALL = {"image_size": 32, "base_filters": 4, "depth": 1, "batch_size": 6, "dropout": 0.0, "precision": "float32"}
CLASSES = 3
WEIGHTS = "1,0.02,3"
EVERY = {
    "loss": "cross_entropy+0.5*toy+2*focal+jaccard+0.5*dice+lovasz",
    "label_smoothing": 0.1,
    "class_weights": WEIGHTS,
}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    toys.add_term(monkeypatch)


@pytest.fixture(scope="module")
def pets():
    """Six pets; one without a label, one in part, and the last row a padding of the batch."""
    images, masks = (np.stack(part) for part in zip(*(draw_pet(i, 32) for i in range(6)), strict=True))
    masks[1], masks[2, :9], masks[5], images[5] = 255, 255, 255, 0
    return images, masks


@pytest.fixture
def learner(learners):
    """Gives a learner of such settings; the same one again, as new, where they were asked for before."""
    values = SMALL | {"loss": "cross_entropy+0.5*toy"}
    return lambda **changes: learners.get(unflat(TrainSettings, values | changes).recipe(CLASSES))


def oracle(logits: np.ndarray, masks: np.ndarray) -> float:
    """The whole loss of float64 logits (N, S, S, C), in NumPy."""
    valid = masks != 255
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True))[valid]
    true = p[np.arange(len(p)), masks[valid]]
    return -np.log(true).mean() + 0.5 * (1 - true.sum() / ((p**2).sum() + 1))


def logits_of(one: Learner, images: np.ndarray) -> np.ndarray:
    return one.model(images.astype(np.float32) / np.float32(255), training=False).numpy().astype(np.float64)


LOSSES = {
    "cross_entropy": {},
    "smoothed": {"loss": "cross_entropy", "label_smoothing": 0.2},
    "weighted": {"loss": "cross_entropy", "label_smoothing": 0.2, "class_weights": "1,0.02,3,0"},
    "focal": {"loss": "focal"},
    "sharp": {"loss": "focal", "focal_gamma": 0.5, "class_weights": "1,0.02,3,5"},
    "dice": {"loss": "dice"},
    "jaccard": {"loss": "jaccard"},
    "lovasz": {"loss": "lovasz"},
    "sum": {"loss": "cross_entropy+0.5*jaccard+2*lovasz"},
}


def expected(loss: str, logits: np.ndarray, masks: np.ndarray, settings: LossSettings) -> float:
    """A loss of float64 logits (N, S, S, C), from the papers' formulas."""
    classes = logits.shape[-1]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if "+" in loss:
        parts = [part.rpartition("*") for part in loss.split("+")]
        return sum(float(weight or 1) * expected(name, logits, masks, settings) for weight, _, name in parts)
    if loss == "lovasz":
        pairs = [(i, c) for i in range(len(masks)) for c in set(masks[i].flat) - {255}]
        return float(np.mean([lovasz(p[i, ..., c], masks[i], c) for i, c in pairs]))
    p, y = p[masks != 255], masks[masks != 255]
    weights = np.array(list(map(float, (settings.class_weights or "1,1,1,1").split(","))))[y]
    truth = np.eye(classes)[y]
    if loss == "cross_entropy":
        e = settings.label_smoothing
        return float(-((((1 - e) * truth + e / classes) * np.log(p)).sum(1) * weights).sum() / weights.sum())
    true = p[truth == 1]
    if loss == "focal":
        return float(-((1 - true) ** settings.focal_gamma * np.log(true) * weights).sum() / weights.sum())
    found = []
    for c in set(y):
        both, total = p[y == c, c].sum(), p[:, c].sum() + (y == c).sum()
        found.append(1 - (2 * both / total if loss == "dice" else both / (total - both)))
    return float(np.mean(found))


def lovasz(p: np.ndarray, mask: np.ndarray, c: int) -> float:
    """The extension by its definition: one minus the IoU of sets of wrong pixels, which grow by the next worst."""
    errors = {place: abs((mask[place] == c) - p[place]) for place in zip(*np.nonzero(mask != 255), strict=True)}
    true = {place for place in errors if mask[place] == c}
    found, before, wrong = 0.0, 0.0, set()
    for place in sorted(errors, key=lambda place: -errors[place]):
        wrong.add(place)
        now = 1 - len(true - wrong) / len(true | wrong)
        found, before = found + errors[place] * (now - before), now
    return found


@pytest.fixture(scope="module")
def scene():
    """Logits and masks of four classes, of which one is nowhere; an image without a label, two with some ignored."""
    rng = np.random.default_rng(4)
    logits, masks = rng.normal(0, 2, (4, 3, 3, 4)).astype(np.float32), rng.integers(0, 3, (4, 3, 3)).astype(np.uint8)
    masks[1], masks[2, :2], masks[3, 0, 0], masks[3, 1:] = 255, 255, 255, 1
    return logits, masks


def found_of(loss: losses.Loss, logits: np.ndarray, masks: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss and its gradient by the logits, as a step makes them."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        logits = tf.constant(logits)
        tape.watch(logits)
        sums = loss.sums(Pixels.of(logits, tf.constant(masks)))
    gradient = tape.gradient(sums, logits, output_gradients=loss.slopes(sums))
    return float(loss.value(sums)), gradient.numpy()


@pytest.mark.parametrize("values", LOSSES.values(), ids=LOSSES)
def test_each_term_has_the_value_and_the_gradient_of_its_formula(scene, values):
    import tensorflow as tf

    logits, masks = scene
    settings = LossSettings(**values)
    loss = losses.Loss(settings, 4)
    value, gradient = found_of(loss, logits, masks)
    at = logits.astype(np.float64)
    assert value == pytest.approx(expected(settings.loss, at, masks, settings), rel=1e-5)
    slopes = np.zeros(at.size)
    for i in range(at.size):
        step = np.zeros(at.size)
        step[i] = 1e-6
        around = [expected(settings.loss, at + sign * step.reshape(at.shape), masks, settings) for sign in (1, -1)]
        slopes[i] = (around[0] - around[1]) / 2e-6
    np.testing.assert_allclose(gradient, slopes.reshape(at.shape), atol=1e-6)
    assert np.abs(gradient).max() > 1e-3 and not gradient[masks == 255].any()
    by_image = loss.sums(Pixels.of(tf.constant(logits), tf.constant(masks), by_image=True)).numpy()
    assert by_image.shape == (4, loss.size) and loss.mean_of(by_image.sum(0)) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("values", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("sure", [0.0, 1e4])
def test_nothing_and_certainty_have_a_finite_slope(scene, values, sure):
    """Of pixels without a label there is no loss; right ones of which the network is sure cost nothing."""
    loss = losses.Loss(LossSettings(**values), 4)
    value, gradient = found_of(loss, scene[0], np.full_like(scene[1], 255))
    assert np.isnan(value) and not gradient.any()
    right = sure * np.eye(4, dtype=np.float32)[np.minimum(scene[1], 3)]
    value, gradient = found_of(loss, right, scene[1])
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if sure and not values.get("label_smoothing"):
        assert value == pytest.approx(0, abs=1e-6)


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 2, st.integers(0, 9)), min_size=1, max_size=6))
def test_overlaps_of_one_batch_agree_and_leave_absent_classes_out(rows):
    """By class J = D / (2 - D); and a class that is not in the truth changes neither, however much of it is said."""
    both, predicted, true = np.array([(part * min(said * 10, t), said * 10, t) for part, said, t in rows]).T
    dices, jaccards = [], []
    for row in range(len(rows)):
        only = np.arange(len(rows)) == row
        sums = np.concatenate([both * only, predicted, true * only])
        for kind, found in ((Dice, dices), (Jaccard, jaccards)):
            total, count = kind(LossSettings(), len(rows)).mean(sums, np)
            assert count == (true[row] > 0) and (count or total == 0)
            found.append(1 - total)
    dices, jaccards = np.array(dices), np.array(jaccards)
    np.testing.assert_allclose(jaccards, dices / (2 - dices), atol=1e-12)
    if true.any():
        total, count = Dice(LossSettings(), len(rows)).mean(np.concatenate([both, predicted, true]), np)
        assert total / count == pytest.approx(1 - dices[true > 0].mean())


@pytest.mark.parametrize("loss", ["cross_entropy", "lovasz"])
def test_a_mean_alone_is_that_mean_among_others(learner, pets, loss):
    """Alone its gradient is scaled once it was added up, which saves a collective."""
    values = {"class_weights": WEIGHTS, "grad_shards": 2}
    alone, twice = (learner(loss=text, **values) for text in (loss, f"0.5*{loss}+0.5*{loss}"))
    assert alone.loss.is_mean and not twice.loss.is_mean
    for a, b in zip(alone.gradients(*pets, 1), twice.gradients(*pets, 1), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_weights_that_add_up_to_less_than_one_pixel_still_make_a_mean(learner, pets, scene):
    few = np.full_like(pets[1], 255)
    few[0, 3, :5] = 1
    plain, light = ({"loss": "cross_entropy", "class_weights": weights} for weights in (None, "1,1e-6,1"))
    for a, b in zip(*(learner(**values).gradients(pets[0], few, 1) for values in (plain, light)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)
    logits, masks = scene[0][..., :3], few[:4, :3, 3:6]
    masks[0, 0, 0] = 1
    found = [found_of(losses.Loss(LossSettings(**values), 3), logits, masks) for values in (plain, light)]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-6)


def test_a_step_minimises_the_whole_loss_of_the_batch(learner, pets):
    """Value and gradient: along its gradient the loss changes as central differences of the oracle say."""
    one = learner()
    gradients = one.gradients(*pets, 1)
    weights = one.model.trainable_variables
    rng = np.random.default_rng(0)
    for index in (0, 5, len(weights) - 2):
        direction = rng.standard_normal(weights[index].shape).astype(np.float32)
        at = weights[index].numpy()
        found = []
        for shift in (5e-4, -5e-4):
            weights[index].assign(at + shift * direction)
            found.append(oracle(logits_of(one, pets[0]), pets[1]))
        weights[index].assign(at)
        slope = (found[0] - found[1]) / 1e-3
        assert (gradients[index] * direction).sum() == pytest.approx(slope, rel=0.03, abs=2e-4)
    expected = oracle(logits_of(one, pets[0]), pets[1])
    assert one.train_step(*pets, 1).loss == pytest.approx(expected, rel=1e-5)
    assert oracle(logits_of(one, pets[0]), pets[1]) < expected


def test_parts_of_a_batch_give_the_gradient_of_the_whole(learner, pets):
    """Which a mean over the parts' own losses would not."""
    whole = learner(dropout=0.3, **EVERY).gradients(*pets, 1)
    parts = learner(dropout=0.3, grad_shards=3, **EVERY).gradients(*pets, 1)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_validation_takes_the_loss_of_the_whole_split(learner, pets):
    one = learner(batch_size=2)
    batches = [
        Batch(1, step, np.arange(2) + 2 * step, pets[0][i : i + 2], pets[1][i : i + 2])
        for step, i in enumerate((0, 2, 4))
    ]
    found = score(one, batches, 6, ("a", "b", "c"), lambda batch: None)
    assert found["loss"] == pytest.approx(oracle(logits_of(one, pets[0]), pets[1]), rel=1e-5)


def test_evaluation_takes_it_from_the_sums_of_every_image(learner, pets):
    import tensorflow as tf

    from unet.evaluation.scorer import _judge

    one = learner()
    judge = _judge(32, CLASSES, LossSettings(loss="cross_entropy+0.5*toy"))
    _, sums, _ = judge(tf.constant(logits_of(one, pets[0]), tf.float32), pets[1])
    assert sums.shape == (6, one.loss.size)
    found = one.loss.mean_of(sums.numpy().sum(0))
    assert found == pytest.approx(oracle(logits_of(one, pets[0]), pets[1]), rel=1e-5)


def test_float16_scales_and_unscales_it(learner, pets):
    mixed = learner(precision="mixed_float16")
    mixed.loss_scale.assign(64.0)
    for a, b in zip(mixed.gradients(*pets, 1), learner().gradients(*pets, 1), strict=True):
        np.testing.assert_allclose(a, b, atol=0.05 * np.abs(b).max() + 1e-4)


@pytest.mark.parametrize(
    ("loss", "precision"),
    [("cross_entropy", "float32"), ("cross_entropy", "mixed_float16"), (EVERY["loss"], "mixed_float16")],
)
def test_a_batch_without_a_label_changes_no_weight_and_is_not_to_blame(learner, pets, loss, precision):
    """Whatever the terms, and in one micro-shard or in all of them."""
    empty = np.full_like(pets[1], 255)
    for shards, masks in ((1, empty), (2, empty), (2, np.concatenate([empty[:3], pets[1][3:]]))):
        one = learner(loss=loss, precision=precision, grad_shards=shards)
        scale, result = one.loss_scale.numpy(), one.train_step(pets[0], masks, 1)
        assert result.finite and not result.overflowed and scale == one.loss_scale.numpy()
        assert (result.grad_norm == 0) == (masks is empty)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("cross_entropy", [(1, "cross_entropy")]),
        ("0.5*cross_entropy", [(0.5, "cross_entropy")]),
        (" .25 * toy + cross_entropy+3*toy", [(0.25, "toy"), (1, "cross_entropy"), (3, "toy")]),
    ],
)
def test_terms_and_weights_as_they_are_written(text, terms):
    assert parse(text) == terms


@pytest.mark.parametrize(
    "text", ["", "dise", "cross_entropy+", "0*toy", "-1*toy", "cross_entropy*2", "1e400*toy", f"{10**400}*toy"]
)
def test_what_is_no_loss_is_refused_with_those_that_are_known(text):
    with pytest.raises(InputError, match="the names are cross_entropy, focal, dice, jaccard, lovasz, toy"):
        unflat(TrainSettings, TINY | {"loss": text})


def test_a_weight_scales_the_gradient_and_nothing_else(learner, pets):
    half, whole = learner(loss="0.5*cross_entropy"), learner(loss="cross_entropy")
    for a, b in zip(half.gradients(*pets, 1), whole.gradients(*pets, 1), strict=True):
        np.testing.assert_array_equal(a, b / 2)
    assert half.train_step(*pets, 1).loss == whole.train_step(*pets, 1).loss / 2


def test_a_loss_of_nothing_is_none():
    loss = losses.Loss(LossSettings(), CLASSES)
    assert loss.mean_of([6.0, 4.0]) == 1.5 and loss.mean_of([0.0, 0.0]) is None
    assert loss.mean_of([float("nan"), 1.0]) is loss.mean_of([float("inf"), 1.0]) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"label_smoothing": 1.0}, "--label-smoothing 1.0: input should be less than 1"),
        ({"label_smoothing": -0.1}, "--label-smoothing -0.1: input should be greater than or equal to 0"),
        ({"focal_gamma": -1}, "--focal-gamma -1: input should be greater than or equal to 0"),
        ({"class_weights": "1,x,2"}, "--class-weights 1,x,2 are not weights: write auto, or a number of 0 or more"),
        ({"class_weights": "1,-1,2"}, "--class-weights 1,-1,2 are not weights"),
        ({"class_weights": "0,0,0"}, "--class-weights 0,0,0 are not weights"),
        ({"class_weights": "1,nan,1"}, "--class-weights 1,nan,1 are not weights"),
        ({"class_weights": "1e308,1e308,1"}, "--class-weights 1e308,1e308,1 are not weights"),
        ({"class_weights": "1,2"}, "--class-weights 1,2 has 2 numbers, but the data have 3 classes: give one for each"),
    ],
)
def test_wrong_values_are_refused_with_the_flag(values, words):
    with pytest.raises(InputError, match=re.escape(words)):
        unflat(TrainSettings, TINY | values).recipe(CLASSES)


def test_weights_of_classes_are_relative():
    one, other = (LossSettings(class_weights=text).weights(3) for text in ("1,0.5,3", "20,10,60"))
    assert one == pytest.approx([1 / 1.5, 0.5 / 1.5, 3 / 1.5]) and one == pytest.approx(other)
    assert LossSettings().weights(3) is None


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=8))
def test_automatic_weights_fall_with_the_root_of_the_pixels(pixels):
    found = LossSettings(class_weights=weights_by_frequency(np.array(pixels))).weights(len(pixels))
    rarest = min(filter(None, pixels), default=1)
    by_root = np.array(found) * np.sqrt(np.maximum(pixels, rarest))
    assert by_root == pytest.approx(by_root[0], rel=2e-3) and np.mean(found) == pytest.approx(1)
