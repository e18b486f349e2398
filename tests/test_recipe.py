"""What the recipe promises to whoever adds to it: a layer with statistics of its own, and traces that are shared."""

import numpy as np
import pytest
import toys
from conftest import state_of

from unet.config import (
    SEARCHABLE,
    EvaluateSettings,
    ExportSettings,
    PredictSettings,
    PrepareSettings,
    TrainSettings,
    TuneSettings,
    flat,
    unflat,
)
from unet.data.synthetic import draw_pet
from unet.errors import RunFailed
from unet.models.trained import TrainedModel
from unet.recipe import network, recipe
from unet.recipe.network import Kind
from unet.recipe.recipe import PARTS, traced_key
from unet.recipe.step import Learner
from unet.runs.checkpoint import Checkpoints
from unet.storage import Folder

SMALL = {"image_size": 16, "base_filters": 4, "depth": 2, "batch_size": 6, "dropout": 0.0, "precision": "float32"}


@pytest.fixture
def centred(monkeypatch):
    toys.add_layer(monkeypatch)


@pytest.fixture(scope="module")
def pets():
    """Six of them, of which the last two rows are the padding of a short batch."""
    images, masks = (np.stack(part) for part in zip(*(draw_pet(i, 16) for i in range(6)), strict=True))
    images[4:], masks[4:] = 0, 255
    return images, masks


def learner(**changes) -> Learner:
    return Learner(unflat(TrainSettings, SMALL | changes).recipe(3))


def test_a_layer_that_is_added_is_described_and_trained_but_for_its_statistics(centred):
    one = learner()
    assert {name: tuple(variable.shape) for name, variable in one.variables().items()} == one.recipe.variables
    assert "weights/centre/moving_mean" in one.recipe.variables
    assert not any("moving_mean" in name for name in one.recipe.variables if name.startswith("optimizer/"))
    assert one.recipe.network.keras_paths["centre/moving_mean"] == "layers/centring/vars/0"


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_moving_average_follows_the_mean_of_the_whole_batch(centred, pets, shards):
    """Whatever the micro-shards, of which the last may hold padding only; and padding counts for nothing."""
    one = learner(grad_shards=shards)
    convolve = one.model.get_layer("conv")
    expected = np.zeros(4)
    for step in (1, 2, 3):
        outputs = convolve(pets[0][:4].astype(np.float32) / 255).numpy().astype(np.float64)
        expected = toys.MOMENTUM * expected + (1 - toys.MOMENTUM) * outputs.mean((0, 1, 2))
        assert one.train_step(*pets, step).finite
        np.testing.assert_allclose(one.variables()["weights/centre/moving_mean"].numpy(), expected, atol=1e-6)


def test_it_is_saved_restored_and_scored_like_every_weight(centred, pets, tmp_path):
    settings = unflat(TrainSettings, SMALL | {"precision": "mixed_float16"})
    one, other = (Learner(settings.recipe(3)) for _ in range(2))
    one.train_step(*pets, 1)
    Folder(tmp_path).write_text("config.yaml", "")
    checkpoints = Checkpoints(Folder(tmp_path))
    checkpoints.load(checkpoints.save(one, state_of(settings, step=1)), other)
    mean = one.variables()["weights/centre/moving_mean"].numpy()
    assert mean.any() and np.array_equal(other.variables()["weights/centre/moving_mean"].numpy(), mean)
    other.refresh_float32()
    assert np.array_equal(other.float32_model.get_layer("centre").mean.numpy(), mean)
    one.restart(one.recipe)
    assert not one.variables()["weights/centre/moving_mean"].numpy().any()


def test_a_step_that_is_passed_over_moves_nothing(centred, pets):
    one = learner(precision="mixed_float16", ema_decay=0.5)
    one.loss_scale.assign(2.0**127)
    before = {name: variable.numpy() for name, variable in one.variables().items()}
    assert not one.train_step(*pets, 1).finite
    after = {name: variable.numpy() for name, variable in one.variables().items()}
    assert not after["weights/centre/moving_mean"].any() and before["loss_scale"] > after["loss_scale"]
    for name in before.keys() - {"loss_scale"}:
        np.testing.assert_array_equal(before[name], after[name])


def test_a_layer_asks_for_its_pass_in_words(centred):
    with pytest.raises(RuntimeError, match=r"call the model inside `training_pass"):
        learner().model(np.zeros((1, 16, 16, 3), np.float32), training=True)


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_averages_are_scored_packaged_and_continued_with(centred, pets, tmp_path, precision):
    """They stand for the weights, by the recipe's names: nothing outside of it is told."""
    changes = {"precision": precision, "learning_rate": 0.01, "ema_decay": 0.2, "grad_shards": 2}
    settings = unflat(TrainSettings, SMALL | changes)
    one, other = (Learner(settings.recipe(3)) for _ in range(2))
    names = ("head/kernel", "centre/moving_mean")  # what a norm follows is averaged too
    weights = {name: one.variables()[f"weights/{name}"] for name in names}
    expected = {name: weight.numpy() for name, weight in weights.items()}
    for number, decay in ((1, 2 / 11), (2, 0.2), (3, 0.2)):
        assert one.train_step(*pets, number).finite
        expected = {name: decay * expected[name] + (1 - decay) * weights[name].numpy() for name in names}
    one.refresh_float32()
    scored = {weight.path: weight.numpy() for weight in one.float32_model.weights}
    for name in names:
        np.testing.assert_allclose(scored[name], expected[name], atol=1e-6)
        assert not np.array_equal(scored[name], weights[name].numpy())
    Folder(tmp_path).write_text("config.yaml", "")
    checkpoints = Checkpoints(Folder(tmp_path))
    name = checkpoints.save(one, state_of(settings, step=3))
    packaged = TrainedModel.of_checkpoint(Folder(tmp_path), name).weights
    assert packaged.keys() == scored.keys()
    assert all(np.array_equal(packaged[key], scored[key]) for key in scored)
    checkpoints.load(name, other)
    assert one.train_step(*pets, 4).finite and other.train_step(*pets, 4).finite
    for key, variable in other.variables().items():
        np.testing.assert_array_equal(variable.numpy(), one.variables()[key].numpy())


def test_variables_that_are_not_described_are_refused_before_the_first_step(centred, monkeypatch):
    monkeypatch.setitem(network.KINDS, "centring", Kind("centring"))
    with pytest.raises(RunFailed, match="weights/centre/moving_mean as absent, but model or optimizer have it as"):
        learner()


def test_no_setting_has_the_name_of_another():
    """The command line, files and spaces know settings by name alone."""
    for settings in (TuneSettings, PrepareSettings, EvaluateSettings, PredictSettings, ExportSettings):
        names = [name for part in settings.model_fields.values() for name in part.annotation.model_fields]
        assert len(names) == len(set(names))


OTHER = {
    "network": "compact",
    "encoder": "mobilenetv3-large",
    "encoder_scale": 2,
    "frozen_stages": 1,
    "base_filters": 8,
    "depth": 1,
    "blocks": 2,
    "norm": "batch",
    "dropout": 0.5,
    "epochs": 11,
    "batch_size": 12,
    "precision": "mixed_float16",
    "on_nan": "skip",
    "patience": 3,
    "grad_shards": 2,
    "seed": 1,
    "optimizer": "muon",
    "learning_rate": 0.5,
    "schedule": "cosine",
    "warmup": "5%",
    "weight_decay": 0.01,
    "momentum": 0.8,
    "clip_norm": 1.0,
    "ema_decay": 0.9,
    "encoder_rate": 0.5,
    "freeze": "encoder:2",
    "loss": "0.5*cross_entropy",
    "label_smoothing": 0.1,
    "focal_gamma": 1.0,
    "class_weights": "1,0.5,2",
    "augment": 0.5,
    "augment_with": "rotate+0.5*colour",
    "augment_except_last": "10%",
    "mix": 0.25,
    "encoder_weights": "own.weights.h5",
}
"""Another value of each setting of a recipe, but for `init_from`, which leaves no room for `encoder_weights`."""
KNOWN = {"network": "compact", "encoder": "resnet50", "depth": 2}
WITH = {"encoder": {"network": "compact"}} | dict.fromkeys(("encoder_weights", "encoder_scale", "frozen_stages"), KNOWN)
"""What some of them ask for."""


def test_a_trace_is_shared_only_where_all_settings_but_those_of_each_step_are_equal():
    """A setting that is new is to be added here; it costs a trace of its own until somebody shows that it need not."""
    names = {name for part in PARTS.values() for name in part.model_fields}
    assert names == OTHER.keys() | {"init_from"} and names >= SEARCHABLE
    base = {"dropout": 0.25, "augment": 0.25, "mix": 0.5, "image_size": 32}
    base |= {"optimizer": "sgd"}  # with which each of the others goes

    def key(**changes) -> str:
        return traced_key(unflat(TrainSettings, base | changes).recipe(3))

    given = {name: WITH.get(name, {}) for name in OTHER}
    shared = {name for name, value in OTHER.items() if key(**given[name], **{name: value}) == key(**given[name])}
    assert key(init_from="a") != key()
    assert shared == {
        "learning_rate",
        "schedule",
        "warmup",
        "dropout",
        "augment",
        "augment_except_last",
        "mix",
    }  # a restarted learner is compared with a new one in test_learner
    assert all(key(**{name: 0.0}) != key() for name in ("dropout", "augment", "mix")) and key(image_size=64) != key()
    assert traced_key(unflat(TrainSettings, base).recipe(4)) != key()
    other_machine = {"storage_path": "/tmp/other", "run_name": "other", "num_workers": 1, "threads": 7}
    assert key(**other_machine) == key()


def test_a_recipe_is_what_its_saved_settings_say():
    settings = unflat(TrainSettings, OTHER | {"image_size": 64})
    assert recipe.Recipe.of(flat(settings), 3) == settings.recipe(3)
