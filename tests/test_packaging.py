"""What is handed on, against Pillow and resizing written down again."""

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from dataclasses import replace

import mlflow
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, state_of
from pages import pets, write_prepared
from PIL import Image

import unet
from unet.classes import ClassInfo
from unet.config import ExportSettings, TrainSettings, unflat
from unet.data.resize import ignore_padding, letterbox_box
from unet.data.synthetic import draw_pet
from unet.errors import InputError
from unet.models.inference import Network as Inference
from unet.models.trained import TrainedModel
from unet.packaging.compare import agreement, squares
from unet.packaging.export import Disagreement, export, target_of
from unet.packaging.forms import FORMS, exportable
from unet.packaging.model import package
from unet.prediction.resizing import as_network_input
from unet.recipe.step import Learner
from unet.runs.checkpoint import Checkpoints
from unet.storage import Folder
from unet.terminal import Display

SETTINGS = {"image_size": 32, "base_filters": 4, "depth": 2, "batch_size": 2, "learning_rate": 0.01}
pytestmark = pytest.mark.bfloat16
CLASSES = [ClassInfo(name, (0, 0, 0)) for name in "abcde"]


@pytest.mark.parametrize(
    ("photo", "box"),
    [
        ((37, 91), (9, 0, 13, 32)),
        ((91, 37), (0, 9, 32, 13)),
        ((32, 32), (0, 0, 32, 32)),
        ((33, 64), (7, 0, 17, 32)),  # 16.5 rows are rounded up
        ((1, 1000), (15, 0, 1, 32)),
    ],
)
def test_the_box_of_a_photo(photo, box):
    assert letterbox_box(*photo, 32) == box
    top, left, height, width = box
    expected = np.pad(
        np.full((height, width), 3), ((top, 32 - top - height), (left, 32 - left - width)), constant_values=255
    )
    assert np.array_equal(ignore_padding(np.full((32, 32), 3, np.uint8), *photo), expected)


def enlarged(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 (h, w, C) at another size: bilinear, the centres of pixels at halves, the border kept."""
    for axis, side in enumerate((height, width)):
        last = values.shape[axis] - 1
        at = np.clip((np.arange(side) + 0.5) * (last + 1) / side - 0.5, 0, last)
        below = np.floor(at).astype(int)
        share = np.expand_dims((at - below).astype(np.float32), [a for a in range(3) if a != axis])
        values = values.take(below, axis) * (1 - share) + values.take(np.minimum(below + 1, last), axis) * share
    return values


class Handed:
    """A letterboxing network trained in bfloat16, its learner, and all that is handed on of it."""

    def __init__(self, folder):
        settings = unflat(TrainSettings, SETTINGS | {"resize": "letterbox", "precision": "mixed_bfloat16"})
        self.learner, self.folder = Learner(settings.recipe(len(CLASSES))), folder
        pets = [draw_pet(i, 32) for i in range(2)]
        images, masks = (np.stack(part) for part in zip(*pets, strict=True))
        masks[:, :6, :9], masks[:, 20:, 25:] = 3, 4
        for step in range(1, 61):
            self.learner.train_step(images, masks, step)
        self.learner.refresh_float32()
        run = Folder(folder / "run")
        run.write_text("config.yaml", "")
        state = state_of(settings, classes=CLASSES)
        self.trained = TrainedModel.of_checkpoint(run, Checkpoints(run).save(self.learner, state))
        for file, content in package(self.trained).items():
            Folder(folder / "model").write_bytes(file, content)
        self.packaged = mlflow.pyfunc.load_model(str(folder / "model"))
        self.segmenter = unet.load(f"{folder}/run/checkpoints/{self.trained.checkpoint}")

    def export(self, formats, target):
        settings = unflat(ExportSettings, {"formats": formats, "output": str(target), "debug": True})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("unet.cluster.devices.start_tensorflow", lambda threads: None)  # it has begun here
            return export(settings, self.trained, Folder(target), Display(quiet=True))

    def probabilities(self, photo: Image.Image) -> np.ndarray:
        """What the training's network says of a photo at its own size, resized by Pillow and by hand."""
        top, left, height, width = letterbox_box(photo.height, photo.width, 32)
        small = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        square = np.pad(small, ((top, 32 - top - height), (left, 32 - left - width), (0, 0)))
        found = tf.nn.softmax(self.learner.float32_model(square[None] / np.float32(255))).numpy()[0]
        return enlarged(found[top : top + height, left : left + width], photo.height, photo.width)


@pytest.fixture(scope="module")
def handed(tmp_path_factory):
    return Handed(tmp_path_factory.mktemp("handed"))


@pytest.fixture(scope="module")
def exported(handed):
    """Its export's folder, and what `export` says of it."""
    told = handed.export(("saved_model", "tflite", "onnx"), handed.folder / "export")
    return handed.folder / "export", told


def test_the_library_computes_without_tf32_and_leaves_it_as_it_was(handed, monkeypatch):
    """The process is another's: what it set for itself holds before and after a prediction."""
    config, states, ids = tf.config.experimental, [], handed.segmenter._ids

    def noting(photos):
        states.append(config.tensor_float_32_execution_enabled())
        return ids(photos)

    monkeypatch.setattr(handed.segmenter, "_ids", noting)
    before = config.tensor_float_32_execution_enabled()
    try:
        for chosen in (True, False):
            config.enable_tensor_float_32_execution(chosen)
            handed.segmenter.predict(np.zeros((4, 4, 3), np.uint8))
            assert config.tensor_float_32_execution_enabled() == chosen
    finally:
        config.enable_tensor_float_32_execution(before)
    assert states == [False, False]


@pytest.fixture(params=["drawn", "real"])
def photos(request) -> list[Image.Image]:
    """Photos of odd sizes."""
    if request.param == "drawn":
        sizes = ((91, 37), (37, 91), (33, 64), (200, 150), (300, 77), (31, 32))
        return [Image.fromarray(draw_pet(i, 100)[0]).resize(size) for i, size in enumerate(sizes)]
    with tarfile.open(request.getfixturevalue("real_pets") / "oxford_pets_original" / "images.tar.gz") as tar:
        members = [m for m in tar if m.name.endswith(".jpg")][::20]
        return [Image.open(tar.extractfile(m)).convert("RGB") for m in members]


@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
def test_the_graph_makes_the_pixels_that_training_saw(photos, resize):
    """Pillow's, but for values that lie between two levels: a resize in one step differs in 12 % of them.

    Of photos that are not tall: Pillow 13 reduces the height of some tall ones first.
    """
    differ = values = 0
    for photo in [photo for photo in photos if photo.width > photo.height][:6]:
        top, left, height, width = letterbox_box(*photo.size[::-1], 32) if resize == "letterbox" else (0, 0, 32, 32)
        small = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR), np.int32)
        expected = np.pad(small, ((top, 32 - top - height), (left, 32 - left - width), (0, 0)))
        found = as_network_input(np.asarray(photo)[None], 32, resize).numpy()[0]
        off = np.abs(np.rint(found * 255).astype(int) - expected)
        assert found.dtype == np.float32 and off.max() <= 1
        differ, values = differ + np.count_nonzero(off), values + off.size
    assert values > 0 and differ < 0.02 * values, differ / values


def test_the_packaged_model_and_the_library_agree_with_the_training(handed, photos):
    """A model trained in bfloat16, over photos of odd sizes, on 99.9 % of the pixels at least."""
    equal = Counter()
    for photo in photos:
        expected, pixels = handed.probabilities(photo), np.asarray(photo)
        packaged = handed.packaged.predict(pixels[None])
        assert packaged.dtype == np.uint8 and packaged.shape == (1, photo.height, photo.width)
        library = handed.segmenter.predict(pixels)
        assert library.dtype == np.uint8 and library.shape == (photo.height, photo.width)
        probabilities = handed.segmenter.probabilities(pixels)
        assert probabilities.dtype == np.float32 and np.abs(probabilities - expected).mean() < 1e-3
        mask = expected.argmax(-1)
        equal["packaged"] += (packaged[0] == mask).sum()
        equal["library"] += (library == mask).sum()
        equal["all"] += mask.size
        equal[f"found {len(np.unique(mask))}"] += 1
    assert equal["found 1"] < len(photos), "the network is to say something"
    assert min(equal["packaged"], equal["library"]) >= 0.999 * equal["all"], equal


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("form", ["model.onnx", "model.tflite", "saved_model"])
def test_an_export_used_as_its_readme_says_agrees_with_the_training(handed, exported, photos, form, monkeypatch):
    folder, _ = exported
    before, *forms, after = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (chosen,) = [code for code in forms if f'"{form}"' in code]
    code = "\n".join((before, chosen, after))
    monkeypatch.chdir(folder)
    equal = total = 0
    for photo in photos[:4]:
        photo.save(folder / "photo.jpg", format="PNG")  # whose pixels come back as they are
        namespace = {}
        exec(code, namespace)
        mask = handed.probabilities(photo).argmax(-1)
        assert namespace["mask"].dtype == np.uint8 and namespace["mask"].shape == mask.shape
        equal, total = equal + (namespace["mask"] == mask).sum(), total + mask.size
    assert equal >= 0.999 * total, (equal, total)


HANDED_ON = [
    {"network": "compact", "norm": "batch"},
    {"network": "compact", "norm": "group"},
    {"network": "compact", "norm": "group", "encoder": "efficientnet-lite0", "encoder_scale": 2},
    *(
        pytest.param(one, marks=pytest.mark.slow)
        for one in (
            {"network": "compact", "norm": "none"},
            {"network": "unet", "norm": "batch"},
            {"network": "unet", "norm": "group"},
            {"network": "compact", "norm": "batch", "encoder": "mobilenetv3-large"},
            {"network": "compact", "norm": "batch", "encoder": "efficientnetv2-b0"},
            {"network": "compact", "norm": "batch", "encoder": "resnet50"},
        )
    ),
]


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("network", HANDED_ON, ids=lambda network: "-".join(map(str, network.values())))
def test_every_network_and_norm_is_handed_on_as_it_is_scored(network, tmp_path):
    """With batch norms folded: package and forms give the classes of the network that training scores with."""
    own = {"depth": 2 if "encoder" in network else 1, "precision": "float32"} | network
    settings, rng = unflat(TrainSettings, SETTINGS | own), np.random.default_rng(0)
    learner, run = Learner(settings.recipe(len(CLASSES))), Folder(tmp_path / "run")
    for name, weight in learner.variables().items():
        if name.endswith(("gamma", "beta", "moving_mean", "moving_variance")) and name.startswith("weights/"):
            around = 1 if name.endswith(("gamma", "moving_variance")) else 0
            weight.assign(around + rng.uniform(-0.5, 0.5, weight.shape))
    run.write_text("config.yaml", "")
    name = Checkpoints(run).save(learner, state_of(settings, classes=CLASSES))
    trained = TrainedModel.of_checkpoint(run, name)
    assert not any("moving" in name for name in trained.weights)
    images = np.stack([draw_pet(i, 32)[0] for i in range(8)])
    expected = learner.float32_model(images.astype(np.float32) / 255).numpy()
    assert len(np.unique(expected.argmax(-1))) > 1, "the network is to say something"
    found = Inference(trained)
    np.testing.assert_allclose(found.logits(images), expected, atol=1e-4 * np.abs(expected).max())
    truth = [tf.nn.softmax(logits[None]).numpy() for logits in expected]
    for form in (FORMS[name] for name in ("saved_model", "tflite", "onnx")):
        form.write(exportable(found), tmp_path / form.file, images)
        seen = agreement(form.open(tmp_path / form.file, 1), images, truth)
        assert seen.equal_classes >= 0.999 and seen.max_difference < 1e-4, (form.file, seen)
    for file, content in package(trained).items():
        Folder(tmp_path / "model").write_bytes(file, content)
    masks = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(images)
    assert (masks == expected.argmax(-1)).mean() >= 0.999
    again = TrainedModel.find(str(tmp_path / "model"), Folder(tmp_path))
    assert again.description == trained.description and again.weights.keys() == trained.weights.keys()
    assert all(np.array_equal(again.weights[key], trained.weights[key]) for key in again.weights)


def test_an_export_says_what_it_is(exported, handed):
    folder, told = exported
    assert told == json.loads((folder / "export.json").read_text())
    assert told["model"]["classes"] == list("abcde") and told["model"]["resize"] == "letterbox"
    assert told["input"]["shape"] == [None, 32, 32, 3] and told["output"]["shape"] == [None, 32, 32, 5]
    for seen in told["formats"].values():
        assert seen["equal_classes"] > 0.9999 and seen["max_difference"] < 1e-5 and seen["ms"] > 0
        sizes = [(folder / file).stat().st_size for file in seen["sha256"]]
        assert sum(sizes) == seen["bytes"]
        for file, digest in seen["sha256"].items():
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
    weights = sum(w.nbytes for w in handed.trained.weights.values())
    assert told["formats"]["saved_model"]["bytes"] < 2 * weights + 300_000, "the weights are in it once"
    with pytest.raises(InputError, match="holds something else"):
        settings = unflat(ExportSettings, {"output": str(handed.folder)})
        target_of(settings, handed.trained)
    with pytest.raises(InputError, match="give another --output"):
        target_of(unflat(ExportSettings, {"output": str(folder / "export.json")}), handed.trained)


def test_smaller_forms_answer_nearly_alike(handed, tmp_path):
    told = handed.export(("tflite", "tflite_float16", "tflite_int8"), tmp_path / "export")["formats"]
    whole, half, quarter = (told[name] for name in ("tflite", "tflite_float16", "tflite_int8"))
    weights = sum(w.nbytes for w in handed.trained.weights.values())  # of so small a network they are not all of a file
    assert half["bytes"] < whole["bytes"] - 0.3 * weights, (half["bytes"], whole["bytes"], weights)
    assert quarter["bytes"] < whole["bytes"] - 0.3 * weights, (quarter["bytes"], whole["bytes"], weights)
    assert half["equal_classes"] >= 0.995 and 0.97 <= quarter["equal_classes"] < 1
    assert (tmp_path / "export" / "model_int8.tflite").stat().st_size == quarter["bytes"]
    assert 'Interpreter("model_int8.tflite")' in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.parametrize(("val", "source"), [(0, "train"), (30, "val and train"), (120, "val")])
def test_forms_are_compared_on_photos_of_train_where_val_has_few(handed, tmp_path, val, source, monkeypatch):
    """The ranges of eight bits come from them, and a handful of own photos may have no val at all."""
    rows = [row | {"split": "val" if i < val else "train"} for i, row in enumerate(pets(val + 100))]
    data = write_prepared(tmp_path / "data", rows)
    monkeypatch.setattr("unet.packaging.compare.open_data", lambda run, digest: data)
    photos, said = squares(None, handed.trained, print)
    assert photos.shape == (max(val, 100), 32, 32, 3) and said == f"{source} of {tmp_path / 'data'}"
    in_val = {row["image"].tobytes() for row in rows[:val]}
    assert in_val <= {photo.tobytes() for photo in photos}


def test_forms_of_an_older_export_do_not_stay(handed, exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "export")
    (tmp_path / "export" / "notes.txt").write_text("mine")
    handed.export(("tflite",), tmp_path / "export")
    left = {p.name for p in (tmp_path / "export").iterdir()}
    assert left.isdisjoint({"saved_model", "model.onnx"}) and left >= {"model.tflite", "export.json", "notes.txt"}


def test_a_form_that_answers_otherwise_is_not_handed_on(handed, tmp_path, monkeypatch):
    """Red and blue in the other order, as a preprocessing error would have it."""
    right = FORMS["tflite"]

    def opened(*where):
        run = right.open(*where)
        return lambda image: run(image[..., ::-1].copy())

    monkeypatch.setitem(FORMS, "tflite", replace(right, open=opened))
    with pytest.raises(Disagreement, match=r"model.tflite gives the network's class to .* nothing was written") as told:
        handed.export(("tflite", "onnx"), tmp_path / "export")
    assert told.value.agreeing == ("onnx",)
    assert not (tmp_path / "export").exists()


def test_a_stack_of_photos_is_taken_apart_and_other_arrays_are_refused(handed, monkeypatch):
    photos = np.stack([draw_pet(i, 50)[0][:, :41] for i in range(5)])
    expected = np.stack([handed.segmenter.predict(photo) for photo in photos])
    monkeypatch.setattr("unet.prediction.segmenter.PIXELS", 2 * 50 * 41)
    assert np.array_equal(handed.segmenter.predict(photos), expected)
    assert handed.segmenter.probabilities(photos).shape == (5, 50, 41, 5) and handed.segmenter.classes == list("abcde")
    for wrong in (photos / 255, photos[..., :1], photos[0, 0], photos[:0]):
        with pytest.raises(ValueError, match=r"uint8 arrays \(H, W, 3\)"):
            handed.segmenter.predict(wrong)


def test_packaging_asks_no_network(handed, monkeypatch):
    """Neither a connection nor another process that could make one, as MLflow's search for requirements is."""
    asked = []
    for place in ("socket.socket.connect", "socket.getaddrinfo", "subprocess.Popen.__init__"):
        monkeypatch.setattr(place, lambda *args, place=place, **kwargs: asked.append((place, args)) or 1 / 0)
    assert "MLmodel" in package(handed.trained)
    assert not asked and os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_the_readmes_example_runs(trained, storage, tmp_path, monkeypatch, capsys):
    """With a run by name, in a folder with a photo.jpg."""
    section = (ROOT / "README.md").read_text().partition("## From checkpoint to use")[2]
    code = re.search(r"```python\n(import numpy as np\nimport unet.*?)```", section, re.DOTALL)[1]
    monkeypatch.setenv("UNET_STORAGE_PATH", str(storage))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(draw_pet(3, 70)[0]).resize((77, 50)).save("photo.jpg")
    namespace = {}
    exec(code.replace("RUN_NAME", "trained"), namespace)
    mask = namespace["mask"]
    assert mask.shape == (50, 77) and mask.dtype == np.uint8 and mask.max() <= 2
    packaged = mlflow.pyfunc.load_model(str(storage / "trained" / "model"))
    assert np.array_equal(packaged.predict(np.asarray(Image.open("photo.jpg"))[None])[0], mask)
