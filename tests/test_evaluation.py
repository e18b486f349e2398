"""Scores of every image against sets of pixels counted here; intervals against the truth that they speak of."""

import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import tensorflow as tf
from conftest import ROOT, command, read_json
from PIL import Image
from rich.console import Console
from test_run import oracle_network, wait_for

from unet import metrics
from unet.borders import near_border
from unet.cluster.placement import Node, Placement
from unet.cluster.planner import plan_scoring
from unet.config import EvaluateSettings, unflat
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.shards import Prepared
from unet.data.streaming import DATA_CPUS
from unet.errors import InputError, RunFailed
from unet.evaluation import intervals, outcome, output, scorer, tables
from unet.evaluation.counts import CELLS, Counts, cells_of
from unet.evaluation.records import record_schema
from unet.evaluation.run import Evaluation, evaluate, find_models
from unet.evaluation.scorer import check_names, score_split
from unet.evaluation.summary import compare, summary
from unet.models.trained import TrainedModel
from unet.recipe.loss import LossSettings
from unet.recipe.network import ModelSettings
from unet.storage import Folder
from unet.terminal import Display

NAMES, BAND = ("pet", "background", "outline"), 2


def counted(truth, predicted, where=True, classes=3) -> list[int]:
    """Pixels by (true, predicted) class, one set after the other."""
    where = where & (truth != 255)
    return [int(np.sum((truth == t) & (predicted == p) & where)) for t in range(classes) for p in range(classes)]


def in_band(mask, width):
    """Whether another class stands in the square around each pixel, looked for one by one."""
    found = np.zeros(mask.shape, bool)
    for y, x in np.argwhere(mask != 255):
        square = mask[max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
        found[y, x] = np.any((square != mask[y, x]) & (square != 255))
    return found


def oracle(folder: Path, network) -> dict[str, dict]:
    """By name: truth and prediction at both sizes, read from the shards and answered by the network of another test."""
    found = {}
    for file in sorted(folder.glob("test-*.parquet")):
        for row in pq.read_table(file).to_pylist():
            image = np.frombuffer(row["image"], np.uint8).reshape(32, 32, 3)
            mask = np.frombuffer(row["mask"], np.uint8).reshape(32, 32)
            own = np.asarray(Image.open(io.BytesIO(row["mask_original"])))
            probabilities = network.predict(image[None] / np.float32(255), verbose=0)[0]
            rows, columns = (np.flatnonzero((mask != 255).any(axis)) for axis in (1, 0))
            inside = probabilities[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            enlarged = tf.image.resize(inside, own.shape).numpy().argmax(-1)
            valid, labels = mask != 255, np.where(mask == 255, 0, mask)[..., None].astype(int)
            true = np.take_along_axis(probabilities, labels, -1)[..., 0]
            found[row["name"]] = {
                "truth": mask,
                "predicted": probabilities.argmax(-1),
                "own": own,
                "enlarged": enlarged,
                "breed": row["breed"],
                "loss_sums": [-np.log(true[valid]).sum(), valid.sum()],
                "doubt": (probabilities.max(-1) - true)[valid].mean(),
            }
    return found


def whole(cells: list[dict]) -> list[int]:
    """The counts of all cells, of three classes."""
    found = [0] * 9
    for cell in cells:
        found[cell["cell"]] += cell["pixels"]
    return found


def check_records(records: pa.Table, expected: dict[str, dict], letterbox: bool) -> None:
    assert records.schema == record_schema() and len(records) == len(expected) == 21
    assert records["name"].to_pylist() == sorted(expected)
    for row in records.to_pylist():
        image = expected[row["name"]]
        truth, predicted, own = image["truth"], image["predicted"], image["own"]
        assert whole(row["confusion"]) == counted(truth, predicted)
        assert whole(row["confusion_band"]) == counted(truth, predicted, in_band(truth, BAND))
        assert whole(row["confusion_own"]) == counted(own, image["enlarged"])
        assert row["loss_sums"] == pytest.approx(image["loss_sums"], rel=1e-4)
        assert row["doubt"] == pytest.approx(image["doubt"], abs=1e-5)
        shown = np.asarray(Image.open(io.BytesIO(row["predicted"])))
        assert np.array_equal(shown, np.where(truth == 255, 255, predicted) if letterbox else predicted)
        assert (row["split"], row["height"], row["width"]) == ("test", *own.shape)
        assert (row["breed"], row["species"]) in (("Abyssinian", "cat"), ("beagle", "dog"))
        assert row["breed"] == image["breed"]


def merged(found: list[dict], truth: str, predicted: str, ignored: bool) -> np.ndarray:
    """Pet against background over all images, the outline being pet; where `ignored`, not the true one."""
    total = np.zeros(4, int)
    for image in found:
        is_pet = [np.isin(image[key], (0, 2)) for key in (truth, predicted)]
        where = (image[truth] != 2) if ignored else np.True_
        total += counted((~is_pet[0]).astype(int), (~is_pet[1]).astype(int), where & (image[truth] != 255), 2)
    return total.reshape(2, 2)


@pytest.fixture(scope="module")
def model(trained, storage):
    return TrainedModel.find("trained", Folder(storage))


@pytest.fixture(scope="module")
def network(trained):
    folder, found = trained
    return oracle_network(folder, found["best_checkpoint"].split("/")[1])


@pytest.fixture(scope="module")
def stretched(ray_cluster, archives, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stretched") / "data"
    prepare(str(archives), Folder(folder), Recipe(32, "stretch", original_masks=True))
    return Prepared(Folder(folder))


@pytest.fixture(scope="module")
def records(stretched, model):
    """Of one process and whole batches."""
    (table,) = score_split([model], stretched, "test", Placement(1, 1.0, 1, False), BAND, 16, lambda *told: None)
    return table


def test_records_are_those_of_an_oracle_whatever_the_workers_and_the_batch(stretched, model, network, records):
    expected, told = oracle(Path(stretched.folder.path), network), []
    check_records(records, expected, letterbox=False)
    two = Placement(2, 0.75, 1, False)
    (table,) = score_split([model], stretched, "test", two, BAND, 5, lambda *step: told.append(step[:2]))
    assert table.equals(records)  # not only the counts: the same bits
    assert told[0] == (0, 21) and told[-1] == (21, 21)
    found = summary(records, NAMES, BAND, 200, LossSettings())
    for view, truth, predicted in ((found, "truth", "predicted"), (found["own_size"], "own", "enlarged")):
        images = list(expected.values())
        whole = np.sum([counted(image[truth], image[predicted]) for image in images], 0)
        assert np.array_equal(view["confusion"], whole.reshape(3, 3)) and view["images"] == 21
        for way, ignored in (("outline_as_pet", False), ("outline_ignored", True)):
            assert np.array_equal(view["binary"][way]["confusion"], merged(images, truth, predicted, ignored))
    band = np.sum([counted(i["truth"], i["predicted"], in_band(i["truth"], BAND)) for i in expected.values()], 0)
    assert np.array_equal(found["band"]["confusion"], band.reshape(3, 3)) and found["band"]["width"] == BAND
    assert {name: group["images"] for name, group in found["by_species"].items()} == {
        name: sum(image["breed"] == breed for image in expected.values())
        for name, breed in (("cat", "Abyssinian"), ("dog", "beagle"))
    }


def score_here(model, prepared, batch, split="test"):
    """The records by a scorer in this process, a table a batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "start_tensorflow", lambda threads, use_gpu: None)
        what = scorer.Split.of(prepared, split, BAND)
        score = scorer.Scorer(what, [ray.put(replace(model, run=None))])
        return [score(table) for table in scorer._read(pa.table({"chunk": [0]}), what, batch)]


def test_a_letterbox_is_scored_without_its_padding(ray_cluster, archives, model, network, tmp_path):
    prepare(str(archives), Folder(tmp_path / "data"), Recipe(32, "letterbox", original_masks=True))
    prepared = Prepared(Folder(tmp_path / "data"))
    table = pa.concat_tables(score_here(replace(model, resize="letterbox"), prepared, 7))
    table = table.drop_columns(["model"]).sort_by("name")
    check_records(table, oracle(tmp_path / "data", network), letterbox=True)


def test_what_a_task_says_of_damaged_shards_is_a_sentence():
    raised = ray.exceptions.RayTaskError(
        "_read", "a\nlong\ntraceback", InputError("a shard is damaged: prepare it again")
    )
    explained = scorer._explained(raised.as_instanceof_cause())
    assert type(explained) is InputError and str(explained) == "a shard is damaged: prepare it again"
    explained = scorer._explained(ray.exceptions.RayTaskError("_read", "a\ntraceback", ValueError("no\nnumber")))
    assert type(explained) is RunFailed and str(explained) == "Scoring failed: no"


def test_an_image_that_does_not_come_back_is_missed(stretched, model, monkeypatch):
    tables = score_here(model, stretched, 8)
    assert [len(table) for table in tables] == [8, 8, 5]
    scoring = (stretched, "test", Placement(1, 1.0, 1, False), BAND, 8, lambda *told: None)
    for given, words in (
        (tables, None),
        (tables[1:], "13 images were scored, there are 21: .* was not scored, and 7 more differ"),
        ([*tables, tables[0].slice(0, 1)], "22 images were scored, there are 21: .* was scored too often.$"),
    ):
        dataset = SimpleNamespace(iter_batches=lambda given=given, **how: iter(given))
        monkeypatch.setattr(scorer, "_dataset", lambda *how, dataset=dataset: dataset)
        if words is None:
            assert len(score_split([model], *scoring)[0]) == 21
        else:
            with pytest.raises(RuntimeError, match=words):
                score_split([model], *scoring)
    with pytest.raises(RuntimeError, match="2 images were scored, there are 2: b was not scored, and 1 more"):
        check_names(["a", "c"], ["a", "b"])


@pytest.mark.versions
def test_the_job_writes_and_logs_what_the_run_said(trained, storage, packed, model):
    """Two models that are one, by two names: the same scores as in training, and no difference."""
    import mlflow

    folder, found = trained
    uri = found["model_uri"]
    flags = ["--data", packed, "--storage-path", storage, "--bootstrap", 1000]
    assert command("evaluate", "--model", f"trained,{uri}", *flags) == 0
    results = folder / "evaluations" / "test"
    told = read_json(results / "metrics.json")
    counts, trained_counts = np.array(told["confusion"]), np.array(found["test"]["confusion"])
    assert np.array_equal(counts.sum(1), trained_counts.sum(1)) and told["images"] == found["test"]["images"] == 21
    # In batches of another size, which on some processors changes last bits: at most two near ties of 21,000 pixels.
    assert np.abs(counts - trained_counts).sum() <= 4
    assert told["loss"] == pytest.approx(found["test"]["loss"], rel=1e-5)
    assert told["mean_iou"] == pytest.approx(found["test"]["mean_iou"], abs=1e-3) and "own_size" not in told
    (pair,) = told["comparison"]["pairs"]
    assert (
        pair["network_size"]["mean_iou"] == {"value": 0.0, "interval": [0.0, 0.0]}
        and "No significant difference between" in pair["verdict"]
    )
    rows = pq.read_table(results / "per_image.parquet").to_pylist()
    for row in rows:
        scores = metrics.scores(np.reshape(row["confusion"], (3, 3)), NAMES)
        assert (
            row["mean_iou"] == pytest.approx(scores["mean_iou"], abs=1e-12) and row["iou_pet"] == scores["iou"]["pet"]
        )
    assert np.array_equal(np.sum([row["confusion"] for row in rows], 0), np.ravel(told["confusion"]))
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(found["mlflow_run_id"])
    assert run.data.metrics["eval/test/mean_iou"] == told["mean_iou"]
    assert [run.data.metrics[f"eval/test/{end}/mean_iou"] for end in ("low", "high")] == told["intervals"]["mean_iou"]
    assert len(client.get_metric_history(run.info.run_id, "eval/test/mean_iou")) == 1
    logged = {item.path for item in client.list_artifacts(run.info.run_id, "evaluation/test")}
    assert {f"evaluation/test/{name}" for name in ("metrics.json", "per_image.parquet")} <= logged
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("name", "digest", "expected"),
    [
        ("runs/a", "own", "runs/a/evaluations/test"),
        ("runs/a", "01234567other", "runs/a/evaluations/test-01234567"),
        ("not the best", "own", "runs/a/evaluations/test-step_00000001"),
        ("models:/pets@champion", "own", "evaluations/models-pets@champion/test"),
    ],
)
def test_each_evaluation_has_a_place_of_its_own(model, monkeypatch, tmp_path, name, digest, expected):
    run = None if ":" in name else Folder(tmp_path / "runs" / "a")
    monkeypatch.setattr(output, "best_checkpoint", lambda run: "step_00000001" if name == "runs/a" else "another")
    which = replace(model, name=name, run=run, run_name="a", checkpoint="step_00000001", data_digest="own")
    part = output.part_of(which, "test", digest)
    settings = unflat(EvaluateSettings, {"storage_path": str(tmp_path)})
    assert output.folder_of(which, name, part, settings, alone=True).path == str(tmp_path / expected)
    given = unflat(EvaluateSettings, {"storage_path": str(tmp_path), "output": str(tmp_path / "out")})
    assert output.folder_of(which, name, part, given, alone=True).path == str(tmp_path / "out")
    assert output.folder_of(which, name, part, given, alone=False).path.startswith(str(tmp_path / "out") + "/")


def test_models_of_one_name_keep_places_apart(model, tmp_path):
    names = ["/a/trained/step_1", "/b/trained/step_1", "x-y", "x/y", "models:/x@y"]
    models = [replace(model, name=name, run_name="x" if name == "x/y" else "trained", checkpoint="y") for name in names]
    labels = output.labels_of(models)
    assert labels == ["trained/y", "trained/y-2", "x-y", "x/y-2", "models:/x@y"]
    given = unflat(EvaluateSettings, {"output": str(tmp_path)})
    places = [output.folder_of(m, label, "test", given, alone=False) for m, label in zip(models, labels, strict=True)]
    assert len({folder.path.lower() for folder in places}) == 5


def test_an_output_that_cannot_be_written_is_refused_before_scoring(trained, storage, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("unet.evaluation.run.score_split", lambda *given: pytest.fail("it was scored"))
    (tmp_path / "file").write_text("")
    values = {"model": "trained", "data": str(packed), "storage_path": str(storage), "output": str(tmp_path / "file/x")}
    with pytest.raises(InputError, match=r"Cannot write to .*file/x: give another --output"):
        evaluate(unflat(EvaluateSettings, values), Display(quiet=True))


def test_a_model_that_is_not_there_is_refused_before_ray_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("unet.cluster.session.ray_session", lambda *given: pytest.fail("Ray was started"))
    for flags, words in (
        (["--model", "typo"], "'typo' is neither a run"),
        ([], "Say which model"),
        (["--model", "models:/pets/1", "--data", tmp_path / "no"], "There is no data at"),
    ):
        assert command("evaluate", *flags, "--storage-path", tmp_path) == 2
        assert words in capsys.readouterr().err


def test_without_data_a_model_is_scored_on_those_of_its_run(trained, model, tmp_path):
    _, found = trained
    assert Path(output.data_of([model])).samefile(found["prepared"])
    copy = tmp_path / "copy"
    copy.mkdir()
    summary_of = found | {"prepared": str(tmp_path / "gone")}
    (copy / "summary.json").write_text(json.dumps(summary_of))
    moved = replace(model, run=Folder(copy))
    (copy / "config.yaml").write_text("data: synthetic:20\n")
    assert output.data_of([moved]) == "synthetic:20"
    (copy / "config.yaml").write_text(f"data: {tmp_path}/nowhere\n")
    for models, words in (
        ([moved], "nowhere, are gone: give --data"),
        ([replace(model, run=None)], "does not say where its training data are: give --data"),
        ([model, replace(model, name="other", data_digest="other")], "trained on different data: give --data"),
    ):
        with pytest.raises(InputError, match=words):
            output.data_of(models)


def test_names_of_metrics_do_not_collide():
    names = ["pet", "pet_low", "pet_high", "pet_low_low"]
    vector = [n / 100 for n in range(11)]
    spans = [[value - 1, value + 1] for value in vector]
    scores = intervals.named(vector, names) | {"intervals": intervals.named(spans, names)}
    sent = outcome.tracked_metrics(SimpleNamespace(part="test", metrics=scores))
    for kind, first in (("iou", 0), ("dice", 4)):
        for index, name in enumerate(names):
            assert sent[f"eval/test/{kind}/{name}"] == vector[first + index]
    assert sent["eval/test/low/mean_iou"] == vector[8] - 1 and sent["eval/test/low/iou/pet_high"] == vector[2] - 1
    assert len(sent) == 11 * 3


def test_a_version_of_an_earlier_checkpoint_is_not_logged(trained, storage, model, tmp_path):
    import mlflow

    _, found = trained
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    settings = unflat(EvaluateSettings, {"storage_path": str(storage)})
    for name in outcome.FILES:
        (tmp_path / name).write_text("")
    metrics = intervals.named([0.123] * 9, NAMES)
    for checkpoint, name, logged in (
        ("step_00000001", "models:/pets/1", False),
        (model.checkpoint, "models:/pets/2", True),
        ("step_00000001", found["model_uri"], True),
    ):
        which = replace(model, name=name, run=None, checkpoint=checkpoint)
        part = f"val-{len(name)}-{logged}"
        done = Evaluation(which, name, None, "val", part, Folder(tmp_path), metrics, None)
        display = Display(Console(file=io.StringIO(), width=300))
        outcome.track(done, settings, display)
        has = client.get_run(found["mlflow_run_id"]).data.metrics
        assert (f"eval/{part}/mean_iou" in has) == logged
        assert ("Not logged to MLflow" in display.console.file.getvalue()) != logged


def test_models_that_do_not_compare_are_refused(model, storage, monkeypatch):
    others = {
        "trained": model,
        "again": replace(model, name="again"),
        "other": replace(model, name="other", checkpoint="b", classes=model.classes[:2]),
        "large": replace(model, name="large", checkpoint="c", image_size=64),
    }
    monkeypatch.setattr(TrainedModel, "find", lambda name, *where: others[name])
    for names, words in (
        ("trained,trained", "names trained twice"),
        ("trained,again", "one checkpoint twice: trained and again"),
        ("trained,other", "pet, background, outline, other has pet, background: their scores cannot be compared"),
        ("trained,large", r"at 32 px \(stretch\), large at 64 px"),
    ):
        with pytest.raises(InputError, match=words):
            find_models(names, Folder(storage), None)


def test_the_band_reaches_its_width_to_either_side_of_a_border():
    masks = np.random.default_rng(0).choice([0, 1, 254, 255], (3, 5, 6)).astype(np.uint8)
    masks = masks.repeat(4, 1).repeat(3, 2)
    for width in (1, 3, 64):
        assert np.array_equal(near_border(masks, width), [in_band(mask, width) for mask in masks])
    halves = np.zeros((1, 8, 10), np.uint8)
    halves[:, :, 5:] = 1
    assert near_border(halves, 2)[0, 0].nonzero()[0].tolist() == [3, 4, 5, 6]


def population(images: int) -> np.ndarray:
    """Confusion matrices of images that differ much: some are easy, and of some the pet is not found at all."""
    rng = np.random.default_rng(0)
    share, error = rng.dirichlet((3, 6, 1.2), images), rng.beta(1.2, 6, (images, 3)) + 0.005
    error[rng.random(images) < 0.03, 0] = 1
    found = np.zeros((images, 3, 3))
    for true in range(3):
        found[:, true] = (share[:, true] * error[:, true] / 2)[:, None]
        found[:, true, true] = share[:, true] * (1 - error[:, true])
    return np.round(found * 16384).astype(np.int64)


def sums_of(confusions: np.ndarray) -> np.ndarray:
    return Counts.of_matrices(confusions).sums()


def counted_twice(confusions: np.ndarray) -> pa.Table:
    """Records of images with these counts, near borders too, and without masks of the photos' own size."""
    cells = pa.array([cells_of(confusion.reshape(-1)) for confusion in confusions], CELLS)
    columns = dict.fromkeys(("confusion", "confusion_band"), cells)
    return pa.table(columns | {"confusion_own": pa.nulls(len(cells), CELLS)})


def test_intervals_hold_the_truth_in_95_of_100_samples(monkeypatch):
    sums = sums_of(population(20_000))
    truth, rng = intervals.score_vector(sums.sum(0)), np.random.default_rng(1)
    held = np.zeros(len(truth))
    for seed in range(2000):
        monkeypatch.setattr(intervals, "SEED", seed)  # else all samples would share the luck of one set of resamples
        drawn = sums[rng.integers(0, len(sums), 150)]
        low, high = np.transpose(intervals.intervals({"": drawn}, 500)[""])
        held += (low <= truth) & (truth <= high)
    shares = intervals.named(held / 2000, NAMES)
    assert 0.93 <= shares["mean_iou"] <= 0.97, shares
    assert min(shares["iou"].values()) >= 0.92 and max(shares["iou"].values()) <= 0.98, shares


@pytest.mark.parametrize(("images", "t"), [(10, 2.262157), (20, 2.093024), (50, 2.009575), (200, 1.971957)])
def test_the_tail_is_that_of_students_t(images, t):
    """97.5 % quantiles from a table, for n - 1 degrees of freedom; a sample's spread is too narrow by n / (n - 1)."""
    expected = statistics.NormalDist().cdf(-t * math.sqrt(images / (images - 1)))
    assert intervals.tail_of(images) == pytest.approx(expected, rel=0.003)


def test_intervals_of_few_images_are_wide_enough(monkeypatch):
    """Where plain percentiles hold the truth in about 90 of 100: ten images."""
    sums = sums_of(population(20_000))
    truth, rng, held = intervals.score_vector(sums.sum(0)), np.random.default_rng(2), 0
    for seed in range(500):
        monkeypatch.setattr(intervals, "SEED", seed)
        drawn = sums[rng.integers(0, len(sums), 10)]
        low, high = intervals.named(intervals.intervals({"": drawn}, 500)[""], NAMES)["mean_iou"]
        held += low <= intervals.named(truth, NAMES)["mean_iou"] <= high
    assert 0.92 <= held / 500 <= 0.98
    assert intervals.intervals({"": sums[:9]}, 500)[""] == [None] * 9
    assert intervals.intervals({"": sums[:50]}, 0)[""] == [None] * 9


def test_a_pair_is_told_apart_where_two_intervals_overlap():
    """Of two models that find the same images hard the difference is known far better than either score."""
    before = population(150)
    after = before.copy()
    after[:, 0, 0] += before[:, 0, 1] // 10  # a tenth of what was missed of every pet is found
    after[:, 0, 1] -= before[:, 0, 1] // 10
    tables = [counted_twice(confusions) for confusions in (before, after)]
    (pair,) = compare(["a", "b"], tables, NAMES, 500)["pairs"]
    told = pair["network_size"]["mean_iou"]
    spans = [
        intervals.named(intervals.intervals({"": sums_of(m)}, 500)[""], NAMES)["mean_iou"] for m in (before, after)
    ]
    assert spans[0][1] > spans[1][0] and told["interval"][0] > 0 and pair["verdict"].startswith("b is better than a:")
    assert told["interval"][1] - told["interval"][0] < 0.25 * (spans[0][1] - spans[0][0])
    assert told["value"] == pytest.approx(
        metrics.scores(after.sum(0), NAMES)["mean_iou"] - metrics.scores(before.sum(0), NAMES)["mean_iou"]
    )
    (same,) = compare(["a", "b"], tables[:1] * 2, NAMES, 500)["pairs"]
    assert same["network_size"]["iou"]["outline"] == {"value": 0.0, "interval": [0.0, 0.0]}
    (worse,) = compare(["a", "b"], tables[::-1], NAMES, 500)["pairs"]
    assert worse["verdict"].startswith("b is worse than a:") and "own_size" not in worse
    mixed = before.copy()
    mixed[::2], mixed[1::2] = after[::2], 2 * before[1::2] - after[1::2]  # as much better here as worse there
    third = counted_twice(mixed)
    for pair in ((tables[0], third), (third, tables[0])):
        (found,) = compare(["a", "b"], pair, NAMES, 500)["pairs"]
        low, high = found["network_size"]["mean_iou"]["interval"]
        assert low < 0 < high and found["verdict"].startswith("No significant difference between b and a: mean IoU ")


def test_names_of_users_are_shown_as_they_are_and_leave_room_for_the_scores():
    names = ["[red] cats", "[/x]", "a class whose name goes on " * 3]
    table = counted_twice(population(20)).append_column("loss_sums", pa.array([[1.0, 1.0]] * 20))
    for group in ("breed", "species"):
        table = table.append_column(group, pa.array(["cat", "dog"] * 10))
    for resamples in (1000, 0):
        console = Console(width=80, file=io.StringIO(), highlight=False, soft_wrap=True)
        found = summary(table, names, BAND, resamples, LossSettings())
        tables.show(console, "[b]run on [/test]", found)
        tables.show_comparison(console, compare(["[i]a", "[/b]"], [table, table], names, resamples))
        shown = console.file.getvalue()
        for text in ("[b]run on [/test]", *names[:2], "[/b] minus [i]a", "a class whose nam…", "By species"):
            assert text in shown, text
        assert max(map(len, shown.split("Whether")[0].splitlines()[:30])) <= 80 and "By breed" not in shown
        row = next(line for line in shown.splitlines() if "[red] cats" in line)
        spans = [found["intervals"][kind][names[0]] for kind in ("iou", "dice")] if resamples else []
        assert f"{found['iou'][names[0]]:.4f}" in row and all(f"{low:.4f} to {high:.4f}" in row for low, high in spans)
        assert ("95 % intervals" in shown) == ("No significant difference" in shown) == (resamples > 0)
        assert ("Whether [/b] and [i]a differ by more than chance is unknown" in shown) == (resamples == 0)


def test_resamples_are_enough_or_none():
    assert unflat(EvaluateSettings, {"bootstrap": 0}).evaluate.bootstrap == 0
    with pytest.raises(InputError, match=r"--bootstrap 999: .* give 1000 or more, or 0"):
        unflat(EvaluateSettings, {"bootstrap": 999})


def test_what_cannot_be_measured_has_no_score_and_no_interval():
    confusions = population(40) * np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    sums = sums_of(confusions)
    found = intervals.named(intervals.intervals({"": sums}, 100)[""], NAMES)
    vector = intervals.named(intervals.score_vector(sums.sum(0)), NAMES)
    expected = metrics.scores(confusions.sum(0), NAMES)
    assert found["iou"]["outline"] is None and np.isnan(vector["iou"]["outline"])
    assert vector["mean_iou"] == expected["mean_iou"] and vector["accuracy"] == expected["accuracy"]
    assert vector["dice"]["pet"] == expected["dice"]["pet"] and found["mean_iou"][0] < expected["mean_iou"]


def test_what_scores_fits_the_cluster_or_is_refused():
    two = [Node(2, memory=8e9, free_cpus=2)]
    assert plan_scoring(two, None, 1e9) == Placement(2, 0.75, 1, False)
    assert plan_scoring([Node(1, free_cpus=1)], None, 1e9) == Placement(1, 0.5, 1, False)
    assert plan_scoring([Node(4), Node(4)], 3, 1e9).num_workers == 3
    assert plan_scoring([Node(8, memory=3.5e9)], None, 1e9).num_workers == 3
    assert plan_scoring([Node(8, gpus=2)], None, 1e9) == Placement(2, 3.75, 1, True)
    for nodes, wanted, words in (
        (two, 3, "at most 2 fit"),
        ([Node(4, memory=2.5e9)], 3, "give --num-workers 2"),
        ([Node(4, memory=0.5e9)], None, "nodes with more memory"),
        ([Node(0)], None, "no CPUs yet"),
    ):
        with pytest.raises(InputError, match=words):
            plan_scoring(nodes, wanted, 1e9)
    workers = plan_scoring(two, None, 1e9)
    # Of 1.5 CPUs two workers would leave none to read.
    assert [workers.room([replace(two[0], free_cpus=free)], DATA_CPUS) for free in (2, 1.5, 0.8)] == [2, 1, 0]


def test_large_images_come_in_smaller_batches(model):
    assert scorer.batch_size([model]) == 16
    huge = replace(model, image_size=1024, network=ModelSettings(base_filters=64))
    assert scorer.batch_size([model, huge]) == 1


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(trained, storage, packed, tmp_path):
    flags = ["--model=trained", f"--data={packed}", f"--storage-path={storage}", f"--output={tmp_path / 'out'}"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
        start_new_session=True,
    )
    started = psutil.Process(process.pid)
    wait_for(lambda: any("Scorer" in " ".join(child.cmdline()) for child in started.children(recursive=True)))
    children = started.children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and process.stdout.read().strip().endswith("Stopped.")
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running()] and not (tmp_path / "out").exists()
