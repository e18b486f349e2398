"""The network's shape and its dropout."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from unet.config import TrainSettings, unflat
from unet.errors import InputError
from unet.recipe.layers import KeyedDropout, build, build_unet
from unet.recipe.network import ModelSettings
from unet.recipe.networks import describe
from unet.recipe.passes import TrainingPass, training_pass


def test_the_reference_network():
    model = build_unet()
    assert model.count_params() == 34_513_475
    assert model.input_shape == (None, 128, 128, 3) and model.output_shape == (None, 128, 128, 3)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert [kinds.count(k) for k in ("Conv2D", "Conv2DTranspose", "MaxPooling2D", "Concatenate", "KeyedDropout")] == [
        19, 4, 4, 4, 8,
    ]  # fmt: skip
    assert {layer.rate for layer in model.layers if isinstance(layer, KeyedDropout)} == {0.3}


def test_the_compact_network():
    model = build(describe(ModelSettings(network="compact", norm="batch", base_filters=32, dropout=0), 3), 128)
    assert model.count_params() == 1_896_780
    widths = [model.get_layer(f"{block}_1_out").output.shape[1:] for block in ("encoder_1", "encoder_4", "bottleneck")]
    assert widths == [(64, 64, 32), (8, 8, 144), (4, 4, 176)]


def test_every_pixel_of_the_compact_network_has_its_own_logits():
    """At full size, in its place: of a shortcut from image to logits each pixel comes back where it was."""
    compact = build(describe(ModelSettings(network="compact", base_filters=1, depth=1), 3), 8)
    image = np.random.default_rng(0).random((1, 8, 8, 3), np.float32)
    squares = compact.get_layer("squares")(image).numpy()
    assert np.array_equal(squares[0, 1, 2, 3:6], image[0, 2, 5])
    assert np.array_equal(compact.get_layer("pixels")(squares).numpy(), image)


CASES = [
    (16, 4, 3, 128, {}),
    (4, 2, 21, 36, {}),
    (3, 1, 2, 16, {"norm": "batch"}),
    (4, 2, 2, 16, {"network": "compact"}),
    (9, 1, 5, 12, {"network": "compact", "norm": "group", "blocks": 2}),
    (3, 2, 2, 16, {"network": "compact", "norm": "batch"}),
]


@pytest.mark.parametrize(("filters", "depth", "classes", "size", "others"), CASES)
def test_settings_shape_it_and_are_counted_without_building(filters, depth, classes, size, others, tmp_path):
    network = describe(ModelSettings(base_filters=filters, depth=depth, **others), classes)
    model = build(network, size)
    assert model.output_shape == (None, size, size, classes)
    assert model.count_params() == network.parameters and size % network.stride == 0
    assert {weight.path: weight.shape for weight in model.weights} == network.variables
    assert {weight.path for weight in model.trainable_variables} == network.trainable.keys()
    kept = {layer.name for layer in network.layers if layer.kind != "relu"}
    outputs = [layer.output.shape for layer in model.layers if layer.name in kept]
    assert network.activations * size**2 == sum(np.prod(shape[1:]) for shape in outputs)
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        for variable in model.weights:
            np.testing.assert_array_equal(file[network.keras_paths[variable.path]], variable.numpy())


def test_a_size_that_the_depth_does_not_divide_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"--image-size 100 is not a multiple of 16 .* 96 and 112"):
        unflat(TrainSettings, {"image_size": 100})
    with pytest.raises(InputError, match=r"is not a multiple of 32 .*--network compact at --depth 4\): .* 96 and 128"):
        unflat(TrainSettings, {"image_size": 112, "network": "compact"})


def dropped(layer, rows, seed=5, step=3, position=0, shape=(6, 6, 10)):
    """Which elements of ones a training pass keeps: bool (rows, *shape)."""
    with training_pass(TrainingPass(seed, tf.constant(step, tf.int64), tf.constant(position, tf.int64))):
        return layer(np.ones((rows, *shape), np.float32), training=True).numpy()


def test_masks_of_a_workers_share_are_those_of_the_whole_batch():
    for shape in ((6, 6, 10), (3, 3, 5)):  # 45 elements do not fill Philox's blocks of eight
        layer = KeyedDropout(0.3, 1)
        whole = dropped(layer, 8, shape=shape)
        shares = [dropped(layer, 4, position=p, shape=shape) for p in (0, 4)]
        assert np.array_equal(whole, np.concatenate(shares))
        assert np.array_equal(dropped(layer, 1, position=5, shape=shape)[0], whole[5])


def test_masks_differ_by_sample_step_seed_and_layer_and_keep_the_mean():
    base = dropped(KeyedDropout(0.3, 1), 64)
    assert len({row.tobytes() for row in base}) == 64
    for other in (
        dropped(KeyedDropout(0.3, 1), 64, step=4),
        dropped(KeyedDropout(0.3, 1), 64, seed=6),
        dropped(KeyedDropout(0.3, 2), 64),
    ):
        agreement = ((base > 0) == (other > 0)).mean()
        assert abs(agreement - (0.7**2 + 0.3**2)) < 0.02  # as for independent draws
    assert abs((base == 0).mean() - 0.3) < 0.01 and abs(base.mean() - 1) < 0.02


def test_no_dropout_outside_training_and_none_without_a_key():
    ones = np.ones((2, 4, 4, 3), np.float32)
    assert (KeyedDropout(0.5, 0)(ones, training=False).numpy() == 1).all()
    with pytest.raises(RuntimeError, match="trains in a pass only"):
        KeyedDropout(0.5, 0)(ones, training=True)


@pytest.mark.bfloat16
def test_mixed_precision_keeps_float32_weights_and_logits():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_unet(16, 2, 1)
    finally:
        keras.config.set_dtype_policy("float32")
    assert {w.dtype for w in model.weights} == {"float32"}
    assert model(np.zeros((1, 16, 16, 3), np.float32)).dtype == tf.float32
    assert model.layers[1].compute_dtype == "bfloat16"
