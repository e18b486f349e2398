"""TensorBoard's files, read back by TensorFlow: each point once, whatever happens to the run."""

import io
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, tiny_settings
from PIL import Image

from unet.commands.cli import parse
from unet.config import TrainSettings, TuneSettings
from unet.errors import InputError
from unet.runs.run import Run
from unet.supervise.board import Board


def board_of(tmp_path, words=None, tensorboard=True) -> Board:
    run = Run.load("shown", tiny_settings(tmp_path, tmp_path, run_name="shown", tensorboard=tensorboard))
    run.start()
    return Board(run, (words if words is not None else []).append)


def line(epoch: int, loss: float = 0.5) -> dict:
    return {"epoch": epoch, "step": 10 * epoch, "time": 1000 * epoch, "val/loss": loss, "val/iou/pet": 1 / epoch}


def events_of(folder) -> list:
    """The events of all files that TensorBoard would find."""
    files = sorted((folder / "tensorboard").glob("*tfevents*"))
    return [event for file in files for event in tf.compat.v1.train.summary_iterator(str(file)) if event.summary.value]


def scalars_of(folder) -> list[tuple]:
    """Tag, step, seconds and value of each."""
    return [
        (value.tag, event.step, event.wall_time, pytest.approx(value.simple_value))
        for event in events_of(folder)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]


def expected(*lines: dict) -> list[tuple]:
    return [
        (name, line["epoch"], line["time"] / 1000, line[name]) for line in lines for name in ("val/loss", "val/iou/pet")
    ]


def picture(colour: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), colour, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_lines_grow_and_a_new_start_has_each_once(tmp_path):
    first = board_of(tmp_path)
    first.epochs([line(1)])
    first.epochs([line(1), line(2)])
    assert scalars_of(tmp_path / "shown") == expected(line(1), line(2)), "they are there before the file is closed"
    (file,) = (tmp_path / "shown" / "tensorboard").iterdir()
    with file.open("ab") as torn:  # a kill while it was written
        torn.write(b"half a reco")
    again = board_of(tmp_path)
    again.epochs([line(1), line(2)])
    again.epochs([line(1), line(2), line(3)])
    assert scalars_of(tmp_path / "shown") == expected(line(1), line(2), line(3))


def test_an_epoch_that_came_to_something_else_is_there_once(tmp_path):
    board = board_of(tmp_path)
    board._run.folder.write_bytes("seen.png", picture(3))
    board.picture("seen", "seen.png", 0, 500)
    board.epochs([line(1), line(2)])
    board.epochs([line(1), line(2, loss=0.7)])
    assert scalars_of(tmp_path / "shown") == expected(line(1), line(2, loss=0.7))
    assert [event.step for event in events_of(tmp_path / "shown") if event.summary.value[0].tag == "seen"] == [0]


def test_a_picture_is_the_file_itself(tmp_path):
    board = board_of(tmp_path)
    board._run.folder.write_bytes("gallery.png", picture(200))
    board.picture("gallery", "gallery.png", 7, 9000)
    board.scores({"test/mean_iou": 0.25}, 7, 9000)
    board.close()
    image, score = events_of(tmp_path / "shown")
    assert (image.step, image.wall_time, image.summary.value[0].tag) == (7, 9.0, "gallery")
    shown = image.summary.value[0].image
    assert (shown.height, shown.width, shown.colorspace) == (4, 6, 3)
    assert shown.encoded_image_string == picture(200)
    assert score.summary.value[0].simple_value == 0.25


def test_a_disk_that_takes_no_more_ends_the_files_and_not_the_run(tmp_path):
    words = []
    board = board_of(tmp_path, words)
    (tmp_path / "shown" / "tensorboard").write_text("a file in its place")
    board.epochs([line(1)])
    board.epochs([line(1), line(2)])
    board.picture("gone", "gone.png", 1, 1)
    board.close()
    assert len(words) == 1 and "end here" in words[0] and "the next start writes them anew" in words[0]


def test_nothing_is_written_or_loaded_without_the_setting(tmp_path):
    board_of(tmp_path, tensorboard=False).epochs([line(1)])
    assert not (tmp_path / "shown" / "tensorboard").exists()


def test_the_driver_writes_without_tensorflow(tmp_path):
    code = f"""
import sys
from unet.config import TrainSettings, unflat
from unet.runs.run import Run
from unet.supervise.board import Board
run = Run.load("shown", unflat(TrainSettings, {{"storage_path": {str(tmp_path)!r}, "tensorboard": True}}))
run.start()
Board(run, print).epochs([{line(1)!r}])
assert not {{"tensorflow", "torch", "keras"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert scalars_of(tmp_path / "shown") == expected(line(1))


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        (TrainSettings, ["--storage-path", "s3://bucket/x", "--tracking-uri", "http://x"], "needs a --storage-path on"),
        (TuneSettings, [], "--tensorboard is for `jobs/train.py`"),
    ],
)
def test_where_it_cannot_be_it_is_refused(kind, flags, words):
    with pytest.raises(InputError, match=words):
        parse(kind, "", ["--tensorboard", *flags])
