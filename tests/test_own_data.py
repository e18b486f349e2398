"""Own photos and masks: what `dataset.yaml` and the folder say is what is trained, scored and shown."""

import json
import os
import unicodedata
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.conftest import read_json, train
from unet.data.pieces import Recipe
from unet.data.prepare import prepare
from unet.data.shards import Prepared
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


def test_lists_that_do_not_fit_together_are_refused(ray_cluster, tmp_path):
    folder = write(tmp_path / "roads", ["a", "b"], ROADS)
    (folder / "train.txt").write_text("a")
    (folder / "val.txt").write_text("b")
    with pytest.raises(InputError, match=r"holds train.txt, val.txt: give trainval.txt and test.txt"):
        prepare(str(folder), Folder(tmp_path / "out"), Recipe(32))


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
        ({"classes": {"road": 1, "car": 2}, "colours": {"cat": [1, 2, 3]}}, "cat is not among the classes"),
        ({"clases": {"road": 1, "car": 2}}, "must hold `classes:`"),
        ({"classes": {"road": 1, "car": 2}, "ignroe": 3}, "ignroe"),
    ],
)
def test_description_that_does_not_fit_is_one_sentence(tmp_path, description, words):
    from unet.data.sources.find import check_source

    folder = write(tmp_path / "roads", ["a", "b"], ROADS)
    (folder / "dataset.yaml").unlink() if description is None else (folder / "dataset.yaml").write_text(
        yaml.safe_dump(description)
    )
    with pytest.raises(InputError) as error:
        check_source(str(folder))
    assert words in str(error.value) and "dataset.yaml" in str(error.value) and "\n" not in str(error.value)


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
    assert "val_iou_thing 20" in run.data.metrics or "test_iou_thing 20" in run.data.metrics
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "folder" and json.loads(used.dataset.profile)["classes"] == list(classes)
    logged = {item.path for item in client.list_artifacts(run.info.run_id, "data")}
    assert logged == {"data/manifest.json", "data/data_report.html"}
    package = mlflow.pyfunc.load_model(f"{run.info.artifact_uri}/model")
    assert package.metadata.metadata["classes"] == list(classes)
    answer = package.predict(np.zeros((2, 36, 48, 3), np.uint8))
    assert answer.shape == (2, 36, 48) and answer.max() < 21
    state = read_json(storage / "things" / summary["best_checkpoint"] / "state.json")
    assert [name for name, _ in state["classes"]] == list(classes)
    fast = {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    fast = fast and os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX2"
    assert state["equality"]["precision"] == ("mixed_bfloat16" if fast else "float32") == run.data.params["precision"]
