"""Batch and group norm against NumPy, with padding and ignored pixels, over micro-shards, and when a run continues."""

import numpy as np
import pytest
import tensorflow as tf
import toys
from conftest import state_of

from unet.config import TrainSettings, unflat
from unet.data.synthetic import draw_pet
from unet.recipe.norms import BatchNorm, GroupNorm
from unet.recipe.passes import TrainingPass, training_pass
from unet.recipe.step import Learner
from unet.runs.checkpoint import Checkpoints
from unet.storage import Folder

SMALL = {"image_size": 16, "base_filters": 4, "depth": 1, "batch_size": 6, "dropout": 0.0, "precision": "float32"}
EPSILON, MOMENTUM = 1e-3, 0.75
FIRST = 9 / 11
"""What an average takes of the first step."""
PRECISIONS = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
EACH = ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.bfloat16)]
"""How far, by the largest value, numbers of a dtype may be from those of NumPy in float64."""


@pytest.fixture(scope="module")
def pets():
    """Six of them: one without a label, one in part, and the last two rows are the padding of a short batch."""
    images, masks = (np.stack(part) for part in zip(*(draw_pet(i, 16) for i in range(6)), strict=True))
    masks[2], masks[1, :9] = 255, 255
    images[4:], masks[4:] = 0, 255
    return images, masks


def trained(layer, x, slope, samples=None, step=1):
    """Output, gradients by the input, gamma and beta, and the pass of a training step."""
    step = tf.constant(step, tf.int64)
    with tf.GradientTape() as tape, training_pass(TrainingPass(0, step, step, samples=samples)) as current:
        tape.watch(x)
        y = layer(x, training=True)
    found = tape.gradient(y, [x, layer.gamma.value, layer.beta.value], output_gradients=tf.cast(slope, y.dtype))
    return [tf.cast(value, tf.float64).numpy() for value in (y, *found)], current


def oracle(x, slope, gamma, beta, axes):
    """The same of x (N, H, W, G, C), normalised over axes, in float64."""
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    there = (x - mean) / np.sqrt(variance + EPSILON)
    inner = slope * gamma
    along = inner.mean(axes, keepdims=True) + there * (inner * there).mean(axes, keepdims=True)
    by_scale, by_shift = (part.sum((0, 1, 2)) for part in (slope * there, slope))
    return there * gamma + beta, (inner - along) / np.sqrt(variance + EPSILON), by_scale, by_shift


def given(dtype, channels, rows=6):
    rng = np.random.default_rng(1)
    x = tf.cast(rng.normal(3, 2, (rows, 5, 4, channels)), dtype)
    slope = tf.cast(rng.normal(0, 1, x.shape), dtype)
    return x, tf.cast(x, tf.float64).numpy(), tf.cast(slope, tf.float64).numpy(), rng.normal(1, 0.3, (2, channels))


def close(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.reshape(one.shape), atol=PRECISIONS[dtype] * np.abs(other).max())


@pytest.mark.parametrize("dtype", EACH)
def test_batch_norm_is_that_of_the_rows_up_to_the_last_sample(dtype):
    x, values, slope, (gamma, beta) = given(dtype, 12)
    layer = BatchNorm(MOMENTUM, EPSILON, dtype=f"mixed_{dtype}" if dtype != "float32" else dtype)
    layer.build(x.shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    slope[4:] = 0  # of padding, as the loss has it
    found, current = trained(layer, x, slope, tf.constant([True, False, True, True, False, False]))
    parts = oracle(values[:4, ..., None, :], slope[:4, ..., None, :], gamma, beta, (0, 1, 2))
    y, dx = (np.concatenate([part[..., 0, :], np.zeros((2, 5, 4, 12))]) for part in parts[:2])
    close(found, (y, dx, *parts[2:]), dtype)
    mean, variance = current.moved.values()
    assert float(mean.count) == float(variance.count) == 4 * 5 * 4
    own = values[:4].mean((0, 1, 2)), values[:4].var((0, 1, 2))
    close([mean.total / mean.count, variance.total / variance.count], own, dtype)
    for average in (mean, variance):
        average.move()
    expected = FIRST * own[0], 1 - FIRST + FIRST * own[1]
    close([layer.moving_mean.numpy(), layer.moving_variance.numpy()], expected, dtype)
    scored = (values - expected[0]) / np.sqrt(expected[1] + EPSILON) * gamma + beta
    close([tf.cast(layer(x), tf.float64).numpy()], [scored], dtype)
    assert {w.dtype for w in layer.weights} == {"float32"}


@pytest.mark.parametrize("dtype", EACH)
def test_a_micro_shard_of_padding_is_finite_and_moves_nothing(dtype):
    layer = BatchNorm(MOMENTUM, EPSILON, dtype=f"mixed_{dtype}" if dtype != "float32" else dtype)
    for x in (np.zeros((2, 5, 4, 12)), np.random.default_rng(0).normal(3, 2, (2, 5, 4, 12))):
        found, current = trained(layer, tf.cast(x, dtype), np.zeros((2, 5, 4, 12)), tf.zeros(2, tf.bool))
        assert np.isfinite(found[0]).all() and not any(gradient.any() for gradient in found[1:])
        assert not any(float(m.count) or m.total.numpy().any() for m in current.moved.values())


@pytest.mark.parametrize("dtype", EACH)
@pytest.mark.parametrize(("channels", "size"), [(16, 8), (12, 6), (7, 7)])
def test_group_norm_is_that_of_each_sample(dtype, channels, size):
    x, values, slope, (gamma, beta) = given(dtype, channels)
    layer = GroupNorm(EPSILON, dtype=f"mixed_{dtype}" if dtype != "float32" else dtype)
    layer.build(x.shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    found, current = trained(layer, x, slope)
    apart = (6, 5, 4, channels // size, size)
    own = (gamma.reshape(apart[3:]), beta.reshape(apart[3:]))
    close(found, oracle(values.reshape(apart), slope.reshape(apart), *own, (1, 2, 4)), dtype)
    assert not current.moved


@pytest.fixture
def normed(monkeypatch):
    """The network is a convolution, a batch norm and the head."""
    toys.add_layer(monkeypatch)


def learner(**changes) -> Learner:
    return Learner(unflat(TrainSettings, SMALL | changes).recipe(3))


@pytest.mark.parametrize("shards", [1, 3])
def test_moving_averages_are_those_of_the_micro_shards_by_their_pixels(normed, pets, shards):
    """Of three, the last is padding only: it counts for nothing. They are 0 and 1 before the first step."""
    one = learner(grad_shards=shards)
    outputs = one.model.get_layer("conv")(pets[0].astype(np.float32) / 255).numpy().astype(np.float64)
    own = [rows[rows < 4] for rows in np.array_split(np.arange(6), shards) if (rows < 4).any()]
    # The layer before takes away the mean of those with a label.
    parts = [outputs[rows] - outputs[rows[rows != 2]].mean((0, 1, 2)) for rows in own]
    mean, variance = (
        np.average([statistic(part, axis=(0, 1, 2)) for part in parts], axis=0, weights=[len(part) for part in parts])
        for statistic in (np.mean, np.var)
    )
    assert one.train_step(*pets, 1).finite
    found = {name.rpartition("/")[2]: v.numpy() for name, v in one.variables().items() if "weights/norm" in name}
    np.testing.assert_allclose(found["moving_mean"], FIRST * mean, atol=1e-6)
    np.testing.assert_allclose(found["moving_variance"], 1 - FIRST + FIRST * variance, rtol=1e-5)


def test_moving_averages_soon_forget_their_beginning():
    """Of ones, step by step: the average of them all but for 2/11, 3/12, … at first, then by the layer's own part."""
    layer, value = BatchNorm(MOMENTUM, EPSILON, dtype="float32"), 0.0
    x = tf.ones((2, 5, 4, 12))
    layer.build(x.shape)
    for step in range(1, 30):
        current = trained(layer, x, np.zeros(x.shape), step=step)[1]
        for average in current.moved.values():
            average.move()
        share = min(MOMENTUM, (1 + step) / (10 + step))
        value = share * value + 1 - share
        np.testing.assert_allclose(layer.moving_mean.numpy(), value, rtol=1e-6)


def test_padding_changes_no_gradient(normed, pets):
    images, masks = pets
    padded = learner().gradients(images, masks, 1)
    alone = learner(batch_size=4).gradients(images[:4], masks[:4], 1)
    for a, b in zip(padded, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_a_run_of_the_compact_network_that_continues_ends_bit_equal(pets, tmp_path):
    others = {"network": "compact", "norm": "batch", "dropout": 0.3, "precision": "mixed_float16"}
    settings = unflat(TrainSettings, SMALL | others)
    one = Learner(settings.recipe(3))
    assert one.train_step(*pets, 1).finite
    Folder(tmp_path).write_text("config.yaml", "")
    checkpoints = Checkpoints(Folder(tmp_path))
    name = checkpoints.save(one, state_of(settings, step=1))
    assert one.train_step(*pets, 2).finite
    whole = {name: variable.numpy() for name, variable in one.variables().items()}
    one.restart(settings.recipe(3))
    checkpoints.load(name, one)
    assert one.train_step(*pets, 2).finite
    for name, variable in one.variables().items():
        np.testing.assert_array_equal(variable.numpy(), whole[name], name)
