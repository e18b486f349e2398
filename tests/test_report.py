"""Tests of the report: the numbers written into pictures and tables, and that every picture decodes."""

import io
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from unet.pages import figures, numbers
from unet.terminal import Display, score_table


class Item(NamedTuple):
    name: str
    colour: tuple[int, int, int]


PETS = [Item("pet", (230, 97, 1)), Item("background", (128, 115, 172)), Item("outline", (255, 221, 85))]
NBSP = "\N{NO-BREAK SPACE}"
MANY = [Item(f"class {index}", (12 * index, 255 - 12 * index, 128)) for index in range(21)]


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 5, "the picture is blank"
        return picture.size


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Collect figures instead of saving them, so that a test can read what was drawn."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: saved.append(figure))
    return saved


def test_import_loads_neither_matplotlib_nor_rich():
    program = "import sys, unet.pages.figures; print(sorted({'matplotlib', 'rich'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_image_iou_and_its_caption_by_hand():
    truth = np.array([[0, 0, 0, 255], [1, 1, 1, 255]], np.uint8)
    predicted = np.array([[0, 0, 1, 2], [1, 1, 1, 0]], np.uint8)
    # Pet shares 2 of 3 pixels, background 3 of 4. The ignored column must neither add a pet nor call up an outline.
    assert figures.image_iou(truth, predicted, 3) == [pytest.approx(2 / 3), 0.75, None]
    caption = figures.iou_caption(truth, predicted, PETS).replace("\N{NO-BREAK SPACE}", " ")
    assert caption == "pet 0.67 · background 0.75 · outline –"
    caption = figures.iou_caption(truth, predicted, MANY).replace("\N{NO-BREAK SPACE}", " ")
    assert caption == "class 0 0.67 · class 1 0.75"
    predicted[0, 0] = 2  # A class found where it is not scores zero; it is not absent.
    assert figures.image_iou(truth, predicted, 3) == [pytest.approx(1 / 3), 0.75, 0.0]


@pytest.mark.parametrize(
    ("pixels", "row_total", "expected"),
    [
        (0, 0, ("–", "")),
        (0, 50, ("0 %", "0")),
        (50, 50, ("100 %", "50")),
        (1, 1_000_000, ("<0.1 %", "1")),
        (999_999, 1_000_000, (">99.9 %", "1.0 M")),
        (1_234, 4_936, ("25.0 %", "1.2 k")),
        (9_960, 19_920, ("50.0 %", "10 k")),
        (np.int64(52_000_000), np.int64(60_000_000), ("86.7 %", "52 M")),
    ],
)
def test_cell_text(pixels, row_total, expected):
    assert numbers.cell_text(pixels, row_total) == (expected[0].replace(" ", NBSP), expected[1])


def test_numbers_as_they_are_shown():
    assert [numbers.percent(share, 0) for share in (0, 0.004, 0.5, 0.999)] == [
        f"{n}{NBSP}%" for n in (0, "<1", 50, ">99")
    ]
    assert [numbers.score(0.84127), numbers.score(-0.5, "+"), numbers.score(None)] == ["0.8413", "-0.5000", "–"]
    assert numbers.signed(-0.251) == "−0.25"
    assert [numbers.duration(seconds) for seconds in (59.9, 3723)] == ["0:59", "1:02:03"]
    assert numbers.gigabytes(1.25e9) == "1.2 GB"
    assert [numbers.images(count) for count in (0, 1, 3669)] == ["0 images", "1 image", "3,669 images"]


def test_best_epoch_is_the_earliest_highest_mean():
    values = [float("nan"), None, 0.7, 0.2, 0.7, 0.6]
    history = [{"epoch": 1 + index, "val/mean_iou": value} for index, value in enumerate(values)]
    assert figures.best_epoch([*history, {"epoch": 7}]) == (3, 0.7)
    assert figures.best_epoch([{"epoch": 1}]) is None


def test_curves_show_each_class_and_mark_the_best_epoch(drawn):
    history = [
        {"epoch": 1, "train/loss": 2.0, "val/loss": 3.0, "val/mean_iou": 0.3, "val/iou/pet": 0.4, "val/dice/pet": 0.5},
        {"epoch": 2, "train/loss": 1.0, "val/loss": None, "val/mean_iou": 0.7, "val/iou/pet": 0.8},
        {"epoch": 3, "train/loss": 0.5, "val/loss": 1.5, "val/mean_iou": 0.6, "val/iou/pet": 0.6, "val/dice/pet": 0.9},
    ]
    figures.training_curves(history, PETS, "curves.png")
    loss, iou, dice = ({line.get_label(): line for line in axes.get_lines()} for axes in drawn[0].axes)
    assert loss["training"].get_xydata().tolist() == [[1, 2], [2, 1], [3, 0.5]]
    assert loss["validation"].get_xydata().tolist() == [[1, 3], [3, 1.5]]
    assert iou["mean"].get_xydata().tolist() == [[1, 0.3], [2, 0.7], [3, 0.6]]
    assert iou["pet"].get_xydata().tolist() == [[1, 0.4], [2, 0.8], [3, 0.6]]
    assert dice["pet"].get_xydata().tolist() == [[1, 0.5], [3, 0.9]]
    assert iou["pet"].get_color() == pytest.approx((230 / 255, 97 / 255, 1 / 255))
    assert [text.get_text() for text in drawn[0].axes[1].texts] == ["best mean 0.700\nepoch 2"]


@pytest.mark.parametrize(("classes", "epochs"), [(PETS[:2], 1), (PETS, 100), (MANY, 3)])
def test_training_curves(tmp_path, classes, epochs):
    history = [{"epoch": 1 + index, "train/loss": 1 / (1 + index), "val/loss": None} for index in range(epochs)]
    for record in history:
        record["val/mean_iou"] = 0.5
        record |= {f"val/iou/{item.name}": 0.5 for item in classes[1:]}
    path = figures.training_curves(history, classes, tmp_path / "curves.png")
    assert path == tmp_path / "curves.png"
    assert size_of(path)[0] == 1690


def test_training_curves_need_an_epoch(tmp_path):
    with pytest.raises(ValueError, match="history is empty"):
        figures.training_curves([], PETS, tmp_path / "curves.png")


def test_confusion_cells_are_shares_of_their_row(drawn):
    figures.confusion_picture(np.array([[900, 100, 0], [0, 0, 0], [0, 1500, 500]]), PETS, "confusion.png")
    axes = drawn[0].axes[0]
    cells = {(round(text.get_position()[1]), text.get_position()[0]): text.get_text() for text in axes.texts[::2]}
    assert [cells[0, column] for column in range(3)] == [f"90.0{NBSP}%", f"10.0{NBSP}%", f"0{NBSP}%"]
    assert [cells[1, column] for column in range(3)] == ["–", "–", "–"]
    assert [cells[2, column] for column in range(3)] == [f"0{NBSP}%", f"75.0{NBSP}%", f"25.0{NBSP}%"]
    assert np.allclose(axes.images[0].get_array(), [[0.9, 0.1, 0], [0, 0, 0], [0, 0.75, 0.25]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["pet", "background", "outline"]


@pytest.mark.parametrize("classes", [PETS[:2], PETS, MANY])
def test_confusion_picture(tmp_path, classes):
    confusion = np.diag(np.arange(len(classes), dtype=np.int64) * 1000)  # The first class has no pixels.
    width, height = size_of(figures.confusion_picture(confusion, classes, tmp_path / "confusion.png"))
    assert width > 400 and height > 400
    with pytest.raises(ValueError, match="classes need"):
        figures.confusion_picture(confusion[1:], classes, tmp_path / "confusion.png")


def test_gallery_tints_masks_and_greys_ignored_pixels(tmp_path):
    images = np.full((1, 32, 32, 3), 128, np.uint8)
    truth = np.full((1, 32, 32), 255, np.uint8)
    predicted = np.zeros((1, 32, 32), np.uint8)
    path = figures.gallery(images, truth, predicted, ["cat"], PETS, tmp_path / "gallery.png")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    middle = pixels[pixels.shape[0] * 6 // 10]
    photo, ignored, pet = (middle[pixels.shape[1] * sixth // 6] for sixth in (1, 3, 5))
    assert np.allclose(photo, 128, atol=2)
    assert np.ptp(ignored) == 0, "an ignored pixel must be grey"
    assert pet[0] > pet[1] > pet[2], "a pet must look orange"


@pytest.mark.parametrize(("count", "classes"), [(4, PETS[:2]), (5, PETS), (5, MANY)])
def test_gallery_sets_more_than_four_samples_two_abreast(tmp_path, count, classes):
    masks = np.random.default_rng(0).integers(0, len(classes), (2, count, 24, 32)).astype(np.uint8)
    images = np.zeros((count, 24, 32, 3), np.uint8)
    width, _ = size_of(figures.gallery(images, *masks, ["cat"] * count, classes, tmp_path / "gallery.png"))
    assert (width > 1500) == (count > 4)


def test_no_line_of_a_caption_begins_or_ends_with_the_sign_between_classes(drawn):
    masks = np.random.default_rng(0).integers(0, len(MANY), (1, 24, 32)).astype(np.uint8)
    figures.gallery(np.zeros((1, 24, 32, 3), np.uint8), masks, masks, ["cat"], MANY, "gallery.png")
    notes = [text.get_text() for axes in drawn[0].axes for text in axes.texts]
    lines = [line for note in notes for line in note.splitlines()]
    assert len(lines) > 4 and all(line == line.strip(" ·") for line in lines)


def test_samples_are_drawn_with_their_masks_names_and_a_title(drawn):
    masks = np.array([np.full((8, 8), value, np.uint8) for value in (0, 1, 2, 1, 255)])
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 8, 8, 3), np.uint8)
    figures.samples(images, masks, list("abcde"), PETS, "strength 1", "samples.png")
    (figure,) = drawn
    assert [text.get_text() for text in figure.texts] == ["strength 1", *"abcde"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["pet", "background", "outline", "ignored"]
    pictures = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert all(np.array_equal(pictures[2 * i], images[i]) for i in range(5))
    middle = [picture[picture.shape[0] // 2, picture.shape[1] // 2].astype(int) for picture in pictures[1::2]]
    assert middle[0][0] > middle[0][2] and middle[1][2] > middle[1][1] and np.ptp(middle[4]) == 0
    tops, lefts = zip(*((axes.get_position().y1, axes.get_position().x0) for axes in figure.axes[::2]), strict=True)
    assert np.allclose(tops[:4], tops[0]) and tops[4] < tops[0] and lefts[4] == lefts[0] < lefts[1]


def test_a_white_class_can_be_seen_in_a_legend(drawn):
    """Aerial photos have one; the paper is white as well."""
    masks = np.zeros((1, 8, 8), np.uint8)
    figures.samples(np.zeros((1, 8, 8, 3), np.uint8), masks, ["a"], [Item("road", (255, 255, 255))], "", "samples.png")
    (patch,) = drawn[0].legends[0].get_patches()
    *edge, opacity = patch.get_edgecolor()
    assert patch.get_linewidth() > 0 and opacity == 1 and np.mean(edge) < 0.75


@pytest.mark.parametrize("classes", [PETS, MANY])
def test_the_line_of_an_epoch_has_room_for_few_classes(classes):
    console = Console(record=True, width=200, file=io.StringIO())
    record = {"epoch": 3, "val/mean_iou": 0.75} | {f"val/iou/{item.name}": 0.5 for item in classes}
    Display(console).epoch(record, 10, classes)
    by_class = "  pet 0.5000  background 0.5000  outline 0.5000" if classes is PETS else ""
    assert console.export_text().strip().endswith(f"mean IoU 0.7500{by_class}")


def test_score_table():
    scores = {
        "iou": {"pet": 0.84127, "background": 0.93, "outline": None},
        "dice": {"pet": 0.91, "background": 0.96372, "outline": None},
        "mean_iou": 0.8856,
        "mean_dice": 0.9369,
        "accuracy": 0.94217,
        "loss": None,
        "images": 3669,
    }
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(score_table("Test set", scores))
    text = console.export_text()
    rows = [line.split() for line in text.splitlines()]
    assert ["pet", "0.8413", "0.9100"] in rows
    assert ["background", "0.9300", "0.9637"] in rows
    assert ["outline", "–", "–"] in rows
    assert ["mean", "0.8856", "0.9369"] in rows
    assert "Test set" in text and "accuracy 0.9422 · loss –" in text and "3,669 images" in text
