"""The loss as a list of terms: one toy second term goes through step, validation and evaluation, against NumPy."""

import numpy as np
import pytest
import toys
from conftest import TINY

from unet.config import TrainSettings, unflat
from unet.data.ingest import Batch
from unet.data.synthetic import draw_pet
from unet.errors import InputError
from unet.recipe import loss as losses
from unet.recipe.loss import LossSettings, parse
from unet.recipe.step import Learner
from unet.training.scoring import score

SMALL = {"image_size": 32, "base_filters": 4, "depth": 2, "batch_size": 6, "dropout": 0.0, "precision": "float32"}
CLASSES = 3


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    toys.add_term(monkeypatch)


@pytest.fixture(scope="module")
def pets():
    """Six pets; one without a label, one in part, and the last row a padding of the batch."""
    images, masks = (np.stack(part) for part in zip(*(draw_pet(i, 32) for i in range(6)), strict=True))
    masks[1], masks[2, :9], masks[5], images[5] = 255, 255, 255, 0
    return images, masks


def learner(**changes) -> Learner:
    return Learner(unflat(TrainSettings, SMALL | {"loss": "cross_entropy+0.5*toy"} | changes).recipe(CLASSES))


def oracle(logits: np.ndarray, masks: np.ndarray) -> float:
    """The whole loss of float64 logits (N, S, S, C), in NumPy."""
    valid = masks != 255
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True))[valid]
    true = p[np.arange(len(p)), masks[valid]]
    return -np.log(true).mean() + 0.5 * (1 - true.sum() / ((p**2).sum() + 1))


def logits_of(one: Learner, images: np.ndarray) -> np.ndarray:
    return one.model(images.astype(np.float32) / np.float32(255), training=False).numpy().astype(np.float64)


def test_a_step_minimises_the_whole_loss_of_the_batch(pets):
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


@pytest.mark.parametrize("shards", [2, 3])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(pets, shards):
    """Which a mean over the parts' own losses would not."""
    whole = learner(dropout=0.3).gradients(*pets, 1)
    parts = learner(dropout=0.3, grad_shards=shards).gradients(*pets, 1)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_validation_takes_the_loss_of_the_whole_split(pets):
    one = learner(batch_size=2)
    batches = [
        Batch(1, step, np.arange(2) + 2 * step, pets[0][i : i + 2], pets[1][i : i + 2])
        for step, i in enumerate((0, 2, 4))
    ]
    found = score(one, batches, 6, ("a", "b", "c"), lambda batch: None)
    assert found["loss"] == pytest.approx(oracle(logits_of(one, pets[0]), pets[1]), rel=1e-5)


def test_evaluation_takes_it_from_the_sums_of_every_image(pets):
    import tensorflow as tf

    from unet.evaluation.scorer import _judge

    one = learner()
    judge = _judge(32, CLASSES, "cross_entropy+0.5*toy")
    _, sums, _ = judge(tf.constant(logits_of(one, pets[0]), tf.float32), pets[1])
    assert sums.shape == (6, one.loss.size)
    found = one.loss.mean_of(sums.numpy().sum(0))
    assert found == pytest.approx(oracle(logits_of(one, pets[0]), pets[1]), rel=1e-5)


def test_float16_scales_and_unscales_it(pets):
    mixed = learner(precision="mixed_float16")
    mixed.loss_scale.assign(64.0)
    for a, b in zip(mixed.gradients(*pets, 1), learner().gradients(*pets, 1), strict=True):
        np.testing.assert_allclose(a, b, atol=0.05 * np.abs(b).max() + 1e-4)


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
@pytest.mark.parametrize("loss", ["cross_entropy", "cross_entropy+0.5*toy", "cross_entropy+cross_entropy"])
def test_a_batch_without_a_label_changes_no_weight_and_is_not_to_blame(pets, loss, precision):
    """Whatever the terms, and in one micro-shard or in all of them."""
    empty = np.full_like(pets[1], 255)
    for shards, masks in ((1, empty), (2, empty), (2, np.concatenate([empty[:3], pets[1][3:]]))):
        one = learner(loss=loss, precision=precision, grad_shards=shards)
        result, scale = one.train_step(pets[0], masks, 1), one.loss_scale.numpy()
        assert result.finite and not result.overflowed and scale == learner(precision=precision).loss_scale.numpy()
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
    "text", ["", "dice", "cross_entropy+", "0*toy", "-1*toy", "cross_entropy*2", "1e400*toy", f"{10**400}*toy"]
)
def test_what_is_no_loss_is_refused_with_those_that_are_known(text):
    with pytest.raises(InputError, match="the names are cross_entropy, toy"):
        unflat(TrainSettings, TINY | {"loss": text})


def test_a_weight_scales_the_gradient_and_nothing_else(pets):
    half, whole = learner(loss="0.5*cross_entropy"), learner(loss="cross_entropy")
    for a, b in zip(half.gradients(*pets, 1), whole.gradients(*pets, 1), strict=True):
        np.testing.assert_array_equal(a, b / 2)
    assert half.train_step(*pets, 1).loss == whole.train_step(*pets, 1).loss / 2


def test_a_loss_of_nothing_is_none():
    loss = losses.Loss(LossSettings(), CLASSES)
    assert loss.mean_of([6.0, 4.0]) == 1.5 and loss.mean_of([0.0, 0.0]) is None
    assert loss.mean_of([float("nan"), 1.0]) is loss.mean_of([float("inf"), 1.0]) is None
