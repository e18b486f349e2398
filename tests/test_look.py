"""Tests of the page that shows prepared data: its numbers, its pictures, and that nothing in the data can break it."""

import re

import numpy as np
import pytest
from pages import Page, assert_stands_alone, pets, picture, write_prepared

from unet.classes import IGNORE, PETS, ClassInfo
from unet.data.manifest import SPLITS
from unet.data.preparing import look
from unet.data.preparing.look import data_report

NASTY = ("<script>alert(1)</script>", "猫_" * 60, "no\udcffutf8")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    rows = pets(60)
    rows[30] |= {"name": "planted_empty", "mask": np.full((32, 32), 1, np.uint8), "mask_fit": float("nan")}
    rows[40] |= {"name": "planted_unfit", "mask_fit": -3.25}
    rows[50]["mask"] = rows[50]["mask"].copy()
    rows[50]["mask"][:, :8] = IGNORE
    return rows


@pytest.fixture(scope="module")
def html(rows, tmp_path_factory) -> str:
    left_out = [
        {"name": name, "split": "train", "problem": "unreadable", "detail": "a <i>bad</i> file"} for name in NASTY
    ]
    left_out += [{"name": f"gone_{i}", "split": "test", "problem": "no mask", "detail": ""} for i in range(500)]
    repaired = [{"name": f"repaired_{i}", "repair": "turned upright"} for i in range(7)]
    warnings = [
        {"name": "pet_3", "problem": "twin", "detail": "of pet_4"},
        {"name": "", "problem": "few", "detail": "60"},
    ]
    folder = tmp_path_factory.mktemp("look") / "pets"
    return data_report(write_prepared(folder, rows, left_out=left_out, repaired=repaired, warnings=warnings))


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_the_page_stands_alone(html, page):
    assert_stands_alone(html, page)
    assert len(html.encode()) < 3_000_000


def test_names_cannot_become_html(html, page):
    assert "<script" not in html and "<i>bad" not in html and "<b>pug" not in html
    assert NASTY[0] in page.words("left-out") and NASTY[1] in page.words("left-out")
    assert r"no\udcffutf8" in page.words("left-out")
    assert "<b>pug</b>" in page.words("breeds")


def test_the_passport_and_the_lists_count_right(page):
    words = page.words("passport")
    for number, name in ((35, "train"), (10, "val"), (15, "test"), (503, "left out"), (7, "repaired"), (2, "warnings")):
        assert f"{number} {name}" in words.replace(f"{number}{name}", f"{number} {name}")
    assert "4f" * 32 in words and "stretch" in words
    assert "3 unreadable" in page.words("left-out") and "500 no mask" in page.words("left-out")
    assert "gone_196" in page.words("left-out") and "gone_197" not in page.words("left-out")
    assert "The first 200 of 503; 303 more" in page.words("left-out")
    assert "turned upright7" in page.words("repairs") and "repaired_6" in page.words("repairs")
    # What concerns the whole set comes first.
    assert re.search("the whole set.*few.*pet_3.*twin", page.words("warnings"))


def test_a_class_of_the_papers_colour_can_be_seen(html):
    """White on white and, where pages are dark, black on black: each has an edge of another colour."""
    for rule in (r"\.swatch \{[^}]*inset 0 0 0 1px var\(--edge\)", r"\.stacks \.stack \{[^}]*solid var\(--edge\)"):
        assert re.search(rule, html), rule
    assert html.count('stroke="var(--edge)"') == 3  # what each class takes of a picture


def test_class_shares_are_those_of_the_pixels_and_add_up(html, page, rows):
    for split in SPLITS:
        masks = np.stack([row["mask"] for row in rows if row["split"] == split])
        valid = masks[masks != IGNORE]
        for index, name in enumerate(("pet", "background", "outline")):
            share = 100 * np.mean(valid == index)
            widths = re.findall(rf'width:([\d.]+)%;background:rgb\([\d ]+\)" title="{name} ', html)
            assert float(widths[SPLITS.index(split)]) == pytest.approx(share, abs=1e-3)
            assert f"{share:.1f}" in page.words("classes")
    widths = [float(width) for width in re.findall(r'width:([\d.]+)%;background:rgb\([\d ]+\)" title', html)]
    assert [sum(widths[i : i + 3]) for i in (0, 3, 6)] == pytest.approx([100] * 3, abs=0.01)
    # One of the 35 training masks shows nothing but background.
    assert "34" in page.words("classes")


def test_breeds_are_counted_by_split(html, rows):
    for breed in ("Abyssinian", "beagle"):
        counts = [sum((row["breed"], row["split"]) == (breed, split) for row in rows) for split in SPLITS]
        assert 'title="train {}, val {}, test {}"'.format(*counts) in html


def test_offenders_are_found_with_their_numbers(page, rows):
    words = page.words("offenders").replace("\N{NO-BREAK SPACE}", " ")
    groups = re.split("Masks that fit|Nothing but one|The least of|The most of|The most ignored", words)[1:]
    unfit, single, least, most, ignored = groups
    assert re.search("mask fit −3.25 planted_unfit train.*mask fit 2.00 pet_0 val", unfit)
    assert "planted_empty" not in unfit
    assert "class 1 A mask" in single and "background 100 % planted_empty train" in single
    smallest = min(np.mean(row["mask"][row["mask"] != IGNORE] == 0) or 1 for row in rows)
    assert f"pet {100 * smallest:.1f} %" in least and "planted_empty" not in least + most
    assert "ignored 25.0 % pet_50 train" in ignored


def test_every_photo_is_its_own_and_carries_its_own_mask(page, rows):
    images = np.stack([row["image"] for row in rows]).astype(int)
    for (_, name), (photo, lines, *_) in page.images.items():
        # JPEG is only near the pixels, but nearer than to those of any other sample.
        row = rows[np.abs(images - picture(photo, "RGB")).mean(axis=(1, 2, 3)).argmin()]
        assert row["name"] == name
        expected = look.outlines(row["mask"], PETS.classes, (look.LINES, look.LINES)).convert("RGBA")
        assert np.array_equal(picture(lines, "RGBA"), expected), name
    assert sum(section == "samples" for section, _ in page.images) == 24


def test_outlines_lie_on_borders_in_the_class_colours():
    mask = np.zeros((24, 24), np.uint8)
    mask[:, 12:] = 1
    mask[16:] = IGNORE
    drawn = np.asarray(look.outlines(mask, PETS.classes, (240, 240)).convert("RGBA"))
    assert [tuple(drawn[50, x, :3]) for x in (118, 121)] == [item.colour for item in PETS.classes[:2]]
    assert list(drawn[50, [60, 118, 121, 180], 3]) == [0, 255, 255, 0]
    assert set(map(tuple, drawn[200, :, :3])) == {(141,) * 3, (201,) * 3} and 0 < drawn[200, 9, 3] < 255


def test_the_padding_of_a_letterbox_is_no_part_of_the_photo(tmp_path):
    rows = pets(12)
    for row in rows:
        row |= {"original_width": 800, "original_height": 400, "breed": "", "split": "train"}
        row["mask"] = np.pad(row["mask"][8:24] % 2, ((8, 8), (0, 0)), constant_values=IGNORE)
        row["image"] = row["image"].copy()
        row["image"][:8] = row["image"][24:] = 0
    html = data_report(write_prepared(tmp_path / "own", rows, PETS.classes[:2], resize="letterbox"))
    page = Page(html)
    assert "ignored" not in page.words("offenders") and "breeds" not in page.text
    assert html.count("top:25.00%;left:0.00%;height:50.00%;width:100.00%") == len(re.findall("<figure", html))
    assert {picture(photo, "RGB").shape for photo, *_ in page.images.values()} == {(16, 32, 3)}
    for section, answer in (("left-out", "Nothing:"), ("repairs", "None:"), ("warnings", "None.")):
        assert answer in page.words(section)


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (0.0004, "<0.1 %"), (0.123, "12.3 %"), (0.9999, ">99.9 %"), (1, "100 %")]
)
def test_percent_never_rounds_some_to_none_or_all(share, text):
    assert look.percent(share) == text.replace(" ", "\N{NO-BREAK SPACE}")


def test_outlines_of_more_classes_than_a_palette_holds():
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    classes = tuple(ClassInfo(f"c{i}", (i, i, i)) for i in range(255))
    assert look.outlines(mask, classes, (64, 64)).size == (64, 64)
