"""Each optimizer against NumPy, and a training with it that continues bit for bit."""

import numpy as np
import pytest
from conftest import state_of

from unet.config import TrainSettings, unflat
from unet.data.synthetic import draw_pet
from unet.recipe import muon
from unet.recipe.layers import build
from unet.recipe.network import ModelSettings
from unet.recipe.networks import describe
from unet.recipe.optimizer import Optimizer, OptimizerSettings, variable_shapes
from unet.recipe.schedule import Horizon
from unet.recipe.step import Learner
from unet.runs.checkpoint import Checkpoints
from unet.storage import Folder

NETWORK = describe(ModelSettings(base_filters=8, depth=1), 3)
RATE, DECAY = 0.03, 0.2
INSIDE = "bottleneck_conv_1/kernel"


def trajectory(**changes) -> tuple[dict, dict, list[dict], Optimizer]:
    """Weights by name before and after three steps, the gradients of these, and the optimizer."""
    settings = OptimizerSettings(**changes)
    weights = build(NETWORK, 16).trainable_variables
    optimizer = Optimizer(settings, NETWORK.trainable, weights)
    random = np.random.default_rng(3)
    before, gradients = {w.path: w.numpy().astype(np.float64) for w in weights}, []
    for step in range(3):
        gradients.append({w.path: random.normal(size=w.shape).astype(np.float32) for w in weights})
        optimizer.apply(gradients[-1], RATE / (step + 1))  # the rate may change
    assert {k: tuple(v.shape) for k, v in optimizer.variables().items()} == variable_shapes(settings, NETWORK.trainable)
    assert int(optimizer.updates.numpy()) == 3
    return before, {w.path: w.numpy() for w in weights}, gradients, optimizer


def adam(weight, gradients, decay):
    """Kingma and Ba (2015), with the epsilon of before their section 2.1; the decay of Loshchilov and Hutter (2019)."""
    first = second = np.zeros(weight.shape)
    for step, gradient in enumerate(gradients, 1):
        rate = RATE / step
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.astype(np.float64) ** 2
        weight = weight * (1 - rate * decay * (weight.ndim > 1))
        rate *= np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        weight = weight - rate * first / (np.sqrt(second) + 1e-7)
    return weight


def sgd(weight, gradients, decay, momentum):
    """Nesterov's momentum (Sutskever et al., 2013)."""
    velocity = np.zeros(weight.shape)
    for step, gradient in enumerate(gradients, 1):
        rate = RATE / step
        velocity = momentum * velocity - rate * gradient
        weight = weight * (1 - rate * decay * (weight.ndim > 1)) + momentum * velocity - rate * gradient
    return weight


def orthogonal(matrix):
    """The polynomial five times on the singular values, which is what the iteration comes to."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values /= np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


def muon_steps(weight, gradients, decay, momentum):
    shape, rows = weight.shape, int(np.prod(weight.shape[:-1]))
    buffer = np.zeros(shape)
    for step, gradient in enumerate(gradients, 1):
        buffer = momentum * buffer + gradient
        update = orthogonal((gradient + momentum * buffer).reshape(rows, shape[-1])).reshape(shape)
        scale = 0.2 * np.sqrt(max(rows, shape[-1]))
        weight = weight - RATE / step * (scale * update + decay * weight)
    return weight


def check(found, expected):
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, atol=3e-6, err_msg=name)


def test_adam_and_adamw_are_those_of_numpy_and_nothing_but_kernels_decays():
    for changes, decay in (({}, 0), ({"optimizer": "adamw", "weight_decay": DECAY}, DECAY)):
        before, after, gradients, _ = trajectory(**changes)
        check(after, {name: adam(w, [g[name] for g in gradients], decay) for name, w in before.items()})
    assert any(np.any(before[name]) for name in before if name.endswith("kernel"))


@pytest.mark.parametrize(("given", "momentum"), [(None, 0.9), (0.5, 0.5), (0.0, 0.0)])
def test_sgd_is_that_of_numpy(given, momentum):
    before, after, gradients, _ = trajectory(optimizer="sgd", momentum=given, weight_decay=DECAY)
    check(after, {name: sgd(w, [g[name] for g in gradients], DECAY, momentum) for name, w in before.items()})


def test_muon_makes_the_momentum_of_inner_kernels_orthogonal_and_leaves_the_rest_to_adamw():
    before, after, gradients, _ = trajectory(optimizer="muon", weight_decay=DECAY)
    kernels = muon.kernels(NETWORK.trainable)
    assert INSIDE in kernels and "decoder_1_up/kernel" in kernels
    assert not {"encoder_1_conv_1/kernel", "head/kernel", "bottleneck_conv_1/bias"} & set(kernels)
    expected = {name: adam(w, [g[name] for g in gradients], DECAY) for name, w in before.items()}
    for name in kernels:
        expected[name] = muon_steps(before[name], [g[name] for g in gradients], DECAY, 0.95)
    check(after, expected)
    before, after, *_ = trajectory(optimizer="muon")
    rms = np.sqrt(np.mean((after[INSIDE] - before[INSIDE]) ** 2))
    assert 0.5 < rms / (0.2 * RATE) < 1.9  # three steps of about the size of AdamW's


@pytest.mark.parametrize("shape", [(2, 72, 8), (1, 8, 40), (3, 64, 64)])
def test_the_iteration_brings_all_singular_values_near_one(shape):
    matrices = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = muon.orthogonal(matrices).numpy()
    for one, matrix in zip(found, matrices, strict=True):
        np.testing.assert_allclose(one, orthogonal(matrix), atol=2e-4)
        values = np.linalg.svd(one, compute_uv=False)
        assert np.median(values) > 0.65 and values.max() < 1.25
        assert values.min() > 0.65 or shape[1] == shape[2]  # a square one is nearly singular
    assert np.array_equal(muon.orthogonal(matrices).numpy(), found)
    assert not muon.orthogonal(np.zeros(shape, np.float32)).numpy().any()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "sgd"},
        {"optimizer": "muon"},
        pytest.param({"optimizer": "sgd", "freeze": "encoder", "norm": "batch"}, marks=pytest.mark.slow),
        {"optimizer": "adamw", "freeze": "encoder:2", "encoder_rate": 0.1},  # it ends while they are frozen
        {"optimizer": "muon", "freeze": "encoder:1", "encoder_rate": 0.1, "network": "compact", "norm": "batch"},
    ],
    ids=str,
)
def test_a_training_that_continues_is_the_unbroken_one_bit_for_bit(changes, tmp_path):
    """With decay, schedule, warm-up and average."""
    values = {"image_size": 16, "base_filters": 8, "depth": 1, "batch_size": 4, "precision": "float32"}
    values |= changes | {"weight_decay": 0.1, "schedule": "cosine", "warmup": "2", "ema_decay": 0.9}
    settings, horizon = unflat(TrainSettings, values), Horizon(6, 3)
    images, masks = (np.stack(part) for part in zip(*(draw_pet(i, 16) for i in range(4)), strict=True))
    learner = Learner(settings.recipe(3))

    def train(steps) -> dict[str, np.ndarray]:
        for step in steps:
            assert learner.train_step(images, masks, step, horizon=horizon).finite
        return {name: variable.numpy() for name, variable in learner.variables().items()}

    Folder(tmp_path).write_text("config.yaml", "")
    checkpoints = Checkpoints(Folder(tmp_path))
    train((1, 2, 3))
    name = checkpoints.save(learner, state_of(settings, step=3))
    whole = train((4, 5))
    learner.restart(settings.recipe(3))
    checkpoints.load(name, learner)
    continued = train((4, 5))
    assert whole.keys() == continued.keys() == settings.recipe(3).variables.keys()
    assert all(np.array_equal(whole[key], continued[key]) for key in whole)
    assert not np.array_equal(whole["average/head/kernel"], whole["weights/head/kernel"])
