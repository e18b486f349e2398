"""Tests of the page of an evaluation: its numbers, the order and the pictures of what it shows, and that names and
gaps in the data cannot break it."""

import io
import itertools
import re
from html import unescape

import numpy as np
import pyarrow as pa
import pytest
from pages import Page, assert_stands_alone, pets, picture, write_prepared
from PIL import Image

from unet.classes import IGNORE, MANY, PETS, ClassInfo
from unet.evaluation.counts import cells_of
from unet.evaluation.gallery import PREDICTION, TRUTH
from unet.evaluation.page import evaluation_page

NAMES = [item.name for item in PETS.classes]
NASTY = "<script>alert(1)</script>"
KINDS = ("mean_iou", "mean_dice", "accuracy")


def confusion_of(truth: np.ndarray, predicted: np.ndarray, count: int) -> list[list[int]]:
    valid = truth != IGNORE
    return [[int(((truth == a) & (predicted == b) & valid).sum()) for b in range(count)] for a in range(count)]


def iou_of(confusion) -> list[float | None]:
    confusion = np.array(confusion)
    unions = [confusion[i].sum() + confusion[:, i].sum() - confusion[i, i] for i in range(len(confusion))]
    return [float(confusion[i, i] / union) if union else None for i, union in enumerate(unions)]


def mean(values) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def record(row: dict, predicted: np.ndarray, names: list[str], doubt: float) -> dict:
    """What an evaluation keeps of an image."""
    confusion = confusion_of(row["mask"], predicted, len(names))
    file = io.BytesIO()
    Image.fromarray(predicted).save(file, "PNG")
    facts = {key: row[key] for key in ("name", "split", "breed")}
    facts |= {"height": row["original_height"], "width": row["original_width"], "doubt": doubt}
    facts |= {"confusion": cells_of(np.array(confusion).reshape(-1)), "predicted": file.getvalue()}
    return (
        facts
        | dict(zip((f"iou_{name}" for name in names), iou_of(confusion), strict=True))
        | {"mean_iou": mean(iou_of(confusion))}
    )


def scored(names: list[str], numbers: itertools.count, spans: bool = True) -> dict:
    """Scores of which no two numbers are equal."""
    found = {kind: {name: next(numbers) / 1000 for name in names} for kind in ("iou", "dice")}
    found |= {kind: next(numbers) / 1000 for kind in KINDS}

    def span(value):
        return [value - 0.011, value + 0.013] if spans else None

    by_class = {kind: {name: span(value) for name, value in found[kind].items()} for kind in ("iou", "dice")}
    return found | {"images": next(numbers), "intervals": by_class | {kind: span(found[kind]) for kind in KINDS}}


def metrics_of(names: list[str], confusion: list, images: int) -> dict:
    numbers = itertools.count(101)
    found = scored(names, numbers) | {"confusion": confusion, "images": images, "loss": 0.4321}
    ways = {way: scored(["pet", "background"], numbers) for way in ("outline_as_pet", "outline_ignored")}
    breeds = {f"breed_{i}": scored(names, numbers) for i in (3, 1, 2)} | {"<b>pug</b>": scored(names, numbers)}
    breeds["breed_2"]["mean_iou"] = 0.001
    one = {"value": 0.0123, "interval": [-0.0017, 0.0245]}
    pair = {kind: {"value": -0.0345, "interval": None} for kind in KINDS[1:]} | {"mean_iou": one}
    pair |= {"iou": {name: {"value": 0.0456, "interval": [0.0411, 0.0499]} for name in names}}
    return found | {
        "model": "<i>m</i>",
        "run_name": "pets_run",
        "checkpoint": "step_00000123",
        "split": "test",
        "data": "/somewhere/pets",
        "data_digest": "4f" * 32,
        "bootstrap": {"level": 0.95, "method": "BCa", "resamples": 50, "seed": 0},
        "per_image": scored(names, numbers),
        "binary": ways,
        "band": scored(names, numbers) | {"width": 7},
        "own_size": scored(names, numbers) | {"binary": {way: scored(NAMES[:2], numbers) for way in ways}},
        "by_breed": breeds,
        "by_species": {"cat": scored(names, numbers), "dog": scored(names, numbers)},
        "comparison": {
            "models": ["a", "b"],
            "pairs": [
                {"a": "a", "b": "b", "verdict": "No <significant> difference between b and a.", "network_size": pair}
            ],
        },
    }


HISTORY = [
    {"epoch": 1, "train/loss": 1.2, "val/loss": 1.1, "val/mean_iou": 0.31, "val/iou/pet": 0.2},
    {"epoch": 2, "train/loss": 0.8, "val/loss": 0.9, "val/mean_iou": 0.52, "val/iou/pet": 0.4},
    {"epoch": 3, "train/loss": 0.7, "val/loss": None, "val/mean_iou": 0.47, "val/iou/pet": float("nan")},
]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Of 60 drawn pets all but the first ten are of test, with predictions that are moved by ever other amounts."""
    rows, rng = pets(60), np.random.default_rng(1)
    for index, row in enumerate(rows):
        row["split"] = "val" if index < 10 else "test"
        row["predicted"] = np.roll(row["mask"], rng.integers(-9, 10, 2), (0, 1))
        row["doubt"] = float(rng.random())
    rows[30]["name"] = NASTY
    rows[30]["doubt"] = 0.9999
    return rows


@pytest.fixture(scope="module")
def test_rows(rows) -> list[dict]:
    return [row for row in rows if row["split"] == "test"]


@pytest.fixture(scope="module")
def metrics(test_rows) -> dict:
    total = sum(np.array(confusion_of(row["mask"], row["predicted"], 3)) for row in test_rows)
    return metrics_of(NAMES, total.tolist(), len(test_rows))


@pytest.fixture(scope="module")
def html(rows, test_rows, metrics, tmp_path_factory) -> str:
    prepared = write_prepared(tmp_path_factory.mktemp("page") / "pets", rows)
    records = [record(row, row["predicted"], NAMES, row["doubt"]) for row in test_rows]
    # The order of records is not that of the shards.
    table = pa.Table.from_pylist(sorted(records, key=lambda one: one["doubt"]))
    return evaluation_page(metrics, table, prepared, "test", HISTORY)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def shown(page: Page, section: str) -> list[str]:
    return [name for place, name in page.images if place == section]


def test_the_page_stands_alone(html, page):
    assert_stands_alone(html, page)
    assert len(html.encode()) < 2_000_000


def test_names_cannot_become_html(html, page):
    assert "<script" not in html and "<b>pug" not in html and "<i>m" not in html and "<not>" not in html
    assert NASTY in page.words("doubt") and "<b>pug</b>" in page.words("slices")
    assert "<i>m</i>" in page.words("summary") and "No <significant> difference" in page.words("comparison")


def test_the_head_says_what_was_scored_and_how_well(page, metrics):
    words = page.words("summary")
    score, (low, high) = metrics["mean_iou"], metrics["intervals"]["mean_iou"]
    assert f"{score:.3f}mean IoU 95 %: {low:.3f}–{high:.3f}" in words.replace("\N{NO-BREAK SPACE}", " ")
    assert "50 images of the test split" in words and "step_00000123" in words and "4f" * 32 in words
    assert "0.432" in words and "50 resamples" in words


def test_the_tables_show_the_metrics(page, metrics):
    words = page.words("scores")
    spans = metrics["intervals"]

    def cell(scores, *keys):
        value, span = scores, scores["intervals"]
        for key in keys:
            value, span = value[key], span[key]
        return f"{value:.3f} {span[0]:.3f}–{span[1]:.3f}"

    for name in NAMES:
        assert f"{name} {cell(metrics, 'iou', name)} {cell(metrics, 'dice', name)}" in words
        views = " ".join(cell(part, "iou", name) for part in (metrics, metrics["own_size"], metrics["band"]))
        assert f"{name} {views} {metrics['per_image']['iou'][name]:.3f}" in words
    assert f"mean {cell(metrics, 'mean_iou')} {cell(metrics, 'mean_dice')}" in words
    assert "within 7 px of a border" in words and spans
    for words_of, scores in (
        ("outline counted as pet", metrics["binary"]["outline_as_pet"]),
        ("outline ignored", metrics["binary"]["outline_ignored"]),
        ("outline ignored, own size", metrics["own_size"]["binary"]["outline_ignored"]),
    ):
        numbers = scores["iou"]["background"], scores["mean_iou"], scores["dice"]["pet"], scores["accuracy"]
        rest = " ".join(f"{number:.3f}" for number in numbers)
        assert f"{words_of} {cell(scores, 'iou', 'pet')} {rest}" in words


def test_interval_bars_lie_where_their_axis_says(html, metrics):
    section = html[html.index('<section id="scores">') : html.index('<section id="comparison">')]
    ticks = [float(word) for word in re.findall(r"<span>([\d.]+)</span>", section)]
    low, high = ticks[0], ticks[-1]
    bars = re.findall(r'class="span"[^>]*d="M([\d.]+) 8H([\d.]+)"', section)
    lines = re.findall(r'class="value"[^>]*d="M([\d.]+) 1V15"', section)
    expected = [*metrics["intervals"]["iou"].values(), metrics["intervals"]["mean_iou"]]
    found = [[low + float(end) / 100 * (high - low) for end in bar] for bar in bars]
    assert np.allclose(found, expected, atol=1e-4)
    values = [*metrics["iou"].values(), metrics["mean_iou"]]
    assert np.allclose([low + float(line) / 100 * (high - low) for line in lines], values, atol=1e-4)
    assert np.allclose(np.diff(ticks, 2), 0)


def test_the_confusion_matrix_counts_pixels(page, metrics):
    titles = [value for key, value in page.attributes if key == "title" and "taken for" in value]
    cells = [(a, b) for a in range(3) for b in range(3)]
    for (a, b), title in zip(cells, titles, strict=True):
        assert title == f"{NAMES[a]} taken for {NAMES[b]}: {metrics['confusion'][a][b]:,} pixels"
    for row in metrics["confusion"]:
        for pixels in row:
            assert f"{100 * pixels / sum(row):.1f} %" in page.words("confusion")


def test_the_training_is_drawn(html, page):
    words = page.words("training")
    assert "best mean 0.520, epoch 2" in words
    lines = re.findall(r'class="line"[^>]*d="([^"]*)"><title>([^<]*)', html)
    # Only what was measured: the last losses and IoUs of single classes are not.
    assert [(title, path.count("L")) for path, title in lines] == [
        ("training, last 0.700", 2),
        ("validation, last 0.900", 1),
        ("pet, last 0.400", 1),
        ("mean, last 0.470", 2),
    ]
    # The mean lies where the axis says, and the mark on its second point.
    chart = html[html.index('aria-label="IoU on val') : html.index('id="confusion"')]
    ticks = [(float(y), float(word)) for y, word in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', chart)]
    points = [tuple(map(float, point.split())) for point in re.split("[ML]", lines[-1][0])[1:]]
    places, values = zip(*ticks, strict=True)
    # A word stands four below its line.
    found = [np.interp(-y - 4, np.negative(places), values) for _, y in points]
    assert np.allclose(found, [0.31, 0.52, 0.47], atol=1e-3)
    assert f'cx="{points[1][0]}" cy="{points[1][1]}"' in chart


def test_the_gallery_goes_by_mean_iou(page, test_rows):
    score = {row["name"]: mean(iou_of(confusion_of(row["mask"], row["predicted"], 3))) for row in test_rows}
    ranked = sorted(score, key=lambda name: (-score[name], name))
    names = shown(page, "gallery")
    assert names == [*ranked[:-9:-1], *ranked[21:29], *ranked[:8]]
    words = page.words("gallery")
    places = [words.index(group) for group in ("Worst", "Median", "Best")]
    assert places == sorted(places)
    for name in names:
        assert f"{score[name]:.3f} {name}" in words
    median = np.median(list(score.values()))
    assert f"Half of them score above {median:.3f}" in page.words("images")


def test_label_errors_go_by_doubt(page, test_rows):
    ranked = sorted(test_rows, key=lambda row: -row["doubt"])[:12]
    assert shown(page, "doubt") == [row["name"] for row in ranked] and ranked[0]["name"] == NASTY
    for row in ranked:
        assert f"doubt {row['doubt']:.3f} {row['name']}" in page.words("doubt")


def test_slices_are_ranked_and_pooled(html, page, metrics, test_rows):
    words = page.words("slices")
    breeds = sorted(metrics["by_breed"].items(), key=lambda item: item[1]["mean_iou"])
    listed = " ".join(f"{name} {part['mean_iou']:.3f} {part['images']}" for name, part in breeds)
    assert listed in words and breeds[0][0] == "breed_2"
    # Heights grow with the index at one width, so quarters by area are quarters by index.
    found = html[html.index('data-slices="size"') :]
    titles = re.findall(r'<div title="([^"]*)">', found[: found.index("<h3>")])
    quarters = np.array_split(np.arange(50), 4)
    assert len(titles) == 4 and re.findall(r"\b1[23]\b", words.split("own size", 1)[1])[:4]
    for title, part in zip(titles, quarters, strict=True):
        inside = [test_rows[i] for i in part]
        pooled = sum(np.array(confusion_of(row["mask"], row["predicted"], 3)) for row in inside)
        number = float(re.search(r": ([\d.]+)", unescape(title))[1])
        assert number == pytest.approx(mean(iou_of(pooled)), abs=0.02)


def test_the_comparison_shows_differences(page):
    words = page.words("comparison")
    assert "b minus a" in words
    assert "mean +0.0123 −0.0017 to +0.0245" in words
    assert all(f"{name} +0.0456 +0.0411 to +0.0499" in words for name in NAMES)


def borders_near(mask: np.ndarray, reach: int) -> np.ndarray:
    """Whether another class lies within so many pixels, bool (H, W)."""
    padded = np.pad(mask, reach, "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1,) * 2)
    return (windows != mask[..., None, None]).any((2, 3))


def assert_outlines(uri: str, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Lines lie where classes meet, and nowhere else."""
    drawn = picture(uri, "RGBA")
    line = (drawn[..., :3] == colour).all(2) & (drawn[..., 3] == 255)
    y, x = (np.arange(n) * m // n for n, m in zip(line.shape, mask.shape, strict=True))
    assert not (line & ~borders_near(mask, 2)[np.ix_(y, x)]).any()
    step = line.shape[0] / mask.shape[0], line.shape[1] / mask.shape[1]
    for row, column in zip(*np.nonzero(mask[:, 1:] != mask[:, :-1]), strict=True):
        at_y, at_x = int((row + 0.5) * step[0]), int((column + 1) * step[1])
        reach = [int(2 * s) for s in step]
        assert line[max(0, at_y - reach[0]) : at_y + reach[0], max(0, at_x - reach[1]) : at_x + reach[1]].any()


def inner(mask: np.ndarray) -> np.ndarray:
    return ~borders_near(mask, 1)


def assert_regions(uri: str, mask: np.ndarray, classes) -> None:
    """Each class has its colour, wherever no border is near."""
    drawn = picture(uri, "RGB")
    y, x = (((np.arange(m) + 0.5) * n / m).astype(int) for n, m in zip(drawn.shape, mask.shape, strict=False))
    colours = np.array([item.colour for item in classes])
    inside = inner(mask) & (mask != IGNORE)
    assert (drawn[np.ix_(y, x)] == colours[np.where(inside, mask, 0)])[inside].all()


def test_every_picture_is_of_its_own_photo_and_masks(page, test_rows):
    images = np.stack([row["image"] for row in test_rows]).astype(int)
    by_name = {row["name"]: row for row in test_rows}
    for (section, name), sources in page.images.items():
        photo, row = picture(sources[0], "RGB"), by_name[name]
        # WebP is only near the pixels, but nearer than to those of any other sample.
        assert test_rows[np.abs(images - photo).mean(axis=(1, 2, 3)).argmin()]["name"] == name
        if section == "gallery":
            _, truth, prediction = sources
            assert_outlines(truth, row["mask"], TRUTH[0])
            assert_outlines(prediction, row["predicted"], PREDICTION[0])
        else:
            _, _, truth, _, prediction = sources
            assert_regions(truth, row["mask"], PETS.classes)
            assert_regions(prediction, row["predicted"], PETS.classes)
        # The drawing has the photo's own shape.
        shape = picture(truth, "RGBA").shape
        assert shape[0] / shape[1] == pytest.approx(row["original_height"] / row["original_width"], abs=0.01)


@pytest.mark.parametrize("count", [2, 20, 200])
def test_own_classes_of_one_padded_image_without_anything_else(tmp_path, count):
    classes = tuple(ClassInfo(f"kind {i}", (10 * i % 256, (255 - 10 * i) % 256, 77)) for i in range(count))
    names = [item.name for item in classes]
    row = pets(60)[30] | {"split": "test", "breed": "", "original_width": 800, "original_height": 400}
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 10:] = 1 if count == 2 else 17
    predicted = np.roll(mask, 3, 1)
    for square in (mask, predicted):
        square[:8] = square[24:] = IGNORE
    mask[10:12, :5] = IGNORE
    row |= {"mask": mask}
    prepared = write_prepared(tmp_path / "own", [row], classes, resize="letterbox")
    none = {name: None for name in names}
    scores = dict(zip(names, iou_of(confusion_of(mask, predicted, count)), strict=True))
    spans = {"iou": none, "dice": none} | dict.fromkeys(KINDS)
    flat = {"iou": scores, "dice": none, "mean_iou": mean(scores.values()), "mean_dice": None, "accuracy": None}
    about = {"model": "m", "run_name": "m", "checkpoint": "c", "split": "test", "data": "d", "data_digest": "e"}
    confusion = confusion_of(mask, predicted, count)
    metrics = about | flat | {"intervals": spans, "per_image": flat, "confusion": confusion, "images": 1, "loss": None}
    metrics |= {"bootstrap": None, "binary": None, "by_breed": {}, "by_species": {}, "comparison": None}
    records = pa.Table.from_pylist([record(row, predicted, names, 0.25)])
    html = evaluation_page(metrics, records, prepared, "test", [])
    page = Page(html)
    assert_stands_alone(html, page)
    assert not {"training", "comparison", "slices"} & set(page.text)
    assert "Pet against background" not in page.words("scores")
    for item in classes:
        score = scores[item.name]
        assert f"{item.name} {'–' if score is None else f'{score:.3f}'} – – –" in page.words("scores")
        assert "background:rgb({} {} {})".format(*item.colour) in html
    assert sum(score is None for score in scores.values()) == count - 2
    wrong = confusion[0][17 if count > 2 else 1]
    if count > MANY:  # no matrix of 40,000 cells, but what was mistaken
        assert "taken for kind" not in html and len(html) < 500_000
        assert f"kind 0 kind 17 {wrong:,} " in page.words("confusion")
    else:
        assert f"kind 0 taken for kind {17 if count > 2 else 1}: {wrong:,} pixels" in html
    # Names break at no letter, and over many narrow columns they stand upright.
    assert ".matrix .name { overflow-wrap: normal; }" in html
    assert ".matrix.many thead .name { writing-mode: vertical-rl;" in html
    assert "All, the best first" in page.words("gallery") and "kind 1 –" not in page.words("doubt")
    assert html.count("top:25.00%;left:0.00%;height:50.00%;width:100.00%") == 4
    photo, truth, prediction = page.images["gallery", row["name"]]
    assert picture(photo, "RGB").shape == (16, 32, 3)
    inside = slice(8, 24)
    assert_outlines(prediction, predicted[inside], PREDICTION[0])
    assert_regions(page.images["doubt", row["name"]][2], mask[inside], classes)
    # Ignored pixels are striped, in two greys.
    greys = {tuple(pixel) for pixel in picture(truth, "RGBA")[50:60, 10].tolist()}
    assert greys <= {(141, 141, 141, 150), (201, 201, 201, 150)} and greys
