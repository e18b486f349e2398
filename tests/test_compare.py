"""Runs beside each other: their own minutes, what differs, pairs on the same images, the page, a sweep's settings."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import command, listening, read_json, state_of, tiny_settings, vouch
from hypothesis import given
from hypothesis import strategies as st
from pages import Page, assert_stands_alone
from rich.console import Console

from unet.classes import PETS
from unet.comparison import pairs as comparing
from unet.comparison import run as comparison
from unet.comparison import tables
from unet.comparison.page import COLOURS, comparison_page
from unet.comparison.pairs import Pairs, best_of, paired
from unet.comparison.run import Comparison, compare_runs
from unet.comparison.runs import ComparedRun, by_class, differing, with_minutes
from unet.comparison.sweep import ComparedSweep, Importance, read_sweep
from unet.config import TuneSettings, flat, unflat
from unet.config.compare import CompareSettings
from unet.errors import InputError
from unet.evaluation import outcome
from unet.evaluation.counts import CELLS, cells_of
from unet.evaluation.records import written
from unet.evaluation.summary import compare
from unet.storage import Folder
from unet.tuning.ledger import Ledger

NAMES = [item.name for item in PETS.classes]
START = 1_700_000_000_000


def lines(*seconds: float, scores=None) -> list[dict]:
    """An epoch that ended so many seconds after the start, each."""
    scores = scores or [0.1 * n for n in range(1, len(seconds) + 1)]
    return [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "time": int(START + 1000 * at),
            "val/mean_iou": score,
            "val/loss": 1 - score,
            "train/loss": 1.1 - score,
            "val/iou/pet": score / 2,
            "speed/images_per_second": 100.0 + epoch,
        }
        for epoch, (at, score) in enumerate(zip(seconds, scores, strict=True), 1)
    ]


def minutes_of(history, started=START, ended=()) -> list[float]:
    return [line["minutes"] for line in with_minutes(history, started, dict(ended))]


@pytest.mark.parametrize(
    ("seconds", "ended", "minutes"),
    [
        ((60, 120, 180), {}, [1, 2, 3]),
        ((60, 120, 7380, 7440), {}, [1, 2, 123, 124]),  # nothing says what of it was the run's
        ((60, 120, 7380, 7440), {4: 240}, [1, 2, 3, 4]),
        ((60, 120, 7380, 7440), {2: 120, 4: 240}, [1, 2, 3, 4]),
        ((60, 3660, 3720, 9900), {4: 240}, [1, 2, 3, 4]),  # two gaps, of two lengths
        ((90, 150, 210), {3: 180}, [1, 2, 3]),  # from the command to the start of the workers
        ((60, 120), {2: 500}, [1, 2]),  # what no clock has seen is not made up
    ],
)
def test_minutes_leave_out_the_time_between_two_starts(seconds, ended, minutes):
    assert minutes_of(lines(*seconds), ended=ended) == pytest.approx(minutes)


def test_minutes_without_a_start_begin_with_the_first_line():
    assert minutes_of(lines(60, 120), started=None) == [0, 1]
    assert with_minutes([], START, {}) == []


@given(st.lists(st.floats(0.1, 1000), min_size=1, max_size=8), st.floats(0, 3000))
def test_minutes_are_never_more_than_the_clocks_and_end_where_the_checkpoint_says(waits, known):
    clock = np.cumsum(waits)
    found = 60 * np.array(minutes_of(lines(*clock), ended={len(waits): known}))
    assert found[-1] == pytest.approx(min(known, clock[-1]), abs=0.01)
    assert (np.diff([0, *found]) <= np.array(waits) + 0.01).all() and (np.diff(found) >= 0).all()


def write_run(storage: Path, name: str, history: list[dict], seconds: dict[int, float], **changes) -> Path:
    """The folder of a run with a checkpoint at the end of each epoch of which the `seconds` are known."""
    folder = storage / name
    settings = tiny_settings(storage, Path("/pets"), run_name=name, **changes)
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(flat(settings)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    summary = {"started": START, "data_digest": "digest", "test": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    for epoch, own in seconds.items():
        place = folder / "checkpoints" / f"step_{10 * epoch:08d}"
        place.mkdir(parents=True)
        state = state_of(settings, epoch=epoch + 1, step=10 * epoch, seconds=float(own))
        (place / "state.json").write_text(json.dumps(asdict(state)))
        for file in ("model.weights.h5", "optimizer.npz"):
            (place / file).write_text("not read here")
        vouch(place)
    return folder


def read_run(storage: Path, name: str) -> ComparedRun:
    return ComparedRun.of_folder(name, name, Folder(storage / name))


def test_a_run_is_what_its_folder_says(tmp_path):
    write_run(tmp_path, "a", lines(60, 120, 7380, scores=[0.3, 0.5, 0.4]), {2: 120, 3: 180})
    run = read_run(tmp_path, "a")
    assert [line["minutes"] for line in run.history] == pytest.approx([1, 2, 3]) and run.minutes == 3
    assert (run.recipe, run.best, run.speed, run.test_score) == ("reference", (2, 0.5), 102.0, None)
    assert (run.checkpoint, run.classes) == ("step_00000030", PETS.classes)
    assert run.parameters == tiny_settings(tmp_path, tmp_path).recipe(3).network.parameters > 1000
    assert by_class([run], "val") == {"pet": [0.25], "background": [None], "outline": [None]}
    assert by_class([run], "test") == {}


def test_a_run_that_has_just_begun_has_no_numbers(tmp_path):
    write_run(tmp_path, "a", [], {})
    run = read_run(tmp_path, "a")
    assert (run.minutes, run.best, run.speed, run.checkpoint, run.scores("val")) == (None, None, None, None, {})


def test_the_settings_that_differ_are_those_of_the_training_and_hold_no_secret(tmp_path):
    write_run(tmp_path, "a", [], {}, tracking_uri="http://me:word@host", experiment="x")
    write_run(tmp_path, "b", [], {}, learning_rate=0.01, dropout=0.3)
    old = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    del old["warmup"]  # newer than the run: it counts as its default
    (tmp_path / "b" / "config.yaml").write_text(yaml.safe_dump(old | {"class_weights": "s3://key:word@bucket"}))
    runs = [read_run(tmp_path, name) for name in "ab"]
    found = differing(runs)
    assert found == {"dropout": [0.1, 0.3], "learning_rate": [0.005, 0.01], "class_weights": [None, "s3://***@bucket"]}
    assert differing(runs[:1]) == {}


def evaluation(folder: Path, checkpoint: str, shift: int, images: int = 40) -> None:
    """What an evaluation of the val split leaves: `shift` pixels of each image's pet taken for background."""
    rng = np.random.default_rng(0)
    confusions = np.array([np.diag(rng.integers(200, 400, 3)) for _ in range(images)])
    confusions[:, 0, 1] = rng.integers(30, 60, images) + shift
    records = pa.table(
        {
            "name": [f"pet_{i:02d}" for i in range(images)],
            "confusion": pa.array(map(list, map(cells_of, confusions)), CELLS),
        }
    )
    place = folder / "evaluations" / "val"
    place.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(written(records, 3)), place / "per_image.parquet")
    total = confusions.sum(0)
    iou = np.diag(total) / (total.sum(0) + total.sum(1) - np.diag(total))
    scores = {"iou": dict(zip(NAMES, iou.tolist(), strict=True)), "mean_iou": float(iou.mean()), "images": images}
    about = {"checkpoint": checkpoint, "data_digest": "digest", "confusion": total.tolist()}
    (place / "metrics.json").write_text(json.dumps(about | scores | {"intervals": {"mean_iou": None}}))


def test_evaluations_that_are_there_are_reused_and_no_others(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(comparing, "_evaluate", lambda missing, *more: asked.append([r.name for r in missing]) or "No.")
    for name, shift in (("a", 30), ("b", 0), ("c", 29)):
        evaluation(write_run(tmp_path, name, lines(60), {1: 60}), "step_00000010", shift)
    runs = [read_run(tmp_path, name) for name in "abc"]
    settings = unflat(CompareSettings, {"storage_path": str(tmp_path)})
    found = paired(runs, "digest", settings, listening())
    assert not asked and not found.left_out and set(found.scores) == {"a", "b", "c"}
    first, _, third = found.pairs
    assert (first["a"], first["b"], third["a"]) == ("a", "b", "b") and "b is better than a" in first["verdict"]
    assert first["network_size"]["mean_iou"]["interval"][0] > 0 and "band" not in first
    # The same numbers as by evaluating both at once.
    tables_of = [outcome.read(run.folder / "evaluations/val", run.checkpoint, "digest")[1] for run in runs]
    assert found.pairs == compare(["a", "b", "c"], tables_of, NAMES, 2000)["pairs"]
    assert best_of(found, "val").startswith("b scores highest on val: mean IoU 0.9")
    assert "Its difference to a and c is more than chance." in best_of(found, "val")

    place = tmp_path / "a" / "evaluations" / "val"
    metrics, kept = read_json(place / "metrics.json"), (place / "metrics.json").read_text()
    for change in ({"checkpoint": "step_00000009"}, {"data_digest": "other"}, {"confusion": [[1, 0, 0]] * 3}):
        (place / "metrics.json").write_text(json.dumps(metrics | change))
        without = paired(runs, "digest", settings, listening())
        assert asked.pop() == ["a"] and without.left_out == ["No."] and len(without.pairs) == 1, change
    (place / "metrics.json").write_text(kept[:-9])
    assert outcome.read(Folder(place), "step_00000010", "digest") is None
    (place / "metrics.json").write_text(kept)
    (place / "per_image.parquet").write_bytes((place / "per_image.parquet").read_bytes()[:900])
    assert outcome.read(Folder(place), "step_00000010", "digest") is None


def test_what_cannot_be_scored_is_left_out_with_a_sentence(tmp_path):
    """Its data are gone; and a run without a checkpoint."""
    evaluation(write_run(tmp_path, "a", lines(60), {1: 60}), "step_00000010", 0)
    write_run(tmp_path, "b", lines(60), {1: 60})
    write_run(tmp_path, "c", [], {})
    settings = unflat(CompareSettings, {"storage_path": str(tmp_path)})
    found = paired([read_run(tmp_path, name) for name in "abc"], "digest", settings, listening())
    assert not found.pairs and list(found.scores) == ["a"] and best_of(found, "val") is None
    nothing, gone = found.left_out
    assert nothing == "Without a checkpoint, not compared in pairs: c."
    assert gone.startswith("Without scores on val, not compared in pairs: b. The data are not where they were: python")


def test_what_does_not_compare_is_refused(tmp_path):
    write_run(tmp_path, "a", [], {})
    other = write_run(tmp_path, "b", [], {})
    (other / "summary.json").write_text(json.dumps({"data_digest": "other"}))
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "config.yaml").write_text("space: quick\n")
    for names, words in (
        ((), "Say which runs"),
        (("a",), "a is a single run: name two"),
        (("a", "a"), "a is named twice"),
        (("a", "x"), r"There is no run x under .* Known are: a, b, sweep"),
        (("a", "sweep"), "sweep is a sweep: compare it alone"),
        (("a", "b"), r"a and b were trained on different data .* jobs/evaluate.py --model a,b --data DATA"),
        (tuple(map(str, range(13))), "13 runs cannot be told apart on one page: name 12 at most"),
    ):
        with pytest.raises(InputError, match=words):
            compare_runs(unflat(CompareSettings, {"storage_path": str(tmp_path), "runs": names}), listening())


def test_each_comparison_has_a_place_of_its_own():
    long = tuple(f"a-long-name-of-a-run-{i}" for i in range(12))
    names = [("a", "b"), ("b", "a"), ("s/trial-001", "s/trial-002"), long, long[::-1]]
    places = [comparison._name_of(given) for given in names]
    assert places[0] == "a-vs-b" and places[2] == "s-trial-001-vs-s-trial-002" and len(set(places)) == 5
    assert all(len(place) <= 100 and "/" not in place for place in places)


NASTY = "<script>alert(1)</script>"


def compared(count: int, **facts) -> Comparison:
    """A comparison of so many runs, whose learning rates differ, and which all end in an hour."""
    runs = []
    for index in range(count):
        name = f"run_{index}" if index else NASTY
        history = [line | {"minutes": 30.0 * line["epoch"]} for line in lines(1, 2, scores=[0.2, 0.4 + 0.01 * index])]
        settings = {"learning_rate": 0.001 * (index + 1), "recipe": "/somewhere/own.yaml", "loss": "cross_entropy"}
        summary = {"test": None}
        runs.append(
            ComparedRun(name, name, Folder("/runs"), settings, summary, history, 60.0, 1_234_567, PETS.classes, "c")
        )
    one, none = {"value": 0.0123, "interval": [0.0017, 0.0245]}, {"value": -0.0345, "interval": [-0.07, 0.01]}
    size = {"mean_iou": one, "iou": {"pet": one, "background": none, "outline": {"value": None, "interval": None}}}
    pair = {"a": NASTY, "b": "run_1", "verdict": f"run_1 is better than {NASTY}: so.", "network_size": size}
    scores = {
        run.name: {"mean_iou": 0.4 + 0.01 * i, "images": 421, "intervals": {"mean_iou": [0.3, 0.5]}}
        for i, run in enumerate(runs)
    }
    done = Comparison("x", Folder("/out"), "val", runs, "4f" * 32, Pairs(scores, [pair], ["One is <left> out."]), None)
    return replace(done, **facts)


def test_the_page_shows_what_was_compared():
    html = comparison_page(compared(2))
    page = Page(html)
    assert_stands_alone(html, page)
    assert "<script" not in html and "<left>" not in html and NASTY in page.words("summary")
    assert "run_1 own.yaml 1,234,567 2 60.0 101.5 0.4100 –" in page.words("summary")
    assert "run_1 scores highest on val: mean IoU 0.4100." in page.words("summary")
    assert f"run_1 {NASTY} +0.0123 +0.0017 to +0.0245" in page.words("pairs")
    assert page.words("pairs").endswith("+0.0123 −0.0345 – One is <left> out.")
    assert "on the 421 images of val" in page.words("pairs")
    assert "learning_rate 0.001 0.002" in page.words("settings") and "recipe" not in page.words("settings")
    assert "pet 0.200 0.205" in page.words("classes") and "On test" not in page.words("classes")
    assert "importance" not in page.text and "different losses" not in page.words("curves")
    bold = re.findall(r'<td class="n best"[^>]*>([^<]*)<', html[html.index('id="pairs"') : html.index('id="settings"')])
    assert bold == ["+0.0123", "+0.0123"]


def test_the_curves_lie_where_their_axes_say():
    html = comparison_page(compared(2))
    charts = html[html.index('id="curves"') :].split("<svg ")[1:7]
    titles = [re.search(r'aria-label="([^"]+)"', chart)[1] for chart in charts]
    assert titles[:3] == ["Mean IoU on val by epoch", "Mean IoU on val by minutes", "Loss on val by epoch"]
    for chart, across in ((charts[0], (1, 2)), (charts[1], (30, 60))):
        ticks = re.findall(r'<text x="([\d.]+)" y="238" text-anchor="middle">([\d.]+)<', chart)
        (left, low), (right, high) = ([float(part) for part in tick] for tick in (ticks[0], ticks[-1]))
        rises = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', chart)
        (foot, least), (top, most) = ([float(part) for part in tick] for tick in (rises[0], rises[-1]))
        points = [
            [
                (
                    low + (float(x) - left) / (right - left) * (high - low),
                    least + (foot - 4 - float(y)) / (foot - top) * (most - least),
                )
                for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)
            ]
            for path in re.findall(r'class="line" [^>]* d="([^"]+)"', chart)
        ]
        for index, line in enumerate(points):
            assert [x for x, _ in line] == pytest.approx(across, rel=0.01)
            assert [y for _, y in line] == pytest.approx([0.2, 0.4 + 0.01 * index], abs=0.01)


def test_a_dozen_runs_are_told_apart():
    html = comparison_page(compared(12))
    drawn = re.findall(r'<path class="line( dashed)?" style="--line:(rgb\([^)]+\))"', html)
    assert len(drawn) == 72 and len(set(drawn)) == 12 == 2 * len(COLOURS)


def test_the_terminal_says_the_same():
    console = Console(width=160, record=True)
    tables.show(console, compared(2))
    words = console.export_text()
    assert re.search(r"run_1 +own.yaml +1,234,567 +2 +60.0 +101.5 +0.4100 +–", words)
    assert re.search(r"learning_rate +0.001 +0.002", words) and f"run_1 is better than {NASTY}: so." in words
    assert words.rstrip().endswith("One is <left> out.")


def test_of_a_sweep_it_says_which_setting_mattered_and_how_surely():
    sweep = ComparedSweep("s", Folder("/s"), 20, 18, None, [])
    assert replace(sweep, scored=7).told == (
        "Which setting mattered cannot be told from 7 trials: that takes 8 trials with a score."
    )
    assert sweep.told.endswith("18 trials: all trials scored the same.")
    clear, rival = Importance("rate", 0.8, (0.6, 0.9)), Importance("dropout", 0.2, (0.1, 0.65))
    other = Importance("filters", 0.1, (0.0, 0.2))
    assert replace(sweep, importance=[clear, other]).told == "rate mattered most."
    unclear = replace(sweep, importance=[clear, rival, other])
    assert unclear.told == "rate may have mattered most, but 18 trials do not set it apart from dropout."
    page = Page(comparison_page(compared(2, sweep=unclear)))
    assert "The best 2 of 20 trials" in page.words("summary") and unclear.told in page.words("summary")
    nbsp = "\N{NO-BREAK SPACE}"
    assert f"dropout 20{nbsp}% 10{nbsp}% to 65{nbsp}%".replace(nbsp, " ") in page.words("importance").replace(nbsp, " ")


SPACE = (
    "dropout: {uniform: [0.0, 0.5]}\nlearning_rate: {loguniform: [1e-4, 0.1]}\nclass_weights: {choice: [auto, null]}\n"
)


def write_sweep(folder: Path, trials: int) -> None:
    """A sweep whose scores are those of the learning rate alone; `auto` has become numbers, as when a sweep begins."""
    settings = unflat(TuneSettings, {"storage_path": str(folder.parent), "data": "pets", "epochs": 1})
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(flat(settings)))
    (folder / "space.yaml").write_text(SPACE)
    (folder / "summary.json").write_text(json.dumps({"mlflow_run_id": "abc"}))
    ledger, rng = Ledger(Folder(folder)), np.random.default_rng(0)
    for index in range(trials):
        drawn = {"dropout": rng.uniform(0, 0.5), "learning_rate": 10 ** rng.uniform(-4, -1)}
        row = ledger.begin(drawn | {"class_weights": "0.5,1,1" if index % 2 else None})
        score = 0.5 + 0.1 * np.log10(drawn["learning_rate"])
        ledger.update(row["trial"], end="finished", **{"val/best_mean_iou": score})
        write_run(folder, row["trial"], lines(60, scores=[score]), {}, **{"learning_rate": drawn["learning_rate"]})


def test_a_sweeps_trials_are_compared_and_its_settings_weighed(tmp_path, monkeypatch):
    monkeypatch.setattr("unet.tuning.importance.RESAMPLES", 6)
    write_sweep(tmp_path / "few", 7)
    few, runs = read_sweep("few", Folder(tmp_path / "few"), 12, listening())
    assert len(runs) == 7 and not few.importance and few.told.startswith("Which setting mattered cannot be told from 7")
    write_sweep(tmp_path / "many", 30)
    found, runs = read_sweep("many", Folder(tmp_path / "many"), 12, listening())
    assert (found.trials, found.scored, found.mlflow_run_id, len(runs)) == (30, 30, "abc", 12)
    scores = [run.best[1] for run in runs]
    assert scores == sorted(scores, reverse=True) and runs[0].model == f"many/{runs[0].name}"
    rate, *others = found.importance
    assert rate.setting == "learning_rate" and rate.span[0] > 0.6 and found.told == "learning_rate mattered most."
    assert len(others) == 2 and all(0 <= other.span[0] <= other.span[1] < 0.3 for other in others)


def test_the_job_compares_trained_runs(trained, storage, capsys):
    """One run by two names, of which one names another rate: the same scores, and a page in its MLflow run."""
    import mlflow

    folder, summary = trained
    names = ["compared-a", "compared-b"]
    try:
        for name in names:
            shutil.copytree(folder, storage / name, ignore=shutil.ignore_patterns("evaluations"))
        config = yaml.safe_load((storage / "compared-b" / "config.yaml").read_text())
        (storage / "compared-b" / "config.yaml").write_text(yaml.safe_dump(config | {"learning_rate": 0.125}))
        flags = [*names, "--split", "test", "--storage-path", storage]
        assert command("compare", *flags) == 0
        said = capsys.readouterr().out
        assert re.search(r"learning_rate +0.005 +0.125", said)
        assert "No significant difference between compared-b and compared-a: mean IoU +0.0000" in said
        page = storage / "comparisons" / "compared-a-vs-compared-b" / "comparison.html"
        words = Page(page.read_text()).words("summary")
        assert f"{summary['test']['mean_iou']:.4f}" in words and f"{summary['val']['mean_iou']:.4f}" in words
        client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
        logged = client.list_artifacts(summary["mlflow_run_id"], "comparisons/compared-a-vs-compared-b")
        assert [item.path.rpartition("/")[2] for item in logged] == ["comparison.html"]
        metrics = [read_json(storage / name / "evaluations" / "test" / "metrics.json") for name in names]
        assert metrics[0]["mean_iou"] == pytest.approx(summary["test"]["mean_iou"], abs=1e-3)

        page.unlink()  # again: nothing is scored, and without MLflow there is a page all the same
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comparing, "evaluate", lambda *given: pytest.fail("it was scored again"))
            assert command("compare", *flags, "--tracking-uri", "http://127.0.0.1:9") == 0
        said = capsys.readouterr().out
        assert page.exists() and said.count("The comparison was not logged to MLflow") == 1 and str(page) in said
    finally:
        for name in (*names, "comparisons"):
            shutil.rmtree(storage / name, ignore_errors=True)
