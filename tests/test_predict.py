"""Predictions for photos: masks against resizing and decoding written down again, names, bad photos, continuation."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from conftest import ROOT, command
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unet.data.shards import Prepared
from unet.data.sources.own import own
from unet.data.synthetic import draw_pet
from unet.errors import InputError
from unet.models.trained import TrainedModel
from unet.prediction import stages, tiles
from unet.prediction.photos import find_photos, output_names
from unet.prediction.stages import Predictor, Work
from unet.prediction.stream import groups
from unet.recipe.layers import build_unet
from unet.storage import Folder

TURNS = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""What a viewer does to the stored pixels (EXIF 2.3, tag 274)."""


def drawn(index: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(draw_pet(index, 128, seed=3)[0]).resize((width, height), Image.Resampling.LANCZOS)


def draw_photos(folder: Path) -> dict[str, np.ndarray]:
    """Photos of many kinds below the folder; by name, the RGB pixels that a person sees."""
    seen: dict[str, np.ndarray] = {}

    def keep(name: str, picture: Image.Image, pixels: np.ndarray | None = None, **options) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name, **options)
        with Image.open(folder / name) as saved:
            seen[name] = np.asarray(saved.convert("RGB")) if pixels is None else pixels

    keep("plain.jpg", drawn(0, 75, 101), quality=95)
    keep("wide.png", drawn(1, 40, 300))
    keep("one.png", drawn(2, 1, 1))
    keep("line.png", drawn(3, 2, 500))
    grey = drawn(4, 61, 47).convert("L")
    keep("grey.png", grey)
    deep = np.asarray(grey).astype(np.uint16) * 257
    keep("deep.png", Image.fromarray(deep), np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, 2))
    clear = drawn(5, 50, 70).convert("RGBA")
    clear.putalpha(128)
    keep("clear.png", clear, np.asarray(clear)[..., :3])
    keep("palette.gif", drawn(6, 60, 60).quantize(32))
    keep("print.jpg", drawn(7, 64, 80).convert("CMYK"), quality=95)
    frames = [drawn(i, 44, 66).quantize(64) for i in (8, 9)]
    keep("moving.gif", frames[0], save_all=True, append_images=frames[1:])
    for turn, turned in TURNS.items():
        exif = Image.Exif()
        exif[274] = turn
        keep(f"turned/{turn}.jpg", drawn(turn, 52, 90), quality=95, exif=exif)
        seen[f"turned/{turn}.jpg"] = turned(seen[f"turned/{turn}.jpg"])
    # The same stem twice in a folder, and again in another.
    keep("twice.jpg", drawn(20, 45, 61), quality=95)
    keep("twice.png", drawn(21, 61, 45))
    keep("more/twice.png", drawn(22, 70, 70))
    return seen


def spoil(folder: Path) -> dict[str, str]:
    """Bad photos below the folder, and what is no photo; by name, the short name of the problem."""
    whole = (folder / "plain.jpg").read_bytes()
    (folder / "bad").mkdir()
    (folder / "bad" / "text.jpg").write_text("no photo")
    (folder / "bad" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bad" / "empty.png").write_bytes(b"")
    width, height = (25_000).to_bytes(4, "big"), (25_000).to_bytes(4, "big")
    png = (folder / "one.png").read_bytes()
    bomb = b"IHDR" + width + height + png[24:29]
    checksum = int.to_bytes(__import__("zlib").crc32(bomb), 4, "big")
    (folder / "bad" / "bomb.png").write_bytes(png[:12] + bomb + checksum + png[33:])
    (folder / "notes.txt").write_text("not asked for")
    (folder / ".hidden.jpg").write_bytes(whole)
    (folder / "bad" / "a\nb.jpg").write_bytes(whole)
    names = {"text.jpg": "damaged", "cut.jpg": "damaged", "empty.png": "empty_file", "bomb.png": "too_large"}
    return {f"bad/{name}": problem for name, problem in names.items()} | {"bad/a\\nb.jpg": "unsafe_name"}


@pytest.fixture(scope="module")
def model(trained) -> TrainedModel:
    run, _ = trained
    return TrainedModel.find(run.name, Folder(run.parent))


@pytest.fixture(scope="module")
def network(model):
    """Probabilities (S, S, C) of a square, by Keras and nothing else of what predicts."""
    net = build_unet(32, model.network.base_filters, model.network.depth, 0.0, 3)
    net.set_weights([model.weights[weight.path] for weight in net.weights])
    return lambda square: tf.nn.softmax(net(square[None] / np.float32(255), training=False))[0].numpy()


def oracle(pixels: np.ndarray, network, box=None) -> np.ndarray:
    """The mask of a photo: squeezed into the square (or the box of it), asked, cut, enlarged by TensorFlow."""
    top, left, height, width = box or (0, 0, 32, 32)
    square = np.zeros((32, 32, 3), np.uint8)
    small = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BILINEAR)
    square[top : top + height, left : left + width] = small
    found = network(square)[top : top + height, left : left + width]
    return tf.image.resize(found, pixels.shape[:2]).numpy().argmax(-1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    seen = draw_photos(folder)
    return folder, seen, spoil(folder)


@pytest.fixture(scope="module")
def predicted(photos, trained, tmp_path_factory):
    """One command over all of them: its flags, output and exit code."""
    output = tmp_path_factory.mktemp("predicted") / "out"
    flags = ["--model", "trained", "--input", photos[0], "--output", output, "--storage-path", trained[0].parent]
    return flags, output, command("predict", *flags, "--num-workers", 1, "--batch-size", 5, "--probabilities")


def table_of(output: Path) -> dict[str, dict]:
    with open(output / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert max(Counter(row["file"] for row in rows).values()) == 1
    return {row["file"]: row for row in rows}


@pytest.mark.versions
def test_every_photo_has_its_mask(photos, predicted, network):
    _, seen, bad = photos
    _, output, code = predicted
    rows = table_of(output)
    assert code == 0 and rows.keys() == seen.keys() | bad.keys()
    assert {file: row["status"] for file, row in rows.items()} == dict.fromkeys(seen, "done") | bad
    palette, classes = [], set()
    for file, pixels in seen.items():
        row, expected = rows[file], oracle(pixels, network)
        with Image.open(output / row["mask"]) as mask:
            palette.append(mask.getpalette()[:9])
            ids = np.asarray(mask)
        assert mask.mode == "P" and ids.shape == pixels.shape[:2] == (int(row["height"]), int(row["width"]))
        assert (ids == expected).mean() > 0.999, file
        found = [int(row[f"pixels_{name}"]) for name in ("pet", "background", "outline")]
        assert found == np.bincount(ids.reshape(-1), minlength=3).tolist()
        assert float(row["share_pet"]) == pytest.approx(found[0] / ids.size, abs=1e-6)
        probabilities = np.load(output / row["probabilities"])["probabilities"]
        assert probabilities.dtype == np.float16 and probabilities.shape == (*ids.shape, 3)
        assert float(row["confidence"]) == pytest.approx(probabilities.max(-1).mean(dtype=float), abs=1e-3)
        classes.update(np.unique(ids).tolist())
    assert len(classes) > 1  # else nothing was compared
    assert all(row == [222, 84, 6, 92, 112, 155, 255, 217, 61] for row in palette)
    files = [f"{kind}/{p.stem}" for kind in ("masks", "overlays") for p in (output / kind).rglob("*.*")]
    assert len(files) == 2 * len(seen)


def test_equal_stems_keep_apart(predicted):
    rows = table_of(predicted[1])
    masks = {rows[file]["mask"] for file in ("twice.jpg", "twice.png", "more/twice.png", "plain.jpg")}
    assert masks == {"masks/twice.jpg.png", "masks/twice.png.png", "masks/more/twice.png", "masks/plain.png"}


def test_overlays_show_the_classes_over_the_photo(photos, predicted):
    for file in ("plain.jpg", "turned/6.jpg"):
        row, pixels = table_of(predicted[1])[file], photos[1][file]
        with Image.open(predicted[1] / row["overlay"]) as picture:
            found = np.asarray(picture, float)
        ids = np.asarray(Image.open(predicted[1] / row["mask"]))
        colours = np.array([(222, 84, 6), (92, 112, 155), (255, 217, 61)])[ids]
        grey = 60 + 0.75 * (pixels @ (0.299, 0.587, 0.114))
        expected = grey[..., None] * (1 - 141 / 255) + colours * (141 / 255)
        assert found.shape == expected.shape and np.abs(found - expected).mean() < 6


def test_the_same_command_does_only_what_is_missing(photos, predicted, tmp_path):
    """A lost mask, a torn overlay, a changed photo, one more with a name that is taken: these, and the bad ones."""
    folder, output = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos[0], folder)
    shutil.copytree(predicted[1], output)
    job = output / ".predictions" / "job.json"
    job.write_text(job.read_text().replace(str(photos[0]), str(folder)))
    before = {
        p: (p.stat().st_mtime_ns, p.read_bytes())
        for kind in ("masks", "overlays")
        for p in (output / kind).rglob("*.*")
    }
    (output / "masks" / "grey.png").unlink()
    (output / "overlays" / "wide.jpg").write_bytes(before[output / "overlays" / "wide.jpg"][1][:-1])
    drawn(30, 33, 44).save(folder / "deep.png")
    drawn(31, 34, 45).save(folder / "plain.png")
    (folder / "bad" / "text.jpg").write_bytes((folder / "plain.jpg").read_bytes())  # repaired
    flags = ["--model", "trained", "--input", folder.as_uri(), "--output", output.as_uri(), *predicted[0][6:]]
    assert command("predict", *flags, "--num-workers", 1, "--probabilities") == 0
    after = {p: p.stat().st_mtime_ns for kind in ("masks", "overlays") for p in (output / kind).rglob("*.*")}
    touched = {p.relative_to(output).as_posix() for p, time in after.items() if before.get(p, (0,))[0] != time}
    names = "grey.png", "wide.png", "deep.png", "plain.png.png", "bad/text.png"
    assert touched == {f"masks/{n}" for n in names} | {f"overlays/{n[:-4]}.jpg" for n in names}
    assert {p for p in before if before[p][1] != p.read_bytes()} == {
        output / "masks" / "deep.png",
        output / "overlays" / "deep.jpg",
    }
    rows = table_of(output)
    assert rows["plain.png"]["mask"] == "masks/plain.png.png" and rows["plain.jpg"]["mask"] == "masks/plain.png"
    assert rows["bad/text.jpg"]["status"] == "done" and rows["deep.png"]["width"] == "44"


def test_other_predictions_are_refused(predicted, photos, trained, tmp_path, capsys):
    flags, output, _ = predicted
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    (tmp_path / "own" / "masks").mkdir(parents=True)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "x.txt").write_text("")
    (tmp_path / "damaged" / ".predictions").mkdir(parents=True)
    (tmp_path / "damaged" / ".predictions" / "job.json").write_text("[]")
    checkpoints = sorted(p for p in (trained[0] / "checkpoints").glob("step_*"))
    other = next(p for p in checkpoints if f"checkpoints/{p.name}" != trained[1]["best_checkpoint"])
    for changes, words in (
        (["--tta", "--probabilities"], "tta False there, True here"),
        (["--model", other, "--probabilities"], "weights"),
        (["--probabilities", "--input", photos[0] / "more"], "input"),
        (["--output", tmp_path / "own"], "masks that this job did not write"),
        (["--output", photos[0]], "holds the photos"),
        (["--input", tmp_path / "nothing"], "1 .txt"),
        (["--input", tmp_path / "nowhere"], "There are no photos at"),
        (["--model", "nowhere", "--output", tmp_path / "new"], "neither a run"),
        (["--model", "x" * 300, "--output", tmp_path / "new"], "neither a run"),
        (["--output", tmp_path / "nothing" / "x.txt"], "give another --output"),
        (["--output", tmp_path / "damaged", "--probabilities"], "job.json is damaged"),
        (["--num-workers", 99, "--output", tmp_path / "new"], "at most 2 fit"),
    ):
        assert command("predict", *flags, *changes) == 2 and words in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before
    assert not (tmp_path / "own" / ".predictions").exists()


def test_what_cannot_be_written_is_a_sentence(trained, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    drawn(0, 40, 50).save(tmp_path / "photos" / "a.jpg")
    flags = ["--input", tmp_path / "photos", "--output", tmp_path / "out", "--storage-path", trained[0].parent]
    flags = ["--model", "trained", "--num-workers", 1, *flags]
    assert command("predict", *flags) == 0
    (tmp_path / "out" / "masks" / "a.png").unlink()
    (tmp_path / "out" / "masks" / "a.png" / "in the way").mkdir(parents=True)
    capsys.readouterr()
    assert command("predict", *flags) == 1
    words = capsys.readouterr().err
    assert "masks/a.png: Is a directory; put that right. The same command continues from here." in words, words


def test_predictions_are_a_data_set_to_correct_and_to_train_on(trained, tmp_path, capsys):
    """Read again as any data are: unsure pixels say nothing, corrected ones the correction, all others as predicted."""
    run, _ = trained
    turned = Image.Exif()
    turned[274] = 6
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number in range(12):
        drawn(number, 40, 50).save(tmp_path / "photos" / f"{number}.jpg", quality=95)
    drawn(20, 40, 50).save(tmp_path / "photos" / "more" / "turned.JPG", quality=95, exif=turned)
    flags = ["--model", "trained", "--input", tmp_path / "photos", "--storage-path", run.parent, "--num-workers", 1]
    assert command("predict", *flags, "--output", tmp_path / "plain", "--probabilities") == 0
    target = tmp_path / "set"
    assert command("predict", *flags, "--as-dataset", target, "--least-confidence", 0.6) == 0
    ignored = 0
    for name in (*map(str, range(12)), "more/turned"):
        plain, mask = (np.asarray(Image.open(folder / f"masks/{name}.png")) for folder in (tmp_path / "plain", target))
        sure = np.load(tmp_path / f"plain/probabilities/{name}.npz")["probabilities"].astype(np.float32).max(-1)
        clear = np.abs(sure - 0.6) > 1e-3  # as float16 has it
        assert np.array_equal(mask[clear], np.where(sure < 0.6, 255, plain)[clear])
        ignored += (mask == 255).sum()
    assert ignored, "some pixels are to be unsure"
    assert (target / "images/more/turned.JPG").read_bytes() == (tmp_path / "photos/more/turned.JPG").read_bytes()
    corrected = Image.open(target / "masks" / "3.png")
    corrected.paste(1, (0, 0, *corrected.size))
    corrected.save(target / "masks" / "3.png")
    capsys.readouterr()
    assert command("predict", *flags, "--as-dataset", target, "--least-confidence", 0.6) == 2
    assert "is a data set already, whose masks may have been corrected" in capsys.readouterr().err
    found = own(target, 0.25)
    assert [info.name for info in found.labels.classes] == ["pet", "background", "outline"]
    assert len(found.samples) == 13 and not found.left_out
    flags = ["--source", target, "--output", tmp_path / "prepared", "--image-size", 32]
    assert command("prepare", *flags) == 0
    rows = Prepared(Folder(tmp_path / "prepared")).samples(["name", "pixels", "ignored"]).to_pylist()
    by_name = {row["name"]: row for row in rows}
    assert by_name["3"]["pixels"] == [0, 32 * 32, 0] and sum(row["ignored"] for row in rows) > 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--output", "a", "--as-dataset", "b"], "--as-dataset names the folder itself: leave out --output"),
        (["--output", "a", "--least-confidence", "0.5"], "--least-confidence 0.5 is for --as-dataset"),
    ],
)
def test_flags_of_a_data_set_fit_together(flags, words, capsys):
    assert command("predict", "--model", "a", "--input", "b", *flags) == 2
    assert words in capsys.readouterr().err


def test_nothing_but_bad_photos_is_a_failure(trained, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a\tb.jpg").write_bytes(b"")
    flags = ["--input", tmp_path / "photos", "--output", tmp_path / "out", "--storage-path", trained[0].parent]
    assert command("predict", "--model", "trained", *flags) == 1
    assert table_of(tmp_path / "out")["a\\tb.jpg"]["status"] == "unsafe_name"


@pytest.fixture
def through(model, tmp_path, monkeypatch):
    """Read, predict and write photos in this process: their masks, by name."""
    monkeypatch.setattr(stages, "start_tensorflow", lambda threads, use_gpu: None)

    def run(pictures: dict[str, Image.Image], tta=False, probabilities=None, **changes) -> dict[str, np.ndarray]:
        for name, picture in pictures.items():
            picture.save(tmp_path / name)
        work = Work(tmp_path.as_uri(), str(tmp_path / "out"), 32, "stretch", model.classes, *[False] * 4, 0.0, 1)
        predictor = Predictor(replace(model, **{k: v for k, v in changes.items() if k == "resize"}), 1, 4, tta)
        if probabilities is not None:
            monkeypatch.setattr(predictor, "_probabilities", probabilities)
        files = find_photos(str(tmp_path), Folder(tmp_path / "out")).table
        rows = stages.read(files.append_column("name", files["file"]), 0, replace(work, **changes))
        stages.write(predictor(rows), replace(work, **changes))
        return {name: np.asarray(Image.open(tmp_path / "out" / "masks" / f"{name}.png")) for name in pictures}

    return run


def test_letterboxed_photos(through, network):
    boxes = {"wide.png": ((37, 91), (9, 0, 13, 32)), "tall.png": ((91, 37), (0, 9, 32, 13))}
    pictures = {name: drawn(index, *shape) for index, (name, (shape, _)) in enumerate(boxes.items())}
    found = through(pictures, resize="letterbox")
    for name, (_, box) in boxes.items():
        assert (found[name] == oracle(np.asarray(pictures[name]), network, box)).mean() > 0.999


def test_a_mirrored_photo_has_the_mirrored_mask(through):
    picture = drawn(4, 60, 83)
    pictures = {"left.png": picture, "right.png": Image.fromarray(np.asarray(picture)[:, ::-1])}
    plain, both = through(pictures), through(pictures, tta=True)
    assert not np.array_equal(plain["left.png"], plain["right.png"][:, ::-1])  # else nothing is shown
    assert (both["left.png"] == both["right.png"][:, ::-1]).mean() > 0.999


@given(scale=st.integers(1, 4), size=st.sampled_from([8, 32, 48]))
def test_tiles_weigh_one_everywhere(scale, size):
    total = np.zeros((scale * size, scale * size))
    for weight, (top, left) in zip(tiles.weights(scale, size), tiles.places(scale, size), strict=True):
        assert weight.shape == (size, size) and weight.min() > 0
        total[top : top + size, left : left + size] += weight
    assert np.allclose(total, 1, atol=1e-6)


def test_tiles_leave_no_seams(through, model):
    """Tiles and whole that agree give what each says; a slope through all tiles stays a slope."""
    size, side = 32, stages.TILE_SCALE * 32
    work = Work("", "", size, "stretch", model.classes, True, *[False] * 3, 0.0, 1)
    spots = tiles.places(stages.TILE_SCALE, size)
    constant = np.broadcast_to(np.float32([0.5, 0.3, 0.2])[:, None, None], (1 + len(spots), 3, size, size))
    assert np.allclose(stages.inside(constant, 100, 100, work), constant[0, :, :1, :1], atol=1e-6)
    slope = np.linspace(0, 1, side, dtype=np.float32)
    squares = [np.broadcast_to(slope[left : left + size], (3, size, size)) for _, left in spots]
    assert np.allclose(tiles.blend(np.array(squares), stages.TILE_SCALE), slope, atol=1e-6)
    # Large enough for tiles or not, a network that sees only colour finds it where it is.
    red = np.zeros((130, 150, 3), np.uint8)
    red[:, 75:] = 255
    brightness = lambda s: np.stack([s[..., 0] / 255, 1 - s[..., 0] / 255, 0 * s[..., 0]], 1).astype(np.float32)  # noqa: E731
    pictures = {"large.png": Image.fromarray(red), "small.png": Image.fromarray(red[:50, 50:100])}
    found = through(pictures, probabilities=brightness, tile=True)
    assert all(
        (mask == (red[: len(mask), 75 - mask.shape[1] // 2 :][:, : mask.shape[1], 0] == 0)).all()
        for mask in found.values()
    )


@given(
    st.lists(
        st.sampled_from(["a.jpg", "a.png", "a", "a.png.jpg", "a.jpg.png", "b/a.jpg", "b/a.webp", "a.png/c.gif"]),
        unique=True,
    )
)
def test_names_never_meet(files):
    names = output_names(files, {})
    assert len({*names.values()}) == len(files) and names == output_names(files[::-1], {})
    paths = [f"{name}.png" for name in names.values()]
    assert not any(other.startswith(f"{path}/") for path in paths for other in paths)
    half = output_names(files[: len(files) // 2], {})
    grown = output_names(files, half)  # photos that come later move nothing
    assert grown.items() >= half.items() and len({*grown.values()}) == len(files)
    paths = [f"{name}.png" for name in grown.values()]
    assert not any(other.startswith(f"{path}/") for path in paths for other in paths)


def test_a_folder_named_as_a_mask_of_before():
    grown = output_names(["a.jpg", "a.png/b.jpg", "a.png/b.gif", "a.png-2/b.gif.jpg"], {"a.jpg": "a"})
    assert grown == {
        "a.jpg": "a",
        "a.png/b.jpg": "a.png-2/b.jpg",
        "a.png/b.gif": "a.png-2/b.gif-2",
        "a.png-2/b.gif.jpg": "a.png-2/b.gif",
    }


def test_patterns_and_what_is_left_out(tmp_path, monkeypatch):
    for name in ("a.jpg", "b.txt", "in/b.JPG", "in/deep/c.jpg", "in/.no/d.jpg", "out/overlays/a.jpg", "[x].jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def found(text):
        return find_photos(str(text), Folder(tmp_path / "out")).table["file"].to_pylist()

    for base in (str(tmp_path), tmp_path.as_uri()):
        assert {*found(f"{base}/**/*.jpg")} == {"a.jpg", "in/deep/c.jpg", "[x].jpg"}
        assert found(f"{base}/in/*/*.jpg") == ["deep/c.jpg"] and found(f"{base}/b.txt") == ["b.txt"]
    assert found(tmp_path / "[ab].???") == ["a.jpg"] and found(tmp_path / "[x].jpg") == ["[x].jpg"]
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert found(tmp_path / "in") == ["b.JPG", "deep/c.jpg"]
    assert found(tmp_path / "[!b].jpg") == found(tmp_path / "[^b].jpg") == found(tmp_path / "[[a].jpg") == ["a.jpg"]
    (tmp_path / "in" / "lost.jpg").symlink_to(tmp_path / "nowhere")
    assert found(tmp_path / "in") == ["b.JPG", "deep/c.jpg", "lost.jpg"]
    with pytest.raises(InputError, match="There are no photos"):
        found(tmp_path / "[z-a]*.jpg")
    with pytest.raises(InputError, match="There are no photos"):
        found(tmp_path / "*.webp")
    scan = os.scandir

    def locked(place):
        if str(place).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(InputError, match=r"Cannot read .*/in/deep: Permission denied"):
        found(tmp_path / "in")


def test_large_files_stand_alone():
    sizes = np.array([1, 1, 2**23, 1, 1, 1, 1])
    assert groups(sizes, 3) == [0, 2, 3, 6] and groups(sizes[:0], 3) == []


@pytest.mark.slow
def test_a_kill_costs_only_what_was_under_way(trained, tmp_path):
    """Kill the job when a part of the photos is done; the same command gives what one that was not killed does."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(240):
        drawn(i, 90 + i % 7, 120 + i % 5).save(folder / f"{i}.jpg", quality=90)

    def command(output: Path) -> list[str]:
        flags = ["--model", "trained", "--input", folder, "--output", output, "--num-workers", 1]
        return [sys.executable, str(ROOT / "jobs" / "predict.py"), *map(str, flags)]

    env = os.environ | {"UNET_STORAGE_PATH": str(trained[0].parent), "RAY_ADDRESS": "local"}
    for output, end in ((tmp_path / "killed", signal.SIGKILL), (tmp_path / "stopped", signal.SIGINT)):
        job = subprocess.Popen(command(output), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        parts = output / ".predictions"
        while len(list(parts.glob("rows-*"))) < 3:
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(end)
        words = job.communicate()[0]
        assert job.returncode == (-9 if end == signal.SIGKILL else 130), words
        if end == signal.SIGINT:
            assert "the same command goes on" in words and len(table_of(output)) >= 2 * 30  # two groups at the least
    time.sleep(5)  # what the killed driver's tasks still write
    import pyarrow.parquet as pq

    done = pa.concat_tables([pq.read_table(p) for p in (tmp_path / "killed" / ".predictions").glob("rows-*")])
    done = [tmp_path / "killed" / "masks" / f"{name}.png" for name in done["name"].to_pylist()]
    assert 0 < len(done) < 240
    times = {path: path.stat().st_mtime_ns for path in done}
    outputs = [tmp_path / name for name in ("killed", "stopped", "unbroken")]
    for output in outputs:
        assert subprocess.run(command(output), env=env, stdout=subprocess.DEVNULL).returncode == 0
    assert times == {path: path.stat().st_mtime_ns for path in done}
    for output in outputs[:2]:
        assert table_of(output).keys() == table_of(outputs[2]).keys() and len(table_of(output)) == 240
        for path in (outputs[2] / "masks").iterdir():
            same = np.asarray(Image.open(output / "masks" / path.name)) == np.asarray(Image.open(path))
            assert same.mean() > 0.999
        assert not list(output.rglob(".*.png.*")), "torn files"
