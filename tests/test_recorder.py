"""What a run writes of itself, without workers: its epochs, restarts and ends, and what a finished one answers."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import listening, read_json, state_of, tiny_settings, words_of
from PIL import Image

from unet.classes import PETS
from unet.config import TrainSettings, flat, unflat
from unet.errors import InputError
from unet.metric_names import BEST_EPOCH, DATA_WAIT, SCORE, SKIPPED_STEPS, SPEED
from unet.recipe.step import Learner
from unet.runs.checkpoint import Checkpoints
from unet.runs.run import Run
from unet.runs.state import State
from unet.storage import Folder
from unet.supervise import driver
from unet.supervise.preflight import open_run, refuse_changes
from unet.supervise.recorder import RunRecorder


@pytest.fixture
def recorder(tmp_path):
    return recorder_of(tmp_path)


def recorder_of(storage) -> RunRecorder:
    """Of a new start of the run `told`, which nobody but its folder hears."""
    manifest = SimpleNamespace(source="pets", data_digest="digest", class_infos=PETS.classes)
    prepared = SimpleNamespace(folder=Folder(storage / "data"), manifest=manifest)
    return RunRecorder(Run.load("told", settings_of(storage)), prepared, 7, listening(), as_trial=True, started=0.0)


def settings_of(storage, **changes):
    return tiny_settings(storage, storage, run_name="told", num_workers=1, **changes)


def line(epoch: int, time: int = 1000, **scores) -> dict:
    record = {"epoch": epoch, "step": 10 * epoch, "time": time, SCORE: 0.5, BEST_EPOCH: 1}
    return record | {SPEED: time / 10, DATA_WAIT: 1 / time} | scores


def state(*history: dict, **facts) -> State:
    epoch = len(history) + 1
    return state_of(TrainSettings(), epoch=epoch, step=10 * len(history), history=list(history), **facts)


def written(recorder: RunRecorder) -> list[dict]:
    return [json.loads(text) for text in recorder.run.folder.read_text("metrics.jsonl").splitlines()]


def test_an_epoch_that_is_trained_again_keeps_its_line(recorder, tmp_path):
    recorder.open(None)
    for epoch in (1, 2, 3):
        recorder.epoch(line(epoch), {"mean_iou": epoch / 10})
    assert written(recorder) == [line(1), line(2), line(3)]
    again = recorder_of(tmp_path)
    again.open(state(line(1)))  # the checkpoints of the others were damaged
    assert written(again) == [line(1), line(2), line(3)] and again.history == [line(1)]
    again.epoch(line(2, time=2000), {"mean_iou": 0.7})
    assert written(again) == [line(1), line(2), line(3)] and again.history == [line(1), line(2)]
    again.epoch(line(3, time=2000, **{SCORE: 0.6}), {"mean_iou": 0.8})  # came to something else this time
    assert written(again) == [line(1), line(2), line(3, time=2000, **{SCORE: 0.6})]
    summary = read_json(tmp_path / "told" / "summary.json")
    assert (summary["best_epoch"], summary["val"], summary["skipped_steps"]) == (1, {"mean_iou": 0.8}, 0)


def test_epochs_that_were_not_told_of_are_caught_up_with_once(recorder):
    recorder.open(state(line(1)))
    found = state(line(1), line(2), line(3, **{SKIPPED_STEPS: 2}), validation={"mean_iou": 0.5})
    for _ in range(2):
        recorder.catch_up(found)
        assert written(recorder) == recorder.history == [line(1), line(2), line(3, **{SKIPPED_STEPS: 2})]
    assert words_of(recorder.display).count("epoch  2/10") == words_of(recorder.display).count("epoch  3/10") == 1
    assert "epoch  1/10" not in words_of(recorder.display) and recorder.run.summary["skipped_steps"] == 2
    recorder.catch_up(None)
    assert len(recorder.history) == 3


def test_what_the_network_sees_is_a_picture_in_the_folder(recorder):
    recorder.open(None)
    masks = np.random.default_rng(0).integers(0, 3, (5, 32, 32)).astype(np.uint8)
    recorder.augmented(
        {"names": [f"pet {i}" for i in range(5)], "images": np.full((5, 32, 32, 3), 200, np.uint8), "masks": masks}
    )
    with Image.open(io.BytesIO(recorder.run.folder.read_bytes("augmented.png"))) as picture:
        assert picture.format == "PNG" and picture.width > picture.height


def test_a_stop_is_told_mlflow_at_once_and_delivery_begins(recorder):
    """Before its first step a run's MLflow is not even loaded, and a submitted job may have three seconds left."""
    recorder.open(None)
    calls = []

    class Tracker:
        def __getattr__(self, name):
            return lambda *given: calls.append((name, *given))

    recorder.tracker = Tracker()
    recorder.stopped()
    assert calls == [("tags", {"status": "stopped"}), ("status", "stopped"), ("open",)]
    assert read_json(Path(recorder.run.folder.path) / "summary.json")["status"] == "stopped"


def test_restarts_are_counted_and_told(recorder):
    recorder.open(None)
    recorder.restart("a worker was killed", 12, 2)
    recorder.restart("there is room for 3 workers", 24, 3)
    summary = recorder.run.summary
    told = [(one["reason"], one["step"], one["workers"]) for one in summary["restart_log"]]
    assert summary["restarts"] == 2
    assert told == [("a worker was killed", 12, 2), ("there is room for 3 workers", 24, 3)]


def test_the_first_step_of_all_starts_is_timed_once(recorder, tmp_path):
    recorder.open(None)
    recorder.first_step(12.345)
    again = recorder_of(tmp_path)
    again.open(None)
    again.first_step(99.0)
    assert read_json(tmp_path / "told" / "summary.json")["seconds_to_first_step"] == 12.35


@pytest.mark.parametrize("end", ["finished", "stopped", "failed"])
def test_an_end_tells_the_best_epoch_the_median_speed_and_why(recorder, tmp_path, end):
    recorder.open(None)
    for epoch, time in ((1, 1000), (2, 9000), (3, 2004)):
        recorder.epoch(line(epoch, time), None)
    best = {"best_epoch": 1, "best_score": 0.5, "best_checkpoint": "step_00000010", "validation": {"mean_iou": 0.5}}
    last = state(*recorder.history, skipped_steps=4, **best)
    if end == "finished":
        recorder.finished(last, None)
    else:
        recorder.broken_off(end, last, "of a reason")
    summary = read_json(tmp_path / "told" / "summary.json")
    told = {"status": end, "best_epoch": 1, "best_checkpoint": "checkpoints/step_00000010", "skipped_steps": 4}
    told |= {
        "images_per_second": 200.4,
        "val": {"mean_iou": 0.5},
        "reason": None if end == "finished" else "of a reason",
    }
    assert {key: summary[key] for key in told} == told and summary["ended"] > 0
    go_on = f"Stopped at step 30. Continue: python jobs/train.py --resume told --storage-path {tmp_path}"
    assert (go_on in words_of(recorder.display)) == (end == "stopped")


def test_a_run_that_ends_before_its_first_checkpoint_says_so(recorder):
    recorder.open(None)
    recorder.broken_off("stopped", None, "stopped by the user")
    assert "Stopped at the start." in words_of(recorder.display)
    known = ("best_epoch", "best_checkpoint", "images_per_second", "val")
    assert [recorder.run.summary[key] for key in known] == [None] * 4 and recorder.run.summary["skipped_steps"] == 0


def test_other_settings_are_refused_by_name_but_for_those_that_may_change():
    before = {"epochs": 1, "dropout": 0.1, "base_filters": 8, "gone": 3}
    refuse_changes("told", before, {"epochs": 2, "dropout": 0.1, "base_filters": 8}, frozenset({"epochs"}))
    with pytest.raises(InputError) as refused:
        refuse_changes("told", before, {"epochs": 2, "dropout": 0.2, "base_filters": 4}, frozenset({"epochs"}))
    assert "settings: --base-filters (was 8, is 4), --dropout (was 0.1, is 0.2). Give" in str(refused.value)


def test_a_setting_that_a_run_does_not_know_had_its_default(tmp_path):
    settings = unflat(TrainSettings, flat(settings_of(tmp_path)) | {"data": "synthetic"})
    Run.load("told", settings).start()
    config = tmp_path / "told" / "config.yaml"
    kept = [line for line in config.read_text().splitlines() if not line.startswith(("loss:", "grad_shards:"))]
    config.write_text("\n".join(kept))
    assert open_run(settings).name == "told"
    with pytest.raises(InputError, match=r"--grad-shards \(was 1, is 2\), --loss \(was cross_entropy, is 2\*cross_en"):
        open_run(unflat(TrainSettings, flat(settings) | {"grad_shards": 2, "loss": "2*cross_entropy"}))


@pytest.mark.parametrize(
    ("epoch", "stale", "settings", "words"),
    [
        (4, 3, {"epochs": 10, "patience": 3}, "stopped early after epoch 3, best 2. More: --patience 8."),
        (11, 0, {"epochs": 10, "patience": 3}, "is finished (10 epochs, best 2). More: --epochs 20."),
        (11, 9, {"epochs": 10}, "is finished (10 epochs, best 2). More: --epochs 20."),
    ],
)
def test_what_a_finished_run_answers(tmp_path, epoch, stale, settings, words):
    """Without Ray: nothing is looked for but its folder."""
    settings = settings_of(tmp_path, base_filters=2, depth=1, image_size=16, **settings)
    run = Run.load("told", settings)
    run.start()
    best = {"best_epoch": 2, "best_checkpoint": "step_00000003", "best_score": 0.5}
    facts = {"epoch": epoch, "stale_epochs": stale, "step": 3, **best}
    Checkpoints(run.folder).save(Learner(settings.recipe(3)), state_of(settings, **facts))
    run.write_summary(
        status="finished", test={"mean_iou": 0.5}, best_checkpoint="checkpoints/step_00000003", delivered=True
    )
    display = listening()
    assert driver.train(Run.load("told", settings), display)["status"] == "finished"
    assert words_of(display) == f"The run told {words}\n"
