"""The loop of one worker where a stop signal comes in the middle of a validation."""

import contextlib
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from conftest import tiny_settings, train, weights_of
from faulty_line import Line

from unet.classes import PETS
from unet.data.ingest import Ingest, WorkerShard, keep
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.preparing.resolve import resolve
from unet.data.shards import Prepared
from unet.errors import StorageAway
from unet.recipe.step import Learner
from unet.runs.run import Run
from unet.runs.state import name_of
from unet.storage import Folder
from unet.supervise import driver
from unet.supervise.preflight import open_run
from unet.terminal import Display
from unet.training import link as training_link
from unet.training import loop as loop_module
from unet.training.begin import begin
from unet.training.job import Job
from unet.training.link import not_finite, start_link
from unet.training.loop import Loop
from unet.training.plan import FINISH_SECONDS


class WorkerLink:
    """What the loop says, and a request that comes with a batch of the first validation."""

    def __init__(self, stop_signal=None, batch=2):
        self.events, self.lives, self.stop_signal, self._batch, self._live = [], [], stop_signal, batch, None

    @property
    def request(self):
        there = self._live and self._live.phase == "val" and self._live.step >= self._batch
        return self.stop_signal if there else None

    def live(self, live):
        self._live = live
        self.lives.append(live)

    def event(self, kind, content=None):
        self.events.append((kind, content))

    def now(self):
        return time.time()


@pytest.fixture(scope="module")
def reading(ray_cluster, storage, packed) -> Ingest:
    prepared = resolve(str(packed), 32, "stretch", Folder(storage), lambda *_: None)
    counts = dict(prepared.manifest.counts)
    return keep(Ingest(prepared.folder.uri, 32, counts, 4, 0, 2, (1, 0), int(256e6)))


def loop_of(storage, name, reading, link, checkpoint=None, learner=None, **changes) -> Loop:
    values = {"num_workers": 1, "batch_size": 4, "epochs": 2, "run_name": name}
    settings = tiny_settings(storage, "x", **values | changes)
    run = Run.load(name, settings)
    run.start()
    job = Job(settings, run.public_settings(), run.folder.uri, 1, "digest", PETS.classes, checkpoint, None, None)
    state = run.checkpoints.state(checkpoint) if checkpoint else None
    here = replace(reading, start=(state.epoch, state.epoch_step) if state else (1, 0))
    learner = learner or Learner(settings.recipe(3))
    return Loop(job, learner, WorkerShard(here, 0, 1).reader(), link, 0, 1)


def same(record: dict) -> dict:
    return {k: v for k, v in record.items() if k not in ("time", "speed/images_per_second", "speed/data_wait_fraction")}


@pytest.fixture(scope="module")
def whole(reading, storage) -> Loop:
    """After an undisturbed training."""
    loop = loop_of(storage, "whole", reading, WorkerLink())
    assert loop.train(lambda record: None)
    return loop


def test_a_stop_in_a_validation_saves_the_epoch_and_the_next_start_scores_it(whole, reading, storage):
    check_told(whole, whole.link.lives)
    link = WorkerLink("leave")
    first = loop_of(storage, "left", reading, link)
    steps = first.plan.steps
    assert not first.train(lambda record: None) and link.events[-1] == ("left", steps)
    (name,) = first.checkpoints.whole()
    state = first.checkpoints.state(name)
    assert (state.epoch, state.epoch_step, state.step, state.history) == (1, steps, steps, [])

    second = loop_of(storage, "left", reading, WorkerLink(), name)
    assert second.train(lambda record: None)
    assert list(map(same, second.state.history)) == list(map(same, whole.state.history))
    for one, other in zip(whole.learner.model.weights, second.learner.model.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


class Outage(WorkerLink):
    """The line to the store fails from step 5 of the first epoch to step 8 of the second."""

    def __init__(self, line):
        super().__init__()
        self.line, self.away, self.back = line, None, None

    def live(self, live):
        super().live(live)
        if (live.epoch, live.phase, live.step) == (1, "train", 5):
            self.away = self.line.failing("503")
            self.away.__enter__()
        if (live.epoch, live.phase, live.step) == (2, "train", 8):
            self.line.heal()

    def event(self, kind, content=None):
        super().event(kind, content)
        if kind == "saved_again":
            self.back = self.loop.checkpoints.whole(), self.loop.state.best_checkpoint


@pytest.mark.parametrize("passes", [True, False])
def test_training_goes_on_while_its_store_is_away(passes, whole, reading, s3, tmp_path, monkeypatch):
    """For some minutes. Then the run ends, and continues to the same bits."""
    line = Line(s3("").rpartition("endpoint_override=")[2])
    place = f"s3://me:word@pets/{tmp_path.name}?scheme=http&endpoint_override={line.place}"
    monkeypatch.setattr(loop_module, "TRY_SECONDS", 0.01)
    monkeypatch.setattr(loop_module, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(loop_module, "PATIENCE_SECONDS", 1e9 if passes else 0.0)
    settings = {"checkpoint_every": "2", "tracking_uri": "http://127.0.0.1:9"}
    link = Outage(line)
    link.loop = loop = loop_of(place, "away", reading, link, **settings)
    with contextlib.nullcontext() if passes else pytest.raises(StorageAway):
        loop.train(lambda record: None)
    line.heal()
    ((reason, *more), told) = [c for k, c in link.events if k == "put_off"], [k for k, _ in link.events]
    assert (
        not more and reason.startswith(f"Cannot read s3://pets/{tmp_path.name}/away/") and "HTTP status 503;" in reason
    )
    if passes:
        there, best = link.back  # the first epoch's, which could not be written at its end
        assert best == f"step_{loop.plan.steps:08d}" and best in there and told.count("saved_again") == 1
    else:
        assert "saved_again" not in told
        (name, state), _ = loop.checkpoints.resume(loop.settings)
        assert state.step == 4
        loop = loop_of(place, "away", reading, WorkerLink(), name, **settings)
        assert loop.train(lambda record: None)
    assert loop.checkpoints.whole()[-1] == f"step_{2 * loop.plan.steps:08d}"
    assert list(map(same, loop.state.history)) == list(map(same, whole.state.history))
    for one, other in zip(whole.learner.model.weights, loop.learner.model.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    line.close()


def test_a_run_shows_once_what_its_network_will_see(reading, storage):
    loop = loop_of(storage, "varied", reading, WorkerLink(), augment=1.0)
    begin(loop)
    ((kind, told),) = loop.link.events
    assert kind == "augmented" and len(set(told["names"])) == len(told["images"]) == len(told["masks"]) == 16
    seen = set()
    for batch in loop.reader.train(1):
        images, masks = loop.learner.augmented(batch.images, batch.masks, batch.draws)
        for row in np.flatnonzero((batch.indices >= 0) & (batch.indices < 16)):
            index = int(batch.indices[row])
            assert np.array_equal(told["images"][index], images[row])
            assert np.array_equal(told["masks"][index], masks[row])
            seen.add(index)
    assert seen == set(range(16))
    loop.state.step = 1
    plain = loop_of(storage, "plain", reading, WorkerLink())
    for later in (loop, plain):
        begin(later)
        assert later.link.events in ([], [(kind, told)])


def check_told(loop: Loop, lives) -> None:
    """What the progress line hears: every step of the epochs and their validations, the loss and the speed so far."""
    scored = loop.reader.ingest.plan("val", 1).steps
    counts = {"train": loop.plan.steps, "val": scored}
    expected = [(e, kind, i + 1, n) for e in (1, 2) for kind, n in counts.items() for i in range(n)]
    assert [(live.epoch, live.phase, live.step, live.steps) for live in lives] == expected
    for epoch, record in enumerate(loop.state.history, 1):
        of_epoch = [live for live in lives if (live.epoch, live.phase) == (epoch, "train")]
        assert of_epoch[-1].loss == pytest.approx(record["train/loss"])
        assert of_epoch[-1].images_per_second == pytest.approx(record["speed/images_per_second"])
        for live in of_epoch[1:-1]:  # batches of four
            assert live.seconds_per_step * live.images_per_second == pytest.approx(4)
    assert not any(live.loss or live.seconds_per_step for live in lives if live.phase == "val")


def test_a_start_elsewhere_says_what_is_other_and_keeps_its_own(reading, storage):
    first = loop_of(storage, "moved", reading, WorkerLink("leave"))
    assert not first.train(lambda record: None)
    (name,) = first.checkpoints.whole()
    second = loop_of(storage, "moved", reading, WorkerLink(), name, precision="mixed_bfloat16", checkpoint_every="7m")
    assert second.link.events == [("changed", ["precision"])]
    assert second.state.equality == first.state.equality | {"precision": "mixed_bfloat16"}
    assert (first.state.settings["checkpoint_every"], second.state.settings["checkpoint_every"]) == ("10m", "7m")
    third = loop_of(storage, "moved", reading, WorkerLink(), name)
    assert third.link.events == [] and third.state.equality == first.state.equality


def test_scores_are_told_of_the_best_epoch_only(reading, storage):
    """They hold the confusion matrix, which grows with the classes squared."""
    loop = loop_of(storage, "told", reading, WorkerLink())
    loop.run_epoch()
    best = loop.state.validation
    loop.state.best_score = 2.0  # no later epoch is better
    loop.run_epoch()
    told = [content for kind, content in loop.link.events if kind == "epoch"]
    assert [content["record"]["epoch"] for content in told] == [1, 2]
    assert told[0]["validation"] == best and told[1]["validation"] is None and loop.state.validation == best


def test_a_run_that_is_longer_than_its_stream_goes_on_with_another(reading, storage):
    """A stream without a known end is made for so many epochs; the run does not end with it."""
    link = WorkerLink()
    one = replace(reading, epochs=1)
    first = loop_of(storage, "longer", one, link, epochs=3)
    assert not first.train(lambda record: None)
    assert link.events[-1] == ("left", first.plan.steps) and not first.is_done
    (name,) = first.checkpoints.whole()
    rest = loop_of(storage, "longer", replace(reading, epochs=3), WorkerLink(), name, epochs=3)
    assert rest.train(lambda record: None) and len(rest.state.history) == 3


def test_the_time_is_that_of_the_driver(ray_cluster, monkeypatch):
    """Of `--minutes` on nodes whose clocks differ."""
    link = start_link()
    worker = training_link.WorkerLink(link, "x")
    monkeypatch.setattr("unet.training.link.time", SimpleNamespace(time=lambda: time.time() + 600))
    assert worker.now() == pytest.approx(time.time(), abs=5)
    ray.kill(link)


def test_the_driver_link_keeps_no_event_that_was_fetched(ray_cluster):
    link = start_link()
    for number in range(3):
        ray.get(link.event.remote("epoch", number))

    def events(seen):
        return [content for _, content in ray.get(link.poll.remote(seen))[1]]

    assert events(0) == events(0) == [0, 1, 2]  # again where the answer was lost
    ray.get(link.event.remote("epoch", 3))
    assert events(3) == [3] and events(4) == [] and events(0) == []
    ray.get(link.event.remote("epoch", 4))
    assert events(4) == [4]


def test_a_batch_whose_numbers_are_not_finite_is_named_or_passed_over(reading, storage):
    names = Prepared(Folder(reading.folder)).names("train")
    stopped = loop_of(storage, "wild", reading, WorkerLink(), learning_rate=1e30)
    assert not stopped.train(lambda record: None)
    kind, content = stopped.link.events[-1]
    step = stopped.state.step + 1
    assert (kind, content["epoch"], content["step"]) == ("not_finite", 1, step) and 1 < step < stopped.plan.steps
    batch = list(stopped.reader.train(1, 0))[step - 1]
    assert content["samples"] == [names[i] for i in batch.indices]
    assert not_finite(content).startswith(f"The numbers stopped being finite at step {step} of epoch 1 (loss ")
    assert not_finite(content).endswith(f"The batch: {', '.join(content['samples'])}.")
    many = not_finite(content | {"samples": [f"s{i}" for i in range(10)]})
    assert many.endswith("The batch: s0, s1, s2, s3, s4, s5, s6, s7 and 2 more.")

    skipping = loop_of(storage, "skipping", reading, WorkerLink(), learning_rate=1e30, on_nan="skip")
    assert not skipping.train(lambda record: None)  # of the second epoch no step is finite, and that is its end
    (record,) = skipping.state.history
    assert record["train/skipped_steps"] == skipping.plan.steps - (step - 1) and record["train/loss"] > 0
    kind, content = skipping.link.events[-1]
    assert (kind, content["epoch"], content["step"]) == ("not_finite", 2, 2 * skipping.plan.steps)


def test_the_clock_saves_in_a_validation_too(reading, storage):
    """A validation that outlasts the interval does not put the epoch's steps at risk."""
    loop = loop_of(storage, "clocked", reading, WorkerLink(), checkpoint_every="10m")
    saved = []
    loop.checkpoints.save = lambda learner, state: saved.append((state.epoch, state.epoch_step))
    loop.checkpoints.prune = lambda keep: None
    evaluate = loop.learner.evaluate

    def slow(images, masks):
        loop.last_save -= 600
        return evaluate(images, masks)

    loop.learner.evaluate = slow
    loop.run_epoch()
    batches = loop.reader.ingest.plan("val", 1).steps
    assert saved == [(1, loop.plan.steps)] * batches + [(2, 0)]


def test_a_resume_on_another_device_says_so(reading, storage, monkeypatch):
    def told(checkpoint, **changes):
        link = WorkerLink()
        loop_of(storage, "on-another-device", reading, link, checkpoint, **changes)
        return [content for kind, content in link.events if kind == "changed"]

    first = loop_of(storage, "on-another-device", reading, WorkerLink())
    first._save()
    (name,) = first.checkpoints.whole()
    assert first.checkpoints.state(name).equality.items() >= {("device", "cpu"), ("op_determinism", False)}
    assert not told(name)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("unet.training.equality.device_name", lambda: "NVIDIA A10G 8.6")
        assert told(name) == [["device"]] and told(name, deterministic=True) == [["device", "op_determinism"]]


class Watcher(Display):
    """Has somebody press Ctrl-C when the workers are in the middle of a validation."""

    def __init__(self):
        super().__init__(quiet=True)
        self.stop_signal, self.seen = threading.Event(), None

    def progress(self, live, epochs, minutes=None):
        if live.phase == "val" and live.step < live.steps - 2:
            self.seen = self.seen or live
            self.stop_signal.set()


@pytest.mark.slow
def test_ctrl_c_in_a_long_validation_of_two_workers(ray_cluster, storage, tmp_path):
    """It is not waited for: both workers end in it, together, and the next start has the unbroken run's numbers."""
    data = Folder(tmp_path / "mostly-val")
    prepare("synthetic:1500", data, Recipe(64, val_fraction=0.9))
    settings = {"image_size": 64, "base_filters": 16, "epochs": 2, "num_workers": 2, "learning_rate": 0.001}
    whole = train(storage, data.path, run_name="scored-whole", **settings)
    opened, display = open_run(tiny_settings(storage, data.path, run_name="scored-later", **settings)), Watcher()
    stopped = driver.train(opened, display, stop_signal=display.stop_signal)
    assert display.seen and display.seen.epoch == 1 and stopped["status"] == "stopped"
    name, state = opened.checkpoints.latest()
    assert state.epoch == 1 and name == name_of(state.epoch_step) and not state.history
    finished = train(storage, data.path, run_name="scored-later", **settings)
    assert finished["val"] == whole["val"] and finished["test"] == whole["test"]
    last = opened.checkpoints.latest()[0]
    before, after = (weights_of(storage / run, last) for run in ("scored-whole", "scored-later"))
    assert all(np.array_equal(before[key], after[key]) for key in before)


class Watch:
    """A time that passes by a learner's work only; `time` of the loop."""

    def __init__(self, began):
        self.now = began

    def time(self):
        return self.now

    perf_counter = monotonic = process_time = time

    def slow(self, work, seconds):
        def slower(*args, **kwargs):
            self.now += seconds
            return work(*args, **kwargs)

        return slower


def timed_loop(patch, storage, name, reading, checkpoint=None, **changes) -> Loop:
    """Whose step takes a second and whose scored batch half of one, after ten seconds of starting."""
    changes = {"epochs": None, "schedule": "cosine", "ema_decay": 0.5} | changes
    loop = loop_of(storage, name, reading, WorkerLink(), checkpoint, **changes)
    watch = Watch(loop.job.began + 10)
    patch.setattr("unet.training.loop.time", watch)
    loop.link.now = watch.time
    loop.learner.train_step = watch.slow(loop.learner.train_step, 1.0)
    loop.learner.evaluate = watch.slow(loop.learner.evaluate, 0.5)
    loop.last_save = watch.now
    return loop


def test_a_run_of_minutes_ends_with_its_time_and_a_stop_does_not_begin_it_anew(reading, storage, monkeypatch):
    """It is cut short in an epoch, which is validated and counts; the rate falls to the end."""
    reading = replace(reading, epochs=None)
    val, test = (-(-reading.samples[split] // 4) for split in ("val", "test"))
    minutes = 1.5
    loop = timed_loop(monkeypatch, storage, "timed", reading, minutes=minutes)
    assert loop.train(lambda record: None) and loop.is_done
    spent = 60 * minutes - FINISH_SECONDS - test / 2
    assert spent - 3 <= loop.elapsed <= spent
    *whole, last = loop.state.history
    n = loop.plan.steps
    assert [record["step"] for record in whole] == [n * (i + 1) for i in range(len(whole))]
    assert whole and loop.state.step == last["step"] == loop.state.planned_steps and last["step"] % n
    assert last["step"] == pytest.approx(spent - 10 - (len(whole) + 1) * val / 2, abs=3)
    rates = [record["train/learning_rate"] for record in loop.state.history]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.01 * loop.settings.optimizer.learning_rate
    assert loop.checkpoints.state(loop.state.chosen).best_epoch == loop.state.best_epoch
    lives = [live for live in loop.link.lives if live.phase == "train"]
    assert lives[-1].elapsed == pytest.approx(loop.elapsed - val / 2)

    first = timed_loop(monkeypatch, storage, "timed-in-two", reading, minutes=minutes)
    assert first.run_epoch()
    first.link.stop_signal = "leave"  # after the next step
    assert not first.train(lambda record: None)
    name, left = first.checkpoints.latest()
    assert left.planned_steps and left.seconds == pytest.approx(10 + n + val / 2 + 1)
    second = timed_loop(monkeypatch, storage, "timed-in-two", reading, name, minutes=minutes)
    assert second.state.planned_steps == left.planned_steps and second.elapsed == pytest.approx(left.seconds + 10)
    assert second.train(lambda record: None) and spent - 3 <= second.elapsed <= spent
    assert second.state.step == pytest.approx(loop.state.step - 10, abs=3)  # ten seconds went to the second start

    longer = {"minutes": 2 * minutes, "learner": second.learner}
    more = timed_loop(monkeypatch, storage, "timed-in-two", reading, name_of(second.state.step), **longer)
    assert not more.is_done and more.state.planned_steps == 2 * second.state.step
    ((kind, sentence),) = more.link.events
    assert kind == "rate" and sentence.endswith("as in a run of 3 minutes.")


def test_a_run_that_is_too_short_for_an_epoch_is_scored_all_the_same(reading, storage, monkeypatch):
    loop = timed_loop(monkeypatch, storage, "short", replace(reading, epochs=None), minutes=0.2)
    assert loop.train(lambda record: None)
    (record,) = loop.state.history
    assert record["step"] == 1 and loop.state.chosen == name_of(1)
