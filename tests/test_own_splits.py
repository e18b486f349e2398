"""Own photos' splits: lists as other programs write them, and folders, are read rightly or refused in a sentence."""

import unicodedata
from collections import Counter

import pytest

from tests.test_own_data import ROADS, write
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.shards import Prepared
from unet.data.sources.own import own
from unet.errors import InputError
from unet.storage import Folder


@pytest.mark.parametrize("lists", [("trainval", "test"), ("train", "test"), ("train", "val", "test")])
def test_lists_say_the_splits(ray_cluster, tmp_path, lists):
    names = [f"p{i}" for i in range(22)] + ["p.1", "café"]
    folder = write(tmp_path / "roads", names, ROADS)
    given = {name: names[i :: len(lists)] for i, name in enumerate(lists)}
    stray = given["test"].pop()
    for name, members in given.items():
        lines = [unicodedata.normalize("NFD", f"{member}.jpg") for member in members] + ["../x", "."] * (name == "test")
        (folder / f"{name}.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf8")
    manifest = prepare(str(folder), Folder(tmp_path / "out"), Recipe(32))
    samples = Prepared(Folder(tmp_path / "out")).samples()
    splits = dict(zip(samples["name"].to_pylist(), samples["split"].to_pylist(), strict=True))
    assert {n for n, s in splits.items() if s == "test"} == set(given["test"])
    if "val" in lists:
        assert {n for n, s in splits.items() if s == "val"} == set(given["val"])
    assert [row["name"] for row in manifest.left_out] == ["../x", "."]
    assert (stray, "in_no_split") in {(row["name"], row["problem"]) for row in manifest.warnings}


LINES = {
    "names": "{}",
    "photos": "{}.jpg",
    "relative paths": "./images/{}.jpg",
    "paths of masks": "masks/{}.png",
    "absolute paths": "/somebody's/data/images/{}.jpg",
    "paths of Windows": "C:\\data\\images\\{}.jpg",
    "pairs": "images/{0}.jpg masks/{0}.png",
    "pairs with commas": "{0}.jpg,{0}.png",
    "quoted": '"{}.jpg"',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("form", LINES)
def test_lists_of_other_programs_are_read(tmp_path, form, encoding):
    names = ["é 1" if "pairs" not in form else "é1", "b.2", "c", "d"]
    folder = write(tmp_path / "roads", names, ROADS, formats=("jpg",))
    for split, members in (("train", names[:2]), ("test", names[2:])):
        lines = ["# made by a program", "", *(LINES[form].format(name) + "  " for name in members), "nobody.jpg"]
        (folder / f"{split}.txt").write_bytes("\r\n".join(lines).encode(encoding))
    source = own(folder, 1e-9)
    assert {sample.name: sample.split for sample in source.samples} == dict(
        zip(names, ["train", "train", "test", "test"], strict=True)
    )
    assert {problem.detail for problem in source.left_out} == {
        "line 5 of train.txt names no photo in images/",
        "line 5 of test.txt names no photo in images/",
    }


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "test.txt",
            b"x\ny",
            "No line of .*test.txt names a photo that exists: line 1 is `x`. Write names in images/, ",
        ),
        ("test.txt", "é".encode("latin-1"), "test.txt is not utf-8 text .line 1.: save it as UTF-8"),
        ("test.txt", "b\r\nc\r\n".encode("utf-16-le"), "test.txt looks like UTF-16 without a byte order mark"),
        ("test.txt", "b".encode("utf-16") + b"x", "test.txt is not utf-16 text"),
        ("valid.txt", b"b", "valid.txt would not be read: call it val.txt"),
        ("Test.txt", b"b", "Test.txt would not be read: call it test.txt"),
    ],
)
def test_lists_that_cannot_be_read_are_one_sentence(tmp_path, file, content, words):
    folder = write(tmp_path / "roads", ["a", "b"], ROADS)
    (folder / "train.txt").write_text("a")
    (folder / "test.txt").write_text("b")
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        own(folder, 0.1)
    assert "\n" not in str(error.value)


def test_folders_called_after_splits_are_the_splits(tmp_path):
    names = ["train/x/a", "train/y/a", "valid/x/a", "test/y/a"]
    samples = own(write(tmp_path / "roads", names, ROADS), 0.5).samples
    assert {s.name: (s.split, s.breed) for s in samples} == {
        "train/x/a": ("train", "x"),
        "train/y/a": ("train", "y"),
        "valid/x/a": ("val", "x"),
        "test/y/a": ("test", "y"),
    }
    with pytest.raises(InputError, match=r"the photos are in the folders train/, val/: give trainval/ and test/, "):
        own(write(tmp_path / "two", ["train/a", "val/a"], ROADS), 0.5)


def test_a_few_photos_have_one_of_val_where_nobody_says_which(tmp_path):
    """By their hashes these seven would have none, and a training refuses data without."""
    names = ["horse", "page", "cell", "microaneurysms", "coins", "camera", "retina"]
    folder = write(tmp_path / "few", names, ROADS, formats=("jpg",))
    assert Counter(sample.split for sample in own(folder, 0.1).samples) == {"train": 5, "val": 1, "test": 1}
    # What has no mask cannot be it, and what lists say stays.
    (one,) = [sample.name for sample in own(folder, 0.1).samples if sample.split == "val"]
    (folder / "masks" / f"{one}.png").unlink()
    assert Counter(sample.split for sample in own(folder, 0.1).samples) == {"train": 4, "val": 1, "test": 1}
    (folder / "trainval.txt").write_text("\n".join({*names} - {one, "horse"}))
    (folder / "test.txt").write_text("horse")
    assert Counter(sample.split for sample in own(folder, 1e-9).samples) == {"train": 5, "test": 1}


def test_names_of_masks_may_be_longer(tmp_path):
    folder = write(tmp_path / "roads", ["a", "b"], ROADS)
    for mask in (folder / "masks").iterdir():
        mask.rename(mask.with_stem(f"{mask.stem}_mask"))
    with pytest.raises(InputError, match=r"but `a_mask` is there: write `mask_suffix: _mask` in .*dataset.yaml"):
        own(folder, 0.1)
    with open(folder / "dataset.yaml", "a") as file:
        file.write("mask_suffix: _mask\n")
    assert {sample.name for sample in own(folder, 0.1).samples} == {"a", "b"}


def test_lists_that_do_not_fit_together_are_refused(ray_cluster, tmp_path):
    folder = write(tmp_path / "roads", ["a", "b"], ROADS)
    (folder / "train.txt").write_text("a")
    (folder / "val.txt").write_text("b")
    with pytest.raises(InputError, match=r"holds train.txt, val.txt: give trainval.txt and test.txt"):
        prepare(str(folder), Folder(tmp_path / "out"), Recipe(32))
