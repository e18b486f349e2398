"""Two hundred classes: counts of few cells, and pictures, tables and pages of a bounded size."""

import io
import tracemalloc

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from unet import metric_names
from unet.classes import MANY, ClassInfo
from unet.evaluation import tables
from unet.evaluation.counts import CELLS, Counts, cells_of
from unet.evaluation.records import written
from unet.evaluation.summary import compare, summary
from unet.pages import figures
from unet.recipe.loss import LossSettings
from unet.terminal import score_table
from unet.tracking.stored_run import for_charts


@given(st.integers(0, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_counts_of_few_cells_are_those_of_whole_matrices(images, classes, seed):
    rng = np.random.default_rng(seed)
    shape = (images, classes, classes)
    matrices = rng.integers(0, 2**40, shape) * (rng.random(shape) < 0.3)
    column = pa.chunked_array([pa.array([cells_of(m.reshape(-1)) for m in matrices], CELLS)])
    inside = rng.random(images) < 0.5
    for counts in (Counts.of_matrices(matrices), Counts.of_column(column, classes)):
        for found, expected in ((counts, matrices), (counts.where(inside), matrices[inside])):
            sums = [np.diagonal(expected, axis1=1, axis2=2), expected.sum(2), expected.sum(1)]
            assert len(found) == len(expected) and np.array_equal(found.matrices(), expected)
            assert np.array_equal(found.total(), expected.sum(0)) and np.array_equal(found.sums(), np.stack(sums, 1))


def test_two_hundred_classes_take_no_matrix_an_image():
    """200 images of 200 classes in three views: whole matrices of all of them are 190 MB, in float64 once more."""
    rng, names = np.random.default_rng(0), [f"class {i}" for i in range(200)]
    rows = [[{"cell": int(c), "pixels": 7} for c in np.unique(rng.integers(0, 40_000, 60))] for _ in range(200)]
    table = pa.table(dict.fromkeys(("confusion", "confusion_band", "confusion_own"), pa.array(rows, CELLS)))
    table = table.append_column("loss_sums", pa.array([[1.0, 1.0]] * 200))
    for group in ("breed", "species"):
        table = table.append_column(group, pa.array([""] * 200))
    tracemalloc.start()
    found = summary(table, names, 2, 1000, LossSettings())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6, peak
    assert found["confusion"] == Counts.of_column(table["confusion"], 200).total().tolist()
    parts = list(written(table, 200))
    assert len(parts) == 2 and pa.concat_tables(parts)["confusion"][199].as_py() == [
        7 if cell in {c["cell"] for c in rows[199]} else 0 for cell in range(40_000)
    ]


def test_pictures_have_a_bounded_size(tmp_path):
    classes = [ClassInfo(f"class {i}", (i, 255 - i, 77)) for i in range(200)]
    rng = np.random.default_rng(0)
    confusion = rng.integers(0, 1000, (200, 200))
    confusion[np.diag_indices(200)] = 10**6
    record = {f"val/{kind}/class {i}": i / 200 for kind in ("iou", "dice") for i in range(200)}
    history = [{"epoch": e, "train/loss": 1 / e, "val/loss": 1 / e, "val/mean_iou": 0.5} | record for e in (1, 2)]
    masks = np.zeros((2, 32, 32), np.uint8)
    masks[:, 16:] = rng.integers(0, 200, (16, 32))
    photos = np.zeros((2, 32, 32, 3), np.uint8)
    for draw in (
        lambda path: figures.confusion_picture(confusion, classes, path),
        lambda path: figures.training_curves(history, classes, path),
        lambda path: figures.gallery(photos, masks, masks, ["a", "b"], classes, path),
    ):
        width, height = Image.open(draw(tmp_path / "picture.png")).size
        assert width < 3000 and height < 3000
    picture = np.asarray(
        Image.open(figures.confusion_picture(confusion, classes, tmp_path / "picture.png")).convert("L")
    )
    dark = picture < 120  # the diagonal, which is all of its rows, across the picture
    rows, columns = np.nonzero(dark[:, 200:])
    assert np.corrcoef(rows, columns)[0, 1] > 0.95


def test_tables_show_the_lowest_classes_and_say_so():
    rng, names = np.random.default_rng(0), [f"class {i}" for i in range(200)]
    confusion = np.diag(rng.integers(1, 1000, 200)) + rng.integers(0, 2, (200, 200))
    table = pa.table(
        dict.fromkeys(("confusion", "confusion_band"), pa.array([cells_of(confusion.ravel())] * 12, CELLS))
    )
    table = table.append_column("confusion_own", pa.nulls(12, CELLS)).append_column(
        "loss_sums", pa.array([[1.0, 1.0]] * 12)
    )
    for group in ("breed", "species"):
        table = table.append_column(group, pa.array([""] * 12))
    found = summary(table, names, 2, 0, LossSettings())
    worst = min(found["iou"], key=found["iou"].get)
    console = Console(width=160, file=io.StringIO())
    tables.show(console, "run", found)
    tables.show_comparison(console, compare(["a", "b"], [table, table], names, 0))
    console.print(score_table("Test", found))
    lines = console.file.getvalue().splitlines()
    assert len(lines) < 3 * MANY + 60 and sum(line.split()[:2] == worst.split() for line in lines) >= 2
    assert sum("lowest 30 of 200 classes" in line for line in lines) == 2


def test_a_tracking_server_gets_charts_that_can_be_looked_at():
    """Of thirty classes all scores, of more the means; the loss and the rest in any case."""

    def record(count: int) -> dict:
        scores = {kind: {f"class {i}": 0.5 for i in range(count)} for kind in ("iou", "dice")}
        return {"epoch": 1, "speed/images_per_second": 1.0} | metric_names.of("val", {"mean_iou": 0.5} | scores)

    assert for_charts(record(30)) == record(30) and len(record(30)) == 63
    assert for_charts(record(31)).keys() == {"epoch", "speed/images_per_second", "val/mean_iou"}
