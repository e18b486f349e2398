"""Scores that nothing can be measured of: a class, or a whole split without a label, from the training to the pages."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pyarrow as pa
import pytest
import yaml
from pages import Page, pets, write_prepared
from PIL import Image

from tests.conftest import listening, read_json, tiny_settings, train, words_of
from unet.config import EvaluateSettings, TuneSettings, unflat
from unet.data.manifest import SPLITS
from unet.data.order import CHUNK
from unet.data.shards import Prepared
from unet.errors import InputError
from unet.evaluation import outcome, tables
from unet.evaluation.counts import CELLS, cells_of
from unet.evaluation.records import with_scores
from unet.evaluation.run import evaluate
from unet.evaluation.summary import compare, summary
from unet.models.trained import best_checkpoint
from unet.recipe.loss import LossSettings
from unet.runs.run import Run
from unet.storage import Folder
from unet.supervise import driver, results
from unet.supervise.preflight import check_samples, open_run
from unet.terminal import Display
from unet.tracking.registry import Version
from unet.tuning.runner import run_sweep
from unet.tuning.sweep import open_sweep


def write_unlabelled(folder: Path) -> Path:
    """Photos of 48 px: labelled ones for training, val whose few labels vanish at 32 px, test without any."""
    random = np.random.default_rng(3)
    splits = {"train": 16, "val": 5, "test": 2}
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for split, count in splits.items():
        names = [f"{split}-{i}" for i in range(count)]
        (folder / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            mask = np.full((48, 48), 255, np.uint8)
            if split == "train":
                mask = np.kron(random.integers(0, 2, (4, 4)), np.ones((12, 12))).astype(np.uint8)
            elif split == "val":  # nearest from 48 to 32 px passes over every third row
                mask[1::3, 1][:6] = 0
            photo = np.clip(mask[..., None] * 200 + random.integers(0, 50, (48, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(photo).save(folder / "images" / f"{name}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    classes = {"left": 0, "right": 1, "never": 2}
    (folder / "dataset.yaml").write_text(yaml.safe_dump({"classes": classes, "ignore": 255}, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def unlabelled(ray_cluster, tmp_path_factory) -> Path:
    return write_unlabelled(tmp_path_factory.mktemp("unlabelled") / "halves")


WEIGHED = {"loss": "cross_entropy+0.5*jaccard", "class_weights": "auto"}


@pytest.fixture(scope="module")
def unscored(unlabelled, storage) -> tuple[dict, str]:
    """A run of which no epoch can be scored: its summary, and what it said. Its patience is less than its epochs."""
    settings = tiny_settings(storage, unlabelled, run_name="unscored", epochs=3, patience=1, num_workers=1, **WEIGHED)
    display = listening()
    return driver.train(open_run(settings), display), words_of(display)


def test_scores_of_a_few_photos_are_said_to_mean_little():
    words = driver._few({"train": 5, "val": 1, "test": 0})
    assert words.startswith("Few photos are scored (val 1, test 0): ") and "val and test 10 or more" in words
    assert driver._few({"train": 80, "val": 10, "test": 10}) is None


def test_a_run_that_nothing_scores_means_its_last_checkpoint_and_says_so(unscored, storage):
    found, words = unscored
    history = [json.loads(line) for line in (storage / "unscored" / "metrics.jsonl").read_text().splitlines()]
    assert (found["status"], found["restarts"]) == ("finished", 0) and [line["epoch"] for line in history] == [1, 2, 3]
    assert not any("val" in key or "best" in key for line in history for key in line)
    last = f"step_{history[-1]['step']:08d}"
    assert (found["best_epoch"], found["best_checkpoint"]) == (None, f"checkpoints/{last}")
    assert best_checkpoint(Folder(storage / "unscored")) == last
    for split, images in (("val", 5), ("test", 0)):
        assert (found[split]["mean_iou"], found[split]["loss"], found[split]["images"]) == (None, None, images)
        assert set(found[split]["iou"].values()) == {None}
    assert words.count("No pixel of val has a class at 32 px: no epoch is scored") == 1, words
    display = listening()
    results.show(Run.load("unscored", tiny_settings(storage, storage, run_name="unscored")), display, {})
    assert re.search(r"last +no epoch has a score, ", words_of(display))
    assert found["delivered"]
    (data,) = (storage / "data").glob("halves-32px-*")
    told = [row for row in read_json(data / "manifest.json")["warnings"] if row["problem"] == "split_unlabelled"]
    assert [row["detail"] for row in told] == ["no pixel of val has a label at 32 px, so it has no scores"]
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(found["mlflow_run_id"])
    assert run.data.tags["best_checkpoint"] == f"checkpoints/{last}" and "train/loss" in run.data.metrics
    assert client.list_artifacts(run.info.run_id, "best_checkpoint")
    mlflow.set_tracking_uri(client.tracking_uri)
    assert mlflow.pyfunc.load_model(found["model_uri"]).metadata.metadata["checkpoint"] == last
    mlflow.set_tracking_uri(None)


def test_its_command_given_again_scores_nothing_again(unscored, unlabelled, storage):
    found, _ = unscored
    again = train(storage, unlabelled, run_name="unscored", epochs=3, patience=1, num_workers=1, **WEIGHED)
    assert again == found


def test_class_weights_become_numbers_that_the_run_keeps(unscored, unlabelled, storage):
    """`never` is as rare as the rarer of the others."""
    saved = yaml.safe_load((storage / "unscored" / "config.yaml").read_text())["class_weights"]
    left, right, never = map(float, saved.split(","))
    assert never == max(left, right) and left != right
    (data,) = (storage / "data").glob("halves-32px-*")
    pixels = Prepared(Folder(data)).class_pixels("train", 16)
    assert (left / right) ** 2 == pytest.approx(pixels[1] / pixels[0], rel=1e-2)
    for other in ({}, {"class_weights": "1,2,3"}):
        with pytest.raises(InputError, match=f"--class-weights .was {saved}, is {other.get('class_weights')}"):
            values = {"run_name": "unscored", "epochs": 3, "num_workers": 1, "patience": 1}
            open_run(tiny_settings(storage, unlabelled, **values | WEIGHED | {"class_weights": None} | other))


def test_class_weights_are_counted_over_the_samples_that_are_used(tmp_path):
    rows = [
        row | {"split": "train", "mask": np.full((32, 32), i // CHUNK, np.uint8)} for i, row in enumerate(pets(300))
    ]
    prepared = write_prepared(tmp_path / "two", rows)
    for samples, second in ((200, 0), (CHUNK, 0), (CHUNK + 3, 3), (300, 44)):
        first = min(samples, CHUNK)
        assert prepared.class_pixels("train", samples).tolist() == [first * 32**2, second * 32**2, 0]


def test_an_evaluation_of_a_split_without_a_label_has_files_page_and_tables(unscored, storage):
    settings = unflat(EvaluateSettings, {"model": "unscored", "split": "val", "storage_path": str(storage)})
    (done,) = evaluate(settings, Display(quiet=True))
    outcome.write(done, Display(quiet=True))
    display = listening()
    tables.show(display.console, "unscored", done.metrics)
    outcome.track(done, settings, display)
    assert ["mean", "–", "–", "–", "–"] in [line.split() for line in words_of(display).splitlines()]
    assert "MLflow" not in words_of(display)
    metrics, rows = read_json(Path(done.folder.path) / "metrics.json"), done.records.to_pylist()
    assert metrics["mean_iou"] is None and metrics["images"] == len(rows) == 5
    assert {row["doubt"] for row in rows} == {row["mean_iou"] for row in rows} == {None}
    page = Page((Path(done.folder.path) / "report.html").read_text())
    assert "never – – –" in page.words("scores") and "mean IoU – – –" in page.words("scores")
    assert "none: no pixel of the split has a class" in page.words("summary")
    assert not {"gallery", "doubt", "images"} & set(page.text)


def test_a_sweep_that_nothing_could_choose_for_is_refused_before_it_starts(unlabelled, storage):
    values = {"storage_path": str(storage), "data": str(unlabelled), "image_size": 32, "run_name": "aimless"}
    values["optimizer"] = "adamw"  # the default space draws its weight decay
    with pytest.raises(InputError, match=r"No pixel of val in .* has a class at 32 px, so no trial would have a score"):
        run_sweep(open_sweep(unflat(TuneSettings, values)), Display(quiet=True))
    assert not (storage / "aimless").exists()


def prepared_of(folder: Path, **masks: int):
    """A sample a split, its mask all of one value."""
    rows = pets(3)
    for row, (split, value) in zip(rows, masks.items(), strict=True):
        row |= {"split": split, "mask": np.full((32, 32), value, np.uint8)}
    return write_prepared(folder, rows)


def test_a_split_is_labelled_where_any_of_its_pixels_has_a_class(tmp_path):
    prepared = prepared_of(tmp_path / "one", train=255, val=2, test=255)
    assert [prepared.is_labelled(split) for split in SPLITS] == [False, True, False]
    with pytest.raises(InputError, match=r"No pixel of train in .* there is nothing to learn from"):
        check_samples(tiny_settings(tmp_path, tmp_path), prepared)
    rows = [row | {"split": "val", "mask": np.full((32, 32), 255, np.uint8)} for row in pets(CHUNK + 2)]
    assert not write_prepared(tmp_path / "none", rows).is_labelled("val")
    rows[-1]["mask"] = rows[-1]["mask"].copy()
    rows[-1]["mask"][31, 31] = 0  # in the last chunk only
    prepared = write_prepared(tmp_path / "last", rows)
    assert prepared.is_labelled("val") and not prepared.is_labelled("test")


def records_of(confusions: np.ndarray) -> pa.Table:
    counts = pa.array([cells_of(confusion.reshape(-1)) for confusion in confusions], CELLS)
    columns = {"confusion": counts, "confusion_band": counts, "confusion_own": pa.nulls(len(counts), counts.type)}
    groups = pa.array(["seen", "unseen"] * (len(counts) // 2))
    return pa.table(
        columns | {"loss_sums": [[float(c.sum())] * 2 for c in confusions], "breed": groups, "species": groups}
    )


@pytest.mark.parametrize("labelled", ["some", "none"])
def test_classes_images_groups_and_splits_without_a_score_are_null_everywhere(labelled):
    """Class `c` is nowhere; every second image has no label, or none has one."""
    confusions = np.zeros((24, 3, 3), np.int64)
    if labelled == "some":
        confusions[::2, :2, :2] = [[6, 1], [1, 4]]
    found = summary(records_of(confusions), ("a", "b", "c"), 3, 100, LossSettings())
    some = labelled == "some"
    for scores in (found, found["per_image"], found["band"], found["by_breed"]["seen"]):
        assert scores["iou"]["c"] is scores["dice"]["c"] is None
        assert scores["iou"]["a"] == (0.75 if some else None)
        assert scores["mean_iou"] == (pytest.approx((6 / 8 + 4 / 6) / 2) if some else None)
    assert found["by_breed"]["unseen"]["mean_iou"] is None and (found["loss"] is None) != some
    spans = found["intervals"]
    assert spans["iou"]["c"] is None and (spans["mean_iou"] is None) != some
    json.dumps(found, allow_nan=False)
    images = with_scores(records_of(confusions), ("a", "b", "c")).to_pylist()
    assert [image["iou_a"] for image in images] == [0.75 if some else None, None] * 12
    assert {image["dice_c"] for image in images} == {images[1]["accuracy"]} == {None}
    display = listening()
    tables.show(display.console, "x", found)
    lines = [line.split() for line in words_of(display).splitlines()]
    rows = [line[0] for line in lines if line and line[0] in ("seen", "unseen")]
    assert rows[:2] == ["seen", "unseen"] and ["c", "–", "–", "–", "–"] in lines
    alone = listening()
    tables.show(alone.console, "x", found | {"by_breed": {}, "by_species": {"seen": found["by_species"]["seen"]}})
    assert "By species" not in words_of(alone) and "By species" in words_of(display)
    pairs = compare(["m", "n"], [records_of(confusions)] * 2, ("a", "b", "c"), 100)["pairs"]
    tables.show_comparison(display.console, {"pairs": pairs})
    assert pairs[0]["network_size"]["iou"]["c"] == {"value": None, "interval": None}
    assert ("No significant difference" if some else "there is nothing to measure") in pairs[0]["verdict"]


@pytest.mark.parametrize("loss_sum", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_null(loss_sum):
    records = records_of(np.ones((2, 3, 3), np.int64))
    records = records.set_column(
        records.column_names.index("loss_sums"), "loss_sums", pa.array([[1.0, 1.0], [loss_sum, 1.0]])
    )
    assert summary(records, ("a", "b", "c"), 3, 0, LossSettings())["loss"] is None


@pytest.mark.parametrize("score", ["nan", "inf", "good", ""])
def test_a_version_whose_score_is_no_number_has_none(score):
    found = Version.of(SimpleNamespace(name="pets", version=1, tags={"val/mean_iou": score, "data_digest": "data"}))
    assert found.val_mean_iou is None
