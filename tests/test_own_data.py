"""Own photos and masks: what `dataset.yaml` and the folder say is what is trained, scored and shown."""

import json
import os
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.conftest import read_json, train
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.sources.description import describe
from unet.data.sources.find import check_source
from unet.data.sources.own import own
from unet.errors import InputError
from unet.storage import Folder

ROADS = {"classes": {"road": 10, "car": [20, 21], "other": 0}, "ignore": 255, "colours": {"car": [255, 0, 0]}}


def write(folder: Path, names, description: dict, formats=("jpg", "png"), size=(48, 36)) -> Path:
    """Photos whose brightness gives the class away, with masks of the values that the description names."""
    random = np.random.default_rng(5)
    values = [v for value in description["classes"].values() for v in (value if isinstance(value, list) else [value])]
    for i, name in enumerate(names):
        blocks = random.integers(0, len(values), (3, 4))
        place = np.kron(blocks, np.ones((size[1] // 3, size[0] // 4), int))
        mask = np.array(values)[place].astype(np.uint16 if max(values) > 255 else np.uint8)
        mask[:2] = 255 if "ignore" in description else mask[2]
        grey = (place * 250 // max(1, len(values) - 1))[..., None] + random.integers(-6, 6, (*place.shape, 3))
        photo = folder / "images" / f"{name}.{formats[i % len(formats)]}"
        trimap = folder / "masks" / f"{name}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        trimap.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).save(photo)
        Image.fromarray(mask).save(trimap)
    (folder / "dataset.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
    return folder


def rows_of(target: Path) -> dict[str, dict]:
    return {row["name"]: row for file in target.glob("t*-*.parquet") for row in pq.read_table(file).to_pylist()}


def test_values_names_formats_and_folders(ray_cluster, tmp_path):
    names = [f"{'north' if i % 2 else 'south'}/photo {i}" for i in range(30)]
    folder = write(tmp_path / "roads", names, ROADS, formats=("jpg", "PNG", "webp", "tif", "bmp"))
    (folder / "images" / "lonely.jpg").write_bytes((folder / "images" / "south" / "photo 0.jpg").read_bytes())
    (folder / "images" / "south" / "photo 0.png").write_bytes(b"another photo of this name")
    (folder / "images" / ".DS_Store").write_bytes(b"")
    (folder / "images" / "raw.heic").write_bytes(b"no picture for Pillow")
    write(tmp_path / "elsewhere", ["linked"], ROADS)
    for part in ("images", "masks"):
        (folder / part / "more").symlink_to(tmp_path / "elsewhere" / part)
    manifest = prepare(str(folder), Folder(tmp_path / "out"), Recipe(48, "letterbox", original_masks=True))
    assert manifest.classes == ["road", "car", "other"] and manifest.colours[1] == [255, 0, 0]
    assert {(row["name"], row["problem"]) for row in manifest.left_out} == {
        ("lonely", "missing_mask"),
        ("south/photo 0", "ambiguous"),
        ("raw", "unknown_format"),
    }
    assert len(manifest.left_out) == 3
    assert sum(manifest.counts.values()) == 30 and manifest.counts["test"]
    rows = rows_of(tmp_path / "out")
    name = next(name for name in rows if name.startswith("north"))
    assert rows[name]["breed"] == "north" and (rows[name]["original_height"], rows[name]["original_width"]) == (36, 48)
    raw = np.asarray(Image.open(folder / "masks" / f"{name}.png"))
    expected = np.select([raw == 10, (raw == 20) | (raw == 21), raw == 0], [0, 1, 2], 255)
    mask = np.frombuffer(rows[name]["mask"], np.uint8).reshape(48, 48)
    assert np.array_equal(mask[6:42], expected) and (mask[:6] == 255).all() and (mask[42:] == 255).all()


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (None, "dataset.yaml is missing"),
        ({}, "must hold `classes:`"),
        ({"classes": {"road": 1}}, "at least 2"),
        ({"classes": {"road": 1, "car": 1}}, "value 1 is given twice"),
        ({"classes": {"road": 1, "car": 2}, "ignore": 2}, "value 2 is given twice"),
        ({"classes": {"road": 1, "_car": 2}}, "_car"),
        ({"classes": {"road": 1, "a[b]": 2}}, "a[b]"),
        ({"classes": {"road": "one", "car": 2}}, "road"),
        ({"classes": {"road": True, "car": 2}}, "road"),
        (
            {"classes": {"road": 1, "car": 2}, "colours": {"cat": [1, 2, 3]}},
            "`colours:` names cat, which is not among the classes",
        ),
        ({"clases": {"road": 1, "car": 2}}, "must hold `classes:`"),
        ({"classes": {"road": 1, "car": 2}, "ignroe": 3}, "no key `ignroe`; did you mean ignore?"),
        ({"classes": {"road": 1, "Road": 2}}, " differ only in case"),
        ({"classes": {"": 1, "car": 2}}, "a class cannot be called ''"),
        ({"classes": {"Straße": 1, "car": 2}}, "a class cannot be called 'Straße'"),
        ({"classes": {"road ": 1, "car": 2}}, "a class cannot be called 'road '"),
        ({"classes": {"r" * 61: 1, "car": 2}}, "they hold at most 60 of"),
        ({"classes": {0: "road", 1: "car"}}, "write the name first, as in `road: 0`"),
        ({"classes": {"road": 1.0, "car": 2}}, "1.0 is not a mask value"),
        ({"classes": {"road": [], "car": 2}}, "[] is not a mask value"),
        ({"classes": {"road": "#80408", "car": 2}}, "'#80408' is not a mask value"),
        ({"classes": {"road": "#804080", "car": 2}}, "numbers or colours, not both"),
        ({"classes": {"road": "#804080", "car": "#804080"}}, "the mask value #804080 is given twice"),
        ({"classes": {"road": 1, "car": 2}, "masks": "gray"}, "masks: input should be 'index', 'grey'"),
        ({"classes": {"road": 1, "car": 2}, "exif_orientation": True}, "exif_orientation: input should be 'applied'"),
        ("classes: {road: 1, road: 2, car: 3}", "road is given twice, in line 1"),
        ("classes: {a: 1, b: 2}\nignore: 3\nclasses: {a: 2, b: 1}", "classes is given twice, in lines 1 and 3"),
    ],
)
def test_description_that_does_not_fit_is_one_sentence(tmp_path, description, words):
    folder = write(tmp_path / "roads", ["a", "b"], ROADS)
    (folder / "dataset.yaml").unlink() if description is None else (folder / "dataset.yaml").write_text(
        description if isinstance(description, str) else yaml.safe_dump(description)
    )
    with pytest.raises(InputError) as error:
        check_source(str(folder))
    assert words in str(error.value) and "dataset.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["JPEGImages/a.jpg", "SegmentationClass/a.png"], "rename JPEGImages/ to images/ and SegmentationClass/ to "),
        (["SegmentationClass/a.png", "labelmap.txt"], "rename the folder with its photos to images/ and Segmentation"),
        (["SegmentationClass/a.npy", "SegmentationClassPNG/a.png"], "SegmentationClassPNG/ to masks/"),
        (["images/a.jpg", "labels/a.png"], "holds images/, but no masks/."),
        (["masks/a.png", "a.jpg"], "holds masks/, but no images/."),
        (["train/a.jpg", "annotations/instances.json"], "holds outlines in JSON or XML, which are not read"),
        (["a.jpg", "a.xml"], "holds outlines in JSON or XML, which are not read"),
        (["a.jpg", "a.png"], "holds neither prepared data nor pictures in a known layout"),
    ],
)
def test_what_labelling_tools_write_is_told_what_it_lacks(tmp_path, files, words):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(InputError) as error:
        check_source(str(tmp_path))
    assert words in str(error.value) and "a folder with images/, masks/ and dataset.yaml" in str(error.value)


def test_names_that_yaml_takes_for_other_things(tmp_path):
    text = "classes:\n  no: 0\n  Yes: 1\n  3: 2\n  1.50: 3\n  null: 4\n  2020-01-01: 5\nignore: 255\n"
    (tmp_path / "dataset.yaml").write_text(text)
    labels = describe(tmp_path).labels("")
    assert [c.name for c in labels.classes] == ["no", "Yes", "3", "1.50", "null", "2020-01-01"]
    assert labels.values == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 255: 255}


def test_colours_of_painted_masks_are_those_of_pictures(tmp_path):
    (tmp_path / "dataset.yaml").write_text(
        "classes: {a: '#804080', b: ['#000000', '#010203']}\ncolours: {b: [9, 8, 7]}"
    )
    labels = describe(tmp_path).labels("")
    assert [c.colour for c in labels.classes] == [(128, 64, 128), (9, 8, 7)]


def test_classes_have_the_colours_of_their_masks_palette(tmp_path):
    """As masks of Pascal VOC and of many labelling tools have one; not where it only repeats the numbers."""
    colourful, greys = [0, 0, 0, 128, 0, 0, 0, 128, 0], [value for index in range(3) for value in [index] * 3]
    hues = ((242, 61, 61), (45, 178, 45), (145, 145, 242))
    palettes = {"voc": (colourful, ((0, 0, 0), (128, 0, 0), (0, 128, 0))), "grey": (greys, hues)}
    palettes |= {"short": (colourful[:6], hues), "twice": ([*colourful[:6], 0, 0, 0], hues)}
    for name, (palette, expected) in palettes.items():
        folder = write(tmp_path / name, ["a"], {"classes": {"ground": 0, "plane": 1, "bird": 2}}, formats=("png",))
        mask = Image.fromarray(np.asarray(Image.open(folder / "masks" / "a.png")) % (len(palette) // 3))
        mask.putpalette(palette)
        mask.save(folder / "masks" / "a.png")
        assert tuple(c.colour for c in own(folder, 0.1).labels.classes) == expected, name
    (tmp_path / "voc" / "dataset.yaml").write_text("classes: {a: 0, b: 1, c: 2}\ncolours: {b: [9, 8, 7]}")
    assert [c.colour for c in own(tmp_path / "voc", 0.1).labels.classes] == [(0, 0, 0), (9, 8, 7), (0, 128, 0)]
    (tmp_path / "voc" / "masks" / "a.png").write_bytes(b"damaged")
    assert own(tmp_path / "voc", 0.1).labels.classes[0].colour == hues[0]


@pytest.mark.parametrize("count", [2, 3, 5, 20, 21])
def test_colours_that_nobody_gave_are_far_apart(tmp_path, count):
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"classes": {f"c{i}": i for i in range(count)}}))
    colours = np.array([c.colour for c in describe(tmp_path).labels("").classes])
    between = np.abs(colours[:, None] - colours[None]).sum(-1)[~np.eye(count, dtype=bool)]
    assert between.min() > 60


def two_colours(path: Path, place: int) -> None:
    """A mask whose palette has place `place` for grey 2, and the other for grey 0."""
    mask = np.where(np.asarray(Image.open(path)) == 2, place, 1 - place).astype(np.uint8)
    image = Image.fromarray(mask)
    image.putpalette([2, 2, 2, 0, 0, 0] if place == 0 else [0, 0, 0, 2, 2, 2])
    image.save(path)


def test_masks_that_can_be_read_in_two_ways_are_settled_in_dataset_yaml(ray_cluster, tmp_path):
    """The same masks through another storage give the same data, once it is said what they mean."""
    three = {"classes": {"a": 0, "b": 1, "c": 2}}
    folder = write(tmp_path / "roads", [f"p{i}" for i in range(30)], {"classes": {"a": 0, "c": 2}})
    (folder / "dataset.yaml").write_text(yaml.safe_dump(three))
    plain = prepare(str(folder), Folder(tmp_path / "plain"), Recipe(32))
    for i, path in enumerate(sorted((folder / "masks").iterdir())):
        two_colours(path, i % 2)
    with pytest.raises(InputError) as error:
        prepare(str(folder), Folder(tmp_path / "out"), Recipe(32))
    assert f"write `masks: index` or `masks: grey` in {folder}/dataset.yaml, whichever is right." in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*out*"))
    (folder / "dataset.yaml").write_text(yaml.safe_dump(three | {"masks": "grey"}))
    settled = prepare(str(folder), Folder(tmp_path / "out"), Recipe(32))
    assert settled.data_digest == plain.data_digest and settled.counts == plain.counts
    assert {row["repair"] for row in settled.repaired} == {
        "mask: read by its grey values, not by its palette indices or stored numbers"
    }


def test_masks_that_need_different_readings_are_refused(ray_cluster, tmp_path):
    """A palette whose greys fit beside one whose places fit: each alone would be read, and one of them by chance."""
    folder = write(tmp_path / "roads", [f"p{i}" for i in range(12)], {"classes": {"a": 0, "c": 2}})
    (folder / "dataset.yaml").write_text(yaml.safe_dump({"classes": {"a": 0, "c": 2, "d": 3}}))
    for i, path in enumerate(sorted((folder / "masks").iterdir())):
        two_colours(path, 1)
        if i % 2:
            image = Image.fromarray(2 + np.asarray(Image.open(path)))
            image.putpalette([0, 0, 0] * 2 + [7, 7, 7, 9, 9, 9])
            image.save(path)
    with pytest.raises(
        InputError,
        match=r"the mask of p\d+ only the .* fit the classes, of the mask of p\d+ only the .* write `masks: grey` or",
    ):
        prepare(str(folder), Folder(tmp_path / "out"), Recipe(32))


def sparse(folder: Path, labelled: int, names) -> Path:
    """Masks of 300 x 300 with so many labelled pixels of `road`, off the places that a smaller size looks at."""
    write(folder, names, ROADS, formats=("png",), size=(300, 300))
    random = np.random.default_rng(0)
    for path in (folder / "masks").iterdir():
        mask = np.full((300, 300), 255, np.uint8)
        mask[0, random.choice(300, labelled, replace=False)] = 10
        Image.fromarray(mask).save(path)
    return folder


def test_what_vanishes_at_the_networks_size_is_told(ray_cluster, tmp_path):
    names = [f"p{i}" for i in range(24)]
    folder = write(tmp_path / "roads", names, ROADS, size=(300, 300))
    for name, value in ((names[0], 255), (names[1], 255), *((name, 0) for name in names[2:])):
        mask = np.asarray(Image.open(folder / "masks" / f"{name}.png")).copy()
        mask[mask == 20], mask[mask == 21] = 0, 0
        mask = np.full_like(mask, 255) if value == 255 else mask
        mask[0, 0] = 20 if name != names[0] else 10
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    (folder / "train.txt").write_text("\n".join(names[:12]))
    (folder / "test.txt").write_text("\n".join(names[12:]))
    manifest = prepare(str(folder), Folder(tmp_path / "out"), Recipe(32, val_fraction=1e-9))
    told = {(w["name"], w["problem"]): w["detail"] for w in manifest.warnings}
    assert told[names[0], "nothing_labelled_at_size"] == "no labelled pixel of the mask is left at 32 px"
    assert (names[1], "nothing_labelled_at_size") in told
    vanished = [w["detail"] for w in manifest.warnings if w["problem"] == "class_vanishes"]
    assert vanished == [f"at 32 px, {s} has no pixel left of classes in its masks: car" for s in ("test", "train")]
    large = prepare(str(folder), Folder(tmp_path / "large"), Recipe(304, val_fraction=1e-9))
    assert not [w for w in large.warnings if w["problem"] in ("class_vanishes", "nothing_labelled_at_size")]


def test_training_samples_without_labels_at_the_networks_size_are_refused(ray_cluster, tmp_path):
    folder = sparse(tmp_path / "roads", 6, [f"p{i}" for i in range(24)])
    with pytest.raises(InputError, match=r"of the train split has a label at 32 px: give a larger --image-size"):
        prepare(str(folder), Folder(tmp_path / "out"), Recipe(32))
    lacking = [w["detail"] for w in prepare(str(folder), Folder(tmp_path / "out"), Recipe(304)).warnings]
    assert "train lacks 2 of 3 classes: car, other" in lacking


def test_twenty_one_classes_are_trained_scored_and_shown(ray_cluster, storage, tmp_path):
    """16-bit masks, 21 classes, an ignored stripe, letterboxed: their names reach all that is left."""
    classes = {f"thing {i}": 1000 + i for i in range(21)}
    names = [f"p{i}" for i in range(60)]
    folder = write(tmp_path / "things", names, {"classes": classes, "ignore": 255})
    settings = {"epochs": 1, "num_workers": 1, "resize": "letterbox", "image_size": 48, "precision": "auto"}
    summary = train(storage, folder, run_name="things", **settings)
    assert summary["status"] == "finished" and list(summary["test"]["iou"]) == list(classes)
    rows = rows_of(next((storage / "data").glob("things-48px-*-letterbox-*")))
    tests = [np.frombuffer(row["mask"], np.uint8) for row in rows.values() if row["split"] == "test"]
    assert np.array(summary["test"]["confusion"]).sum() == sum(int((mask != 255).sum()) for mask in tests)
    assert summary["test"]["images"] == len(tests)

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(summary["mlflow_run_id"])
    assert "val/iou/thing 20" in run.data.metrics or "test/iou/thing 20" in run.data.metrics
    used = run.inputs.dataset_inputs[0]
    assert used.dataset.name == "folder/train" and json.loads(used.dataset.profile)["classes"] == list(classes)
    logged = {item.path for item in client.list_artifacts(run.info.run_id, "data")}
    assert logged == {"data/manifest.json", "data/data_report.html"}
    mlflow.set_tracking_uri(client.tracking_uri)
    package = mlflow.pyfunc.load_model(summary["model_uri"])
    mlflow.set_tracking_uri(None)
    assert package.metadata.metadata["classes"] == list(classes)
    answer = package.predict(np.zeros((2, 36, 48, 3), np.uint8))
    assert answer.shape == (2, 36, 48) and answer.max() < 21
    state = read_json(storage / "things" / summary["best_checkpoint"] / "state.json")
    assert [name for name, _ in state["classes"]] == list(classes)
    fast = {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    fast = fast and os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX2"
    assert state["equality"]["precision"] == ("mixed_bfloat16" if fast else "float32") == run.data.params["precision"]
