"""The packaged model, against resizing written down again."""

import mlflow
import numpy as np
import pytest
import tensorflow as tf

from unet.classes import ClassInfo
from unet.config import TrainSettings, flat, unflat
from unet.data.resize import ignore_padding, letterbox_box
from unet.data.synthetic import draw_pet
from unet.packaging.model import package
from unet.storage import Folder
from unet.trained import TrainedModel
from unet.training.checkpoint import Checkpoints, State
from unet.training.learner import Learner

SETTINGS = {"image_size": 32, "base_filters": 4, "depth": 2, "batch_size": 2, "learning_rate": 0.01}
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


def test_a_letterboxed_photo_is_answered_as_the_network_does(tmp_path):
    settings = unflat(TrainSettings, SETTINGS | {"resize": "letterbox"})
    learner, rng = Learner(settings, len(CLASSES)), np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (2, 32, 32, 3), np.uint8), rng.integers(0, 5, (2, 32, 32), np.uint8)
    for step in range(1, 6):
        learner.train_step(images, masks, step)
    run = tmp_path / "run"
    Folder(run).write_text("config.yaml", "")
    name = Checkpoints(Folder(run)).save(learner, State(0, "digest", flat(settings), {}, classes=CLASSES))
    for file, content in package(TrainedModel.of_checkpoint(Folder(run), name)).items():
        (tmp_path / "model" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / file).write_bytes(content)
    photo = draw_pet(0, 91)[0][27:64]
    assert photo.shape == (37, 91, 3)

    small = tf.image.resize(photo.astype(np.float32), (13, 32), antialias=True).numpy() / np.float32(255)
    logits = learner.float32_model(np.pad(small, ((9, 10), (0, 0), (0, 0)))[None])
    probabilities = tf.nn.softmax(logits).numpy()[:, 9:22]
    expected = tf.image.resize(probabilities, (37, 91)).numpy().argmax(-1)
    found = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(photo[None])
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert len(np.unique(expected)) > 1 and (found == expected).mean() > 0.999
