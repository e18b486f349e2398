"""What a training begins with: encoders known from ImageNet, files of weights, earlier models."""

import itertools
import json
import re
import shutil
import tarfile
from pathlib import Path

import h5py
import keras
import mlflow
import numpy as np
import pytest
import tensorflow as tf
import yaml
from conftest import command, state_of, tiny_settings, train, weights_of, write_archives
from PIL import Image
from torch_files import write_torch

from unet.commands.cli import parse
from unet.config import TrainSettings, TuneSettings, flat, unflat
from unet.data.preparing.resolve import resolve
from unet.data.synthetic import draw_pet
from unet.errors import InputError
from unet.models import imagenet
from unet.models.imagenet import encoder_weights
from unet.models.start import known_of, start_of
from unet.models.torch_file import read_torch
from unet.recipe.layers import DepthwiseConvolution, build
from unet.recipe.network import ModelSettings, is_of_encoder
from unet.recipe.networks import describe
from unet.recipe.schedule import Horizon
from unet.recipe.step import Learner
from unet.runs.checkpoint import Checkpoints
from unet.runs.run import Run
from unet.storage import Folder
from unet.terminal import Display

APPLICATIONS = {
    "mobilenetv3-large": ("MobileNetV3Large", "expanded_conv_14_add", lambda x: x),
    "efficientnetv2-b0": ("EfficientNetV2B0", "block6h_add", lambda x: x),
    "resnet50": ("ResNet50", "conv5_block3_out", keras.applications.resnet.preprocess_input),
}
random = np.random.default_rng(3)


def network_of(encoder: str, **changes):
    values = {"network": "compact", "encoder": encoder, "norm": "batch", "base_filters": 8} | changes
    return describe(ModelSettings(**values), 3)


@pytest.mark.parametrize(
    "encoder",
    ["mobilenetv3-large", *(pytest.param(e, marks=pytest.mark.slow) for e in ("efficientnetv2-b0", "resnet50"))],
)
def test_an_encoder_computes_what_that_of_keras_does_with_the_weights_of_its_file(encoder, tmp_path):
    """Photos in [0, 255], scaled as its publication has it; also of a network that ends earlier."""
    name, last, scaled = APPLICATIONS[encoder]
    theirs = getattr(keras.applications, name)(include_top=False, weights=None, input_shape=(64, 64, 3))
    for weight in theirs.weights:  # kernels as they are drawn: larger ones would swell every rounding
        one = 1 if weight.path.endswith(("gamma", "variance")) else 0
        if len(weight.shape) == 1:
            weight.assign(one + random.uniform(-0.3, 0.3, weight.shape))
    theirs.save_weights(tmp_path / "own.weights.h5")
    network = network_of(encoder)
    start = encoder_weights(encoder, str(tmp_path / "own.weights.h5"), network.variables)
    assert start.keys() == {variable for variable in network.variables if is_of_encoder(variable)}
    own = build(network, 64)
    for weight in own.weights:
        if weight.path in start:
            weight.assign(start[weight.path])
    photos = random.integers(0, 256, (2, 64, 64, 3)).astype(np.float32)
    expected = keras.Model(theirs.inputs, theirs.get_layer(last).output)(scaled(photos.copy())).numpy()
    found = keras.Model(own.inputs, own.get_layer(f"encoder_{last}").output)(photos / 255).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    shorter = network_of(encoder, depth=2)
    part = [layer for layer in shorter.layers if layer.name.startswith("encoder_")]
    assert shorter.stride == 8 and part == list(network.layers[: len(part)])
    with pytest.raises(InputError, match=r"has no weights of|is not for --encoder"):
        other = next(name for name in APPLICATIONS if name != encoder)
        encoder_weights(other, str(tmp_path / "own.weights.h5"), network_of(other).variables)


def test_an_enlarged_picture_is_what_its_encoder_sees():
    """Both networks have equal weights; beyond the first layer one sees at 32 px what the other does at 64 px."""
    enlarging, plain = network_of("efficientnet-lite0", depth=3, encoder_scale=2), network_of("efficientnet-lite0")
    encoder = [{name: s for name, s in n.variables.items() if is_of_encoder(name)} for n in (enlarging, plain)]
    assert encoder[0] == encoder[1] and (enlarging.stride, plain.stride) == (16, 32)
    one, other = build(enlarging, 32), build(plain, 64)
    for weight in other.weights:
        if is_of_encoder(weight.path):
            weight.assign(random.normal(size=weight.shape) / np.sqrt(np.prod(weight.shape[:-1]) or 1))
            if "variance" in weight.path:
                weight.assign(tf.abs(weight) + 0.5)
            next(w for w in one.weights if w.path == weight.path).assign(weight)
    photos = random.uniform(size=(2, 32, 32, 3)).astype(np.float32)
    for block in ("block0_project_norm", "block15_project_norm"):
        found = keras.Model(one.inputs, one.get_layer(f"encoder_{block}").output)(photos).numpy()
        enlarged = tf.image.resize(photos, (64, 64), "bilinear")
        expected = keras.Model(other.inputs, other.get_layer(f"encoder_{block}").output)(enlarged).numpy()
        assert np.ptp(expected) > 0
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert one.output_shape == (None, 32, 32, 3)


def test_lite0_knows_pets(real_pets):
    """With the classifier of its file, worked out in NumPy, it calls pets cats and dogs, by ImageNet's numbers."""
    pytest.importorskip(imagenet.LITE0_PACKAGE)
    with tarfile.open(real_pets / "oxford_pets_128" / "images.tar.gz") as tar:
        files = (tar.extractfile(member) for member in itertools.islice(tar, 500) if member.name.endswith(".jpg"))
        photos = np.stack([np.asarray(Image.open(file).convert("RGB").resize((128, 128))) for file in files][::12])
    photos = photos / np.float32(255)
    network = network_of("efficientnet-lite0")
    model, start = build(network, 128), encoder_weights("efficientnet-lite0", None, network.variables)
    for weight in model.weights:
        if weight.path in start:
            weight.assign(start[weight.path])
    features = keras.Model(model.inputs, model.get_layer("encoder_block15_project_norm").output)(photos).numpy()
    file = read_torch(imagenet._packaged())
    hidden = features @ file["_conv_head.weight"][:, :, 0, 0].T
    hidden = (hidden - file["_bn1.running_mean"]) / np.sqrt(file["_bn1.running_var"] + 1e-3)
    hidden = np.clip(hidden * file["_bn1.weight"] + file["_bn1.bias"], 0, 6).mean((1, 2))
    classes = (hidden @ file["_fc.weight"].T + file["_fc.bias"]).argmax(1)
    assert ((classes >= 151) & (classes <= 285)).mean() > 0.85


def test_keras_downloads_into_its_usual_folder(tmp_path, monkeypatch):
    """A job leaves Keras without a home of its own, since keras.json stands there."""
    asked = []

    def retrieve(url, place, progress=None):
        asked.append((url, place))
        raise OSError("no network")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("keras.src.utils.file_utils.urlretrieve", retrieve)
    for encoder, name in imagenet.KERAS.items():
        with pytest.raises(OSError, match="no network"):
            imagenet._of_keras(name, None)
        url, place = asked.pop()
        assert url.startswith("https://") and Path(place).parent == tmp_path / ".keras" / "models", encoder


def test_a_file_of_keras_that_lacks_a_layer_is_refused(tmp_path):
    """Keras itself would leave that layer as it was drawn, and warn."""
    build_theirs = keras.applications.MobileNetV3Large
    theirs = build_theirs(include_top=False, weights=None, input_shape=(64, 64, 3))
    path = tmp_path / "own.weights.h5"
    theirs.save_weights(path)
    with h5py.File(path, "r+") as file:
        del file["layers/depthwise_conv2d/vars/0"]
    shapes = network_of("mobilenetv3-large").variables
    with pytest.raises(InputError, match=r"own\.weights\.h5 has no weights of mobilenetv3-large that Keras can read"):
        encoder_weights("mobilenetv3-large", str(path), shapes)


def test_weights_of_something_else_are_refused_by_what_they_lack(tmp_path):
    shapes = network_of("efficientnet-lite0").variables
    path = str(write_torch(tmp_path / "w.pth", {"_conv_stem.weight": np.zeros((32, 3, 3, 3), np.float32)}))
    with pytest.raises(
        InputError, match=r"w\.pth is not for --encoder efficientnet-lite0: it needs encoder_stem_norm/"
    ):
        encoder_weights("efficientnet-lite0", path, shapes)
    path = str(write_torch(tmp_path / "w.pth", {"_conv_stem.weight": np.zeros((16, 3, 3, 3), np.float32)}))
    with pytest.raises(
        InputError, match=r"needs encoder_stem/kernel \(3, 3, 3, 32\), and the file has it as \(3, 3, 3, 16"
    ):
        encoder_weights("efficientnet-lite0", path, shapes)


SMALL = {"image_size": 32, "base_filters": 8, "depth": 2, "batch_size": 4, "precision": "float32", "network": "compact"}
SMALL |= {"norm": "batch", "learning_rate": 0.01, "ema_decay": 0.5}


def learner_of(start=None, **changes) -> Learner:
    return Learner(unflat(TrainSettings, SMALL | changes).recipe(3), start=start)


def moved(learner: Learner, steps) -> set[str]:
    """The variables that some steps change, in epochs of two."""
    images, masks = (np.stack(part) for part in zip(*(draw_pet(i, 32) for i in range(4)), strict=True))
    before = {name: variable.numpy() for name, variable in learner.variables().items()}
    for step in steps:
        assert learner.train_step(images, masks, step, horizon=Horizon(10, 2)).finite
    return {
        name for name, variable in learner.variables().items() if not np.array_equal(before[name], variable.numpy())
    }


@pytest.mark.parametrize("optimizer", ["muon", *(pytest.param(o, marks=pytest.mark.slow) for o in ("adamw", "sgd"))])
def test_what_is_frozen_stays_and_goes_by_what_it_has_seen(optimizer):
    """Kernels, norms, their statistics and what the optimizer knows of them; until the epochs are over."""
    learner = learner_of(optimizer=optimizer, freeze="encoder:1", encoder_rate=0.1, weight_decay=0.1)
    own_count = {"optimizer/encoder_iteration"}
    of_encoder = {name for name in learner.variables() if is_of_encoder(name.partition("/")[2])} - own_count
    some = ("stem_norm/moving_mean", "bottleneck_1_conv_1/kernel", "encoder_1_1_norm_1/gamma")
    assert {f"{kind}/{name}" for kind in ("weights", "average") for name in some} <= of_encoder
    rest = learner.variables().keys() - of_encoder - own_count - {"loss_scale", "good_steps"}
    assert moved(learner, (1, 2)) == rest
    assert moved(learner, (3,)) == rest | of_encoder | own_count
    counts = [int(learner.variables()[f"optimizer/{name}"].numpy()) for name in ("iteration", "encoder_iteration")]
    assert counts == [3, 1]
    assert moved(learner_of(optimizer=optimizer, weight_decay=0.1, freeze="encoder"), (1, 9)) == rest


def test_an_encoder_takes_its_part_of_the_rate():
    """By SGD without momentum a tenth of the rate is a tenth of the way."""
    way = {}
    for rate in (1.0, 0.1):
        learner = learner_of(optimizer="sgd", momentum=0.0, encoder_rate=rate)
        before = {w.path: w.numpy() for w in learner.model.trainable_weights}
        moved(learner, (1,))
        way[rate] = {w.path: w.numpy() - before[w.path] for w in learner.model.trainable_weights}
    for name in way[1.0]:
        part = 0.1 if is_of_encoder(name) else 1
        np.testing.assert_allclose(way[0.1][name], part * way[1.0][name], rtol=1e-3, atol=1e-7)


def test_an_encoder_keeps_the_statistics_of_its_file_and_learns_all_else():
    network = network_of("efficientnet-lite0", depth=1)
    shapes = {name: shape for name, shape in network.variables.items() if is_of_encoder(name)}
    start = {name: random.uniform(0.5, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    start |= {name: array - np.float32(0.75) for name, array in start.items() if name.endswith("/kernel")}
    learner = learner_of(start, encoder="efficientnet-lite0", depth=1)
    for name, array in start.items():
        for kind in ("weights", "average"):
            assert np.array_equal(learner.variables()[f"{kind}/{name}"].numpy(), array)
    changed = moved(learner, (1, 2))
    statistics = {f"weights/{name}" for name in start if "/moving_" in name}
    assert statistics and not changed & statistics
    kernels = {f"weights/{name}" for name in start if name.endswith("/kernel")}
    assert len(kernels) > 3 and kernels <= changed, kernels - changed
    learner.restart(learner.recipe)
    assert all(np.array_equal(learner.variables()[f"weights/{name}"].numpy(), array) for name, array in start.items())


def test_frozen_stages_stay_and_all_else_of_an_encoder_learns():
    """Stages are told by the size of what Keras' layers give, of which the first has half that of the picture."""
    network = network_of("efficientnet-lite0", depth=2)
    sides = {layer.name: layer.output.shape[1] for layer in build(network, 32).layers}
    start = {name: random.uniform(0.5, 1, shape).astype(np.float32) for name, shape in network.variables.items()}
    start = {name: array for name, array in start.items() if is_of_encoder(name)}
    start |= {name: array - np.float32(0.75) for name, array in start.items() if name.endswith("/kernel")}
    learner = learner_of(start, encoder="efficientnet-lite0", frozen_stages=2, weight_decay=0.1, optimizer="adamw")
    changed = moved(learner, (1, 2))
    kernels = {f"weights/{name}" for name in start if name.endswith("/kernel")}
    frozen = {name for name in kernels if sides[name.split("/")[1]] >= 8}  # 16 and 8 of 32 pixels
    assert 0 < len(frozen) < len(kernels) and kernels & changed == kernels - frozen
    assert not [name for name in changed if "encoder_" in name and sides[name.split("/")[1]] >= 8]
    assert not [name for name in learner.variables() if name.startswith("optimizer/encoder_stem")]


@pytest.mark.parametrize("strides, size", [(1, 3), (2, 3), (2, 5)])
@pytest.mark.bfloat16
def test_gradients_of_depthwise_convolutions_in_bfloat16_are_those_of_float32(strides, size):
    pixels, kernel = random.normal(size=(2, 8, 8, 4)), random.normal(size=(size, size, 4, 1))
    found = {}
    for policy in ("float32", "mixed_bfloat16"):
        layer = DepthwiseConvolution(size, strides=strides, padding="same", use_bias=False, dtype=policy)
        layer.build((2, 8, 8, 4))
        layer.kernel.assign(tf.cast(tf.cast(kernel, tf.bfloat16), tf.float32))
        inputs = tf.cast(tf.cast(pixels, tf.bfloat16), layer.compute_dtype)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs)
            total = tf.reduce_sum(outputs * tf.cast(tf.range(4), outputs.dtype))
        found[policy] = [outputs, *tape.gradient(total, [inputs, layer.kernel.value])]
    for one, other in zip(*found.values(), strict=True):
        one, other = one.numpy(), tf.cast(other, tf.float32).numpy()
        np.testing.assert_allclose(other, one, rtol=2e-2, atol=2e-2 * np.abs(one).max())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--freeze=encoder"], "--freeze and --encoder-rate are for layers that know something already"),
        (["--encoder-rate=0.5"], "--freeze and --encoder-rate are for layers that know something already"),
        (["--encoder-weights=a.pth"], "a.pth is for an --encoder: name it, too"),
        (["--encoder=resnet50", "--encoder-weights=a.pth"], "There is no file a.pth"),
    ],
)
@pytest.mark.parametrize("job", ["train", "tune"])
def test_nothing_begins_with_what_cannot_be(job, flags, words, tmp_path, capsys):
    assert command(job, "--data=synthetic", "--storage-path", tmp_path, *flags) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_settings_that_do_not_fit_are_one_sentence():
    for changes, words in (
        ({"encoder": "resnet50", "network": "unet", "norm": "none"}, "--encoder resnet50 is for the compact network"),
        ({"encoder": "resnet50", "depth": 5, "image_size": 64}, "--depth 5 is more than an --encoder of ImageNet has"),
        ({"encoder": "resnet50", "depth": 4, "encoder_scale": 2}, "has with --encoder-scale 2: give 3 or less"),
        ({"encoder_scale": 2}, "--encoder-scale 2 is for an --encoder"),
        ({"frozen_stages": 2}, "--frozen-stages 2 is for an --encoder"),
        ({"encoder": "resnet50", "frozen_stages": 3}, "--frozen-stages 3 are all 3 of --encoder with --depth 2"),
        ({"init_from": "a", "encoder_weights": "b.pth"}, "--init-from brings the encoder's weights"),
        ({"freeze": "decoder"}, "--freeze decoder: write encoder:2 for the first two epochs"),
        ({"encoder": "vgg"}, "encoder"),
    ):
        with pytest.raises(InputError, match=words):
            unflat(TrainSettings, SMALL | changes)


def test_a_training_begins_with_what_fits_of_an_earlier_model(trained, storage, packed):
    """Frozen for its only epoch, so that its checkpoint holds the earlier model's encoder, bit for bit."""
    _, before = trained
    changes = {"init_from": "trained", "freeze": "encoder", "epochs": 1, "learning_rate": 1e-4}
    summary = train(storage, packed, run_name="tuned", **changes)
    assert re.fullmatch(r"(\d+) of \1 variables of trained, step_\d+", summary["begins_with"])
    lesson = {"run_name": "trained", "data_digest": before["data_digest"], "prepared": before["prepared"]}
    assert summary["lessons"] == [lesson] and len(summary["begins_with_sha256"]) == 64
    run = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db").get_run(summary["mlflow_run_id"])
    assert run.data.tags["begins_with"] == summary["begins_with"] and run.data.params["freeze"] == "encoder"
    old, new = (weights_of(storage / one["run_name"], Path(one["best_checkpoint"]).name) for one in (before, summary))
    of_encoder = {name for name in old if re.match(r"(encoder_|bottleneck)", name)}
    assert of_encoder and all(np.array_equal(old[name], new[name]) for name in of_encoder)
    assert not np.array_equal(old["head/kernel"], new["head/kernel"])
    assert abs(summary["val"]["mean_iou"] - before["val"]["mean_iou"]) < 0.1  # it knows what the other one does


@pytest.fixture(scope="module")
def prepared(trained, storage, archives):
    return prepared_of(archives, storage)


def prepared_of(folder, storage):
    return resolve(str(folder), 32, "stretch", Folder(storage), Display(quiet=True).working)


def start(storage, prepared, names=("pet", "background", "outline"), **changes):
    settings = tiny_settings(storage, Path("none"), **({"init_from": "trained"} | changes))
    recipe = settings.recipe(len(names))
    return start_of(known_of(settings, recipe, prepared), recipe, names)


def test_the_last_layer_is_drawn_where_classes_differ_and_what_does_not_fit_is_said(storage, prepared):
    found = start(storage, prepared)
    said = r"(\d+) of \1 variables of trained, step_\d+"
    assert "head/kernel" in found.weights and re.fullmatch(said, found.words)
    other = start(storage, prepared, ("pet", "background", "edge"))
    assert other.weights.keys() == {name for name in found.weights if not name.startswith("head/")}
    assert other.words.endswith(", anew: head")
    deeper = start(storage, prepared, depth=3)
    assert 0 < len(deeper.weights) < len(found.weights) and "anew: " in deeper.words
    assert deeper.words.endswith("; another network: depth 3, not 2") and "another" not in found.words
    with pytest.raises(InputError, match=r"Nothing of trained.* \(U-Net, 8 filters\) fits .*\(U-Net, 16 filters\)"):
        start(storage, prepared, base_filters=16)
    with pytest.raises(InputError, match=r"--freeze encoder:1 would keep layers that trained, .* lacks, such as \w+"):
        start(storage, prepared, depth=3, freeze="encoder:1")
    with pytest.raises(InputError, match="neither a run"):
        start(storage, prepared, init_from="nobody")


def test_a_package_begins_with_its_checkpoint_or_is_refused_where_norms_are_folded_away(trained, storage, prepared):
    """Its own weights would do in use, but not in a training, whose norms measure anew."""
    package = str(trained[0] / "model")
    whole, of_package = start(storage, prepared), start(storage, prepared, init_from=package)
    assert of_package.weights.keys() == whole.weights.keys()
    assert all(np.array_equal(of_package.weights[name], array) for name, array in whole.weights.items())
    elsewhere = storage / "elsewhere"
    shutil.copytree(package, elsewhere / "model")
    settings, namesake = tiny_settings(elsewhere, Path("none")), Folder(elsewhere / "trained")
    namesake.write_text("config.yaml", "")
    step = int(Path(trained[1]["best_checkpoint"]).name.removeprefix("step_"))
    Checkpoints(namesake).save(Learner(settings.recipe(3)), state_of(settings, step=step))  # another run's
    alone = start(elsewhere, prepared, init_from=str(elsewhere / "model"))  # it has no norms
    assert all(np.array_equal(alone.weights[name], array) for name, array in whole.weights.items())
    with pytest.raises(InputError, match=r"is a package, whose batch norms are folded away"):
        start(elsewhere, prepared, init_from=str(elsewhere / "model"), norm="batch")


def with_splits_exchanged(archives: Path, copy: Path) -> Path:
    shutil.copytree(archives, copy)
    lists = [copy / "annotations" / f"{name}.txt" for name in ("trainval", "test")]
    for file, content in zip(lists, [file.read_text() for file in reversed(lists)], strict=True):
        file.write_text(content)
    return copy


def test_photos_do_not_change_from_train_to_test(storage, archives, prepared, tmp_path):
    """The same photos with train and test exchanged, under any names; other photos of the same names are others."""
    swapped = with_splits_exchanged(archives, tmp_path / "swapped")
    assert start(storage, prepared)
    said = r"\d+ photos that trained had in train are in test now, such as \w+_\d+: sc"
    with pytest.raises(InputError, match=said):
        start(storage, prepared_of(swapped, storage))
    with pytest.raises(InputError, match=said):
        start(storage, prepared_of(renamed(swapped), storage))
    assert start(storage, prepared_of(write_archives(tmp_path / "others", 21, 90, size=48), storage))


def renamed(archives: Path) -> Path:
    """The same with each photo under another name, from `beagle_3` to `beagle_1003`."""
    for file in (file for file in archives.rglob("*_*") if file.is_file()):
        file.rename(file.with_name(file.name.replace("_", "_100")))
    for file in (archives / "annotations").glob("*.txt"):
        file.write_text(file.read_text().replace("_", "_100"))
    return archives


def test_nor_do_those_of_what_came_before_the_earlier_model(trained, storage, archives, prepared, tmp_path):
    """The model's own data are these very ones; what it had begun with was trained on those of today's test."""
    swapped = with_splits_exchanged(archives, tmp_path / "swapped")
    first = prepared_of(swapped, tmp_path)
    child = shutil.copytree(trained[0], storage / "child")
    lesson = {"run_name": "first", "data_digest": first.manifest.data_digest, "prepared": first.folder.uri}
    (child / "summary.json").write_text(json.dumps(trained[1] | {"lessons": [lesson]}))
    try:
        with pytest.raises(InputError, match=r"\d+ photos that first had in train are in test now"):
            start(storage, prepared, init_from="child")
        (child / "summary.json").write_text(json.dumps(trained[1]))
        assert [lesson["run_name"] for lesson in start(storage, prepared, init_from="child").lessons] == ["child"]
    finally:
        shutil.rmtree(child)


def test_what_a_run_begins_with_stays_the_same_until_its_first_checkpoint(trained, storage, packed):
    begun = {"begins_with": "3 of 3 variables of trained, step_00000001", "begins_with_sha256": "0" * 64}
    Run.load("begun", tiny_settings(storage, packed, run_name="begun", init_from="trained")).start(**begun)
    said = r"The run begun began with 3 of 3 .*, which has changed since; now it is (\d+) of \1 variables of trained, "
    with pytest.raises(InputError, match=said):
        train(storage, packed, run_name="begun", init_from="trained")


def test_a_run_that_has_begun_needs_its_earlier_model_no_more(tmp_path):
    """The same command, which says no network: it is the run's own, unless a flag says otherwise."""
    (tmp_path / "begun").mkdir()
    own = flat(unflat(TrainSettings, SMALL | {"init_from": "gone", "storage_path": str(tmp_path), "run_name": "begun"}))
    (tmp_path / "begun" / "config.yaml").write_text(yaml.safe_dump(own))
    here = [f"--storage-path={tmp_path}", "--init-from=gone"]
    for job in (TrainSettings, TuneSettings):
        found = parse(job, "", [*here, "--run-name=begun"]).model
        assert (found.network, found.base_filters, found.depth, found.norm) == ("compact", 8, 2, "batch")
        assert parse(job, "", [*here, "--run-name=begun", "--depth=3"]).model.depth == 3
        with pytest.raises(InputError, match="neither a run"):
            parse(job, "", [*here, "--run-name=new"])


def test_what_a_run_begins_with_is_found_from_other_folders(trained, storage, tmp_path, monkeypatch):
    checkpoint = trained[0] / trained[1]["best_checkpoint"]
    monkeypatch.chdir(trained[0])
    begin = ["--data=none", f"--storage-path={storage}", "--init-from"]
    assert parse(TrainSettings, "", [*begin, trained[1]["best_checkpoint"]]).start.init_from == str(checkpoint)
    monkeypatch.chdir(storage)  # which holds a folder of that name
    assert parse(TrainSettings, "", [*begin, "trained"]).start.init_from == "trained"
    Path(tmp_path / "w.pth").touch()
    monkeypatch.chdir(tmp_path)
    known = parse(TrainSettings, "", ["--encoder=efficientnet-lite0", "--encoder-weights=w.pth"])
    assert known.start.encoder_weights == str(tmp_path / "w.pth")


def test_what_a_job_begins_with_chooses_its_recipe_and_its_network(trained, storage, tmp_path):
    """A flag is stronger."""

    def parsed(*flags):
        return parse(TrainSettings, "", ["--data=none", f"--storage-path={storage}", *flags])

    known = parsed("--encoder=mobilenetv3-large")
    assert known.command.recipe == "pretrained"
    assert (known.model.encoder, known.model.network) == ("mobilenetv3-large", "compact")
    tuned = parsed("--init-from=trained")
    assert tuned.command.recipe == "finetune" and tuned.optimizer.freeze == "encoder:2"
    assert (tuned.model.network, tuned.model.base_filters, tuned.model.depth, tuned.model.norm) == (
        "unet",
        8,
        2,
        "none",
    )
    assert parsed("--init-from=trained", "--depth=3").model.depth == 3
    assert parsed("--init-from=trained", "--recipe=best").model.network == "unet"
    (tmp_path / "own.yaml").write_text("init_from: trained\nlearning_rate: 0.1\n")
    from_file = parsed(f"--config={tmp_path / 'own.yaml'}")
    assert (from_file.command.recipe, from_file.model.base_filters) == ("finetune", 8)
    off = parsed(f"--config={tmp_path / 'own.yaml'}", "--init-from=None")
    assert (off.command.recipe, off.start.init_from, off.model.network) == ("best", None, "compact")
    with pytest.raises(InputError, match="neither a run"):
        parsed("--init-from=nobody")


def test_a_file_of_keras_may_not_lead_to_another(tmp_path):
    """By a link, or by numbers that lie elsewhere; an array from there would be packaged with the model."""
    with h5py.File(tmp_path / "links.weights.h5", "w") as file:
        file["a"] = h5py.ExternalLink("/etc/hostname", "/")
    (tmp_path / "numbers").write_bytes(bytes(16))
    with h5py.File(tmp_path / "outside.weights.h5", "w") as file:
        file.create_dataset("a", (4,), np.float32, external=[(str(tmp_path / "numbers"), 0, 16)])
    for name, words in (
        ("links", "is a link to somewhere else"),
        ("outside", "is not stored plainly in the file itself"),
    ):
        with pytest.raises(InputError, match=f"a {words}"):
            encoder_weights("resnet50", str(tmp_path / f"{name}.weights.h5"), network_of("resnet50").variables)
