"""The parts of a sweep that hear of its trials and rank them, without any trial being trained."""

import csv
import io
import json
from types import SimpleNamespace

import pytest
import yaml
from conftest import listening, read_json, words_of
from matplotlib.figure import Figure

from unet.classes import PETS
from unet.config import TuneSettings, unflat
from unet.errors import RunFailed
from unet.metric_names import SCORE
from unet.storage import Folder
from unet.tuning import figures, outcome
from unet.tuning.board import Board, trial_table
from unet.tuning.ledger import Ledger
from unet.tuning.space import parse_space
from unet.tuning.trial_recorder import TrialRecorder

SPACE = "dropout: {uniform: [0.0, 0.5]}\nlearning_rate: {loguniform: [0.0001, 0.1]}\n"
EPOCHS = 5


class Runs:
    """What would be sent to MLflow."""

    def __init__(self):
        self.calls = []

    def sync(self, trial):
        self.calls.append(("sync", trial))

    def end(self, trial):
        self.calls.append(("end", trial))

    def receive(self):
        pass


@pytest.fixture
def ledger(tmp_path):
    return Ledger(Folder(tmp_path))


@pytest.fixture
def recorder(ledger):
    return TrialRecorder(ledger, Runs(), EPOCHS, "asha")


def trial_of(ledger, **facts):
    """Tune's side of a new trial."""
    row = ledger.begin({"dropout": 0.1, "learning_rate": 0.01})
    config = {"trial": row["trial"], "draw": row["settings"]}
    facts = {"status": "RUNNING", "last_result": {}, "get_error": lambda: None} | facts
    return SimpleNamespace(custom_trial_name=row["trial"], config=config, **facts)


def ran(tmp_path, trial, *scores, **summary):
    """What a trial's run has left behind after so many epochs."""
    folder = Folder(tmp_path) / trial.custom_trial_name
    lines = [{"epoch": e, "val/mean_iou": s, "val/iou/pet": s / 2} for e, s in enumerate(scores, 1)]
    folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    folder.write_text("summary.json", json.dumps({"status": "running"} | summary))


def result(epoch, **facts):
    return {"epoch": epoch, "time_this_iter_s": 2.0, "training_seconds": 1.5, "pid": 7, "memory_mb": 100.0} | facts


def test_a_trial_is_entered_from_its_start_to_its_end(recorder, ledger, tmp_path):
    trial = trial_of(ledger)
    name = trial.custom_trial_name
    recorder.on_trial_start(0, [trial], trial)
    begun = recorder.begun
    ran(tmp_path, trial, 0.3, 0.5, 0.4)
    for epoch in (1, 2, 3):
        trial.config["draw"] = {"dropout": 0.1 * epoch, "learning_rate": 0.01}  # as PBT does
        recorder.on_trial_result(0, [trial], trial, result(epoch))
        row = ledger[name]
        assert (row["epochs"], row["seconds"], row["training_seconds"]) == (epoch, 2.0 * epoch, 1.5 * epoch)
        assert row["settings"]["dropout"] == 0.1 * epoch
    recorder.on_trial_recover(0, [trial], trial)
    recorder.on_trial_start(0, [trial], trial)
    assert recorder.begun == begun and (row["end"], row["tries"], row["pid"]) == ("running", 2, 7)
    assert (row["val/best_mean_iou"], row["val/best_epoch"], row["val/iou/pet"]) == (0.5, 2, 0.25)
    recorder.on_trial_complete(0, [trial], trial)
    assert (ledger[name]["end"], ledger[name]["reason"]) == ("pruned", "asha stopped it")
    told = read_json(tmp_path / name / "summary.json")
    assert (told["status"], told["end"], told["reason"]) == ("stopped", "pruned", "asha stopped it")
    sent = recorder._runs.calls
    assert sent == [("sync", name)] * 5 + [("end", name)]
    assert Ledger(Folder(tmp_path)).rows == ledger.rows and row["ended"] >= row["started"]


@pytest.mark.parametrize(
    ("epochs", "summary", "last", "end", "reason"),
    [
        (3, {}, {}, "pruned", "asha stopped it"),
        (EPOCHS, {}, {}, "finished", "trained to the end"),
        (3, {"status": "finished"}, {}, "finished", "trained to the end"),  # by its patience
        (3, {}, {"stopped": True}, "stopped", None),
        (3, {"status": "failed", "reason": "numbers"}, {"stopped": True}, "failed", "numbers"),
    ],
)
def test_why_a_trial_ended(recorder, ledger, tmp_path, epochs, summary, last, end, reason):
    trial = trial_of(ledger, last_result=last)
    recorder.on_trial_start(0, [trial], trial)
    ran(tmp_path, trial, *[0.1] * epochs, **summary)
    recorder.on_trial_result(0, [trial], trial, result(epochs))
    recorder.on_trial_complete(0, [trial], trial)
    row = ledger[trial.custom_trial_name]
    assert (row["end"], row["reason"], row.get("diverged", False)) == (end, reason, end == "failed")


def test_an_epoch_that_diverged_is_none_and_an_error_gives_its_last_line(recorder, ledger, tmp_path):
    trial = trial_of(ledger, get_error=lambda: RuntimeError("a page\nKeyError: 'x' of s3://key:secret@bucket"))
    recorder.on_trial_start(0, [trial], trial)
    ran(tmp_path, trial, 0.3)
    recorder.on_trial_result(0, [trial], trial, result(1))
    recorder.on_trial_result(0, [trial], trial, result(2, diverged=True, **{SCORE: 0.0}))
    recorder.on_trial_error(0, [trial], trial)
    row = ledger[trial.custom_trial_name]
    assert (row["epochs"], row["val/best_mean_iou"], row["end"]) == (1, 0.3, "failed")
    assert row["reason"].startswith("KeyError: 'x' of s3://") and "secret" not in row["reason"]


def test_a_sweep_without_a_process_is_idle(recorder, ledger, monkeypatch):
    trial, now = trial_of(ledger, status="PENDING"), [1000.0]
    monkeypatch.setattr("unet.tuning.trial_recorder.time.monotonic", lambda: now[0])
    for status, passed, idle, running in (
        ("RUNNING", 5, 0.0, {"trial-001"}),
        ("PENDING", 7, 7.0, set()),
        ("PENDING", 4, 11.0, set()),
        ("RUNNING", 9, 0.0, {"trial-001"}),
    ):
        trial.status = status
        now[0] += passed
        recorder.on_step_end(0, [trial])
        assert (recorder.idle_seconds, recorder.running) == (idle, running)


@pytest.fixture
def rows(ledger, tmp_path):
    """A sweep that has ended: each trial's scores by epoch."""
    ends = {"pruned": (0.2, 0.3), "finished": (0.3, 0.6, 0.5, 0.4, 0.4), "failed": (), "stopped": (0.5,)}
    for end, scores in ends.items():
        trial = trial_of(ledger)
        ran(tmp_path, trial, *scores)
        ledger.update(trial.custom_trial_name, end=end, reason=f"of {end}", ended=1.0, started=0.0, seconds=3.0)
        ledger.refresh(trial.custom_trial_name, EPOCHS)
    return outcome.rank(ledger)


def settings_of(tmp_path):
    return unflat(TuneSettings, {"storage_path": str(tmp_path), "data": "pets", "epochs": EPOCHS})


def test_the_files_of_a_sweep_rank_its_trials(rows, ledger, tmp_path):
    settings = settings_of(tmp_path)
    space = parse_space(SPACE, "x", settings)
    shared = SimpleNamespace(classes=PETS.classes, base={"epochs": EPOCHS, "data": "/prepared", "run_name": "x"})
    files = outcome.write_files(Folder(tmp_path), rows, ledger, settings, space, shared)
    found = list(csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text())))
    assert [row["trial"] for row in found] == ["trial-002", "trial-004", "trial-001", "trial-003"]
    assert [row["val/best_mean_iou"] for row in found] == ["0.6", "0.5", "0.3", ""]
    assert (found[0]["val/best_epoch"], found[0]["val/iou/pet"], found[0]["dropout"]) == ("2", "0.3", "0.1")
    best = yaml.safe_load((tmp_path / "best_config.yaml").read_text())
    assert best == {"epochs": EPOCHS, "data": "pets", "dropout": 0.1, "learning_rate": 0.01}
    assert set(files) == {"sweep.csv", "best_config.yaml", "scores_over_time.png", "settings.png"}
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


def test_the_pictures_of_a_sweep_show_each_trial_and_ring_the_best(rows, ledger, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **more: drawn.append(figure))
    figures.scores_over_time({row["trial"]: ledger.history(row["trial"]) for row in rows}, rows, tmp_path)
    (axes,), legend = drawn[0].axes, [text.get_text() for text in drawn[0].legends[0].get_texts()]
    lines = [line.get_xydata().tolist() for line in axes.get_lines() if len(line.get_xdata())]
    assert lines == [[[1, 0.2], [2, 0.3]], [[1, 0.5]], [[1, 0.3], [2, 0.6], [3, 0.5], [4, 0.4], [5, 0.4]]]
    assert legend == ["finished", "pruned", "stopped", "best, trial-002"]
    figures.settings_and_scores(rows, parse_space(SPACE, "x", settings_of(tmp_path)), tmp_path)
    points = [part.get_offsets().tolist() for part in drawn[1].axes[0].collections]
    assert points == [[[0.1, 0.6]], [[0.1, 0.3]], [[0.1, 0.5]], [[0.1, 0.6]]]
    assert drawn[1].axes[1].get_xscale() == "log" and drawn[1].axes[0].get_xscale() == "linear"


def test_the_parent_run_is_told_of_every_end(rows, tmp_path):
    told = {}

    class Writer:
        def __getattr__(self, name):
            return lambda *given: told.__setitem__(name, given)

    (tmp_path / "sweep.csv").touch()
    summary = {"status": "finished", "reason": "all trials ended", "ended": 5}
    outcome.report(Writer(), Folder(tmp_path), rows, EPOCHS, summary)
    counts, step, time = told["metrics"]
    assert time == 5
    ends = {f"sweep/trials_{end}": 1 for end in ("finished", "pruned", "failed", "stopped")}
    assert counts == ends | {"sweep/trials": 4, "sweep/trial_epochs_saved": 3, "val/best_mean_iou": 0.6} and step == 0
    (tags,) = told["tags"]
    note = tags.pop("mlflow.note.content")
    assert "4 trials, 3 of" in note and note.split("\n")[2:5] == [
        "| trial | dropout | learning_rate | val mean IoU | epochs | end |",
        "| --- | --- | --- | --- | --- | --- |",
        "| trial-002 | 0.1 | 0.01 | 0.6000 | 5 | finished |",
    ]
    assert tags == {
        "status": "finished",
        "reason": "all trials ended",
        "best_trial": "trial-002",
        "best_run_id": None,
        "best_dropout": 0.1,
        "best_learning_rate": 0.01,
    }
    folder, name = told["file"]
    assert (folder.path, name) == (str(tmp_path), "sweep.csv") and told["status"] == ("finished", 5)


def test_a_sweep_without_a_score_says_why(ledger):
    for _ in range(2):
        ledger.update(ledger.begin({})["trial"], end="failed", reason="KeyError: 'x'.")
    with pytest.raises(RunFailed, match=r"^No trial has a score. KeyError: 'x'.$"):
        outcome.rank(ledger)


def test_the_table_and_the_lines_of_a_sweep(rows, ledger, tmp_path):
    display = listening()
    board = Board(display, ledger, None, EPOCHS, PETS.classes, lambda: 65.0)
    for row in rows:
        board.on_trial_complete(0, [], SimpleNamespace(custom_trial_name=row["trial"]))
    assert "trial-002 finished after epoch 5, best mean IoU 0.6000: of finished" in words_of(display)
    assert "trial-003 failed after epoch 0, best mean IoU –: of failed" in words_of(display)
    status = board._status()
    assert status == (
        "4 trials ended, 0 running · best trial-002 0.6000 (pet 0.3000, background –, outline –) · "
        "3 trial-epochs saved by pruning · 1:05 left"
    )
    for width, by_class in ((200, True), (60, False)):
        shown = listening()
        shown.console.width = width
        shown.console.print(trial_table(rows, lambda row: f"{row['epochs']}/{EPOCHS}", PETS.classes, width))
        lines = [line.split() for line in words_of(shown).splitlines()]
        assert ["trial-002", "0.1", "0.01", "finished", "5/5", "0.6000"] + ["0.3000", "–", "–"] * by_class in lines
