"""One trial of a sweep: a training as `jobs/train.py` does it, an epoch at a time.

Trials of one worker run in warm processes: TensorFlow is imported once, a traced step serves every trial it was
traced for, and the data are mapped from the object store. Trials of several workers go through Ray Train.

Why: docs/decisions.md#trials-in-warm-processes-an-epoch-a-step
"""

import contextlib
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import psutil
import ray
from ray import tune

from unet.classes import Classes
from unet.cluster.devices import start_tensorflow
from unet.config import TrainSettings, parse_interval, unflat
from unet.data.ingest import Ingest, shards
from unet.errors import Diverged, NoGpu
from unet.metric_names import BEST, SCORE
from unet.models.start import Known, Start, start_of
from unet.progress import Live
from unet.recipe.recipe import Recipe, traced_key
from unet.runs.checkpoint import FILES, Checkpoints
from unet.runs.run import Run
from unet.storage import Folder
from unet.supervise.preflight import open_run
from unet.training.job import Job
from unet.training.link import WorkerLink, not_finite
from unet.training.loop import Loop
from unet.tuning.watch import Watch

if TYPE_CHECKING:
    from unet.recipe.step import Learner


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common.

    Attributes:
        base: flat settings of a training, without what the space draws.
        folder: URI of the sweep's folder, where the trials' runs are.
        reading: the data, read once and kept; each trial sets its own batch, seed and start.
        threads: TensorFlow threads of a trial of one worker.
        use_gpu: whether it was given a GPU.
        data_digest: of the prepared data.
        classes: of the prepared data.
        link: handle of the sweep's `DriverLink`.
        together: how many trials at a time the cluster was planned for.
        known: an object of Ray, what the trials know at their beginning (`Known`); None: nothing.
    """

    base: dict
    folder: str
    reading: Ingest
    threads: int
    use_gpu: bool
    data_digest: str
    classes: Classes
    link: ray.actor.ActorHandle
    together: int
    known: ray.ObjectRef | None

    def settings(self, trial: str, draw: dict) -> TrainSettings:
        return unflat(TrainSettings, self.base | draw | {"run_name": trial})

    def knowledge(self) -> Known | None:
        """What the trials know at their beginning."""
        return ray.get(self.known) if self.known else None

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Reports to the sweep what no trial can recover from."""
        try:
            yield
        except NoGpu as error:
            ray.get(self.link.event.remote("no_gpu", str(error)))
            raise


class WarmTrial(tune.Trainable):
    """A trial of one worker in a process that outlives it."""

    def setup(self, config: dict, shared: Shared) -> None:  # type: ignore[override]  # `tune.with_parameters` adds it
        self._shared = shared
        self._learners: Learners | None = None
        self._loop: Loop | None = None
        self._watch = Watch(parse_interval(shared.base["step_timeout"])[1])
        with shared.reporting():
            start_tensorflow(shared.threads, shared.use_gpu, shared.base["deterministic"])

    def reset_config(self, config: dict) -> bool:
        # The trial begins with its first task, which Tune tries again after a failure, unlike this one.
        self._loop = None
        return True

    def _begin(self) -> Loop:
        """Open the trial's run, or continue it at its latest checkpoint."""
        if self._loop is not None:
            return self._loop
        shared, name = self._shared, self.trial_name  # Tune's name stays when PBT copies another's config
        settings = shared.settings(name, self.config["draw"])
        self._run = Run.load(name, settings)
        known = shared.knowledge()
        lessons = {"lessons": [*known.lessons]} if known else {}
        self._run.start(data_digest=shared.data_digest, prepared=shared.base["data"], **lessons)
        self._link = _TrialLink(shared.link, self._run.folder.uri)
        self._link.moved = self._watch.moved
        self._learners = self._learners or Learners()
        recipe, names = settings.recipe(len(shared.classes)), [c.name for c in shared.classes]
        learner = self._learners.get(recipe, lambda: start_of(known, recipe, names))
        latest, _ = self._run.checkpoints.resume(settings)
        training = settings.training
        reading = replace(
            shared.reading,
            batch_size=training.batch_size,
            seed=training.seed,
            start=(latest[1].epoch, latest[1].epoch_step) if latest else (1, 0),
            window=latest[1].window if latest else None,
        )
        job = Job(
            settings=settings,
            public_settings=self._run.public_settings(),
            run=self._run.folder.uri,
            threads=shared.threads,
            use_gpu=shared.use_gpu,
            data_digest=shared.data_digest,
            classes=shared.classes,
            checkpoint=latest and latest[0],
            fencing_token=None,
            link=shared.link,
            score_test=False,
        )
        self._loop = Loop(job, learner, shards(reading, 1)[0].reader(), self._link, 0, 1)
        self._run.write_history(self._loop.state.history)
        return self._loop

    def step(self) -> dict:
        """An epoch; its record with `done`, and `training_seconds` and memory of this process."""
        with self._watch.working():
            return self._epoch()

    def _epoch(self) -> dict:
        loop, link = self._begin(), self._link
        before = loop.seconds
        # It may be done: a kill can come between its last checkpoint and the report of it.
        record = None if loop.is_done else loop.run_epoch()
        state = loop.state
        self._run.write_history(state.history)
        best: dict = {"best_epoch": state.best_epoch, "val": state.validation}
        best["best_checkpoint"] = state.best_checkpoint and f"checkpoints/{state.best_checkpoint}"
        status = "failed" if link.diverged else "finished" if loop.is_done else "running"
        self._run.write_summary(status=status, reason=link.diverged, **best)
        result = state.history[-1] if state.history else {SCORE: 0.0, BEST: 0.0, "epoch": 0}
        if link.diverged:  # the worst score
            result = {SCORE: 0.0, BEST: 0.0, "epoch": state.epoch, "diverged": True}
        facts = {"training_seconds": loop.seconds - before, "memory_mb": psutil.Process().memory_info().rss / 1e6}
        facts["stopped"] = record is None and not loop.is_done and not link.diverged
        return result | facts | {"done": loop.is_done or bool(link.diverged)}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """For PBT: this trial's latest checkpoint, which another may take over."""
        self._begin()
        own = self._run.checkpoints
        latest = own.latest()
        assert latest is not None  # it has trained an epoch, whose end is saved
        name, _ = latest
        files: dict = {file: own.folder.read_committed(name, file) for file in FILES}
        Checkpoints(Folder(checkpoint_dir)).folder.commit(name, files)

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]  # what `save_checkpoint` was given
        """Take over weights and optimizer; the trial keeps its own epoch, best score and history."""
        loop = self._begin()
        donated, own = Checkpoints(Folder(checkpoint_dir)), loop.state
        latest = donated.latest()
        assert latest is not None  # `save_checkpoint` wrote one there
        name, state = latest
        gift = f"{state.settings['run_name']}/{name}"
        # Its own state was restored when it began, and what it took before is part of that: Tune may give it again.
        if state.settings["run_name"] != self._run.name and gift != own.taken_over:
            donated.load(name, loop.learner)
            own.taken_over = gift


class _TrialLink(WorkerLink):
    """The loop's link: its progress goes to the sweep, its events stay here."""

    diverged: str | None = None
    moved: Callable[[], None]

    def live(self, live: Live) -> None:
        self.moved()
        super().live(live)

    def event(self, kind: str, content=None) -> None:
        if kind == "not_finite":
            self.diverged = not_finite(content)


class Learners:
    """Learners with their traced graphs, the latest few of a process."""

    KEPT = 3

    def __init__(self):
        self._kept: OrderedDict[str, Learner] = OrderedDict()

    def get(self, recipe: Recipe, start: Callable[[], Start | None] = lambda: None) -> "Learner":
        """A learner at the start of a training by this recipe: equal, bit for bit, to a new one.

        `start` gives what such a training begins with.
        """
        import keras

        from unet.recipe.step import Learner

        key = traced_key(recipe)
        if key in self._kept:
            learner = self._kept.pop(key)
            learner.restart(recipe)
        else:
            while len(self._kept) >= self.KEPT:
                self._kept.popitem(last=False)
                gc.collect()  # graphs and models refer to each other in circles
                keras.utils.clear_session()
            begin = start()
            learner = Learner(recipe, start=begin.weights if begin else None)
        self._kept[key] = learner
        return learner


def group_trial(config: dict, shared: Shared) -> None:
    """A trial of several workers, in a process of Tune that only waits for them."""
    from ray.tune.integration.ray_train import TuneReportCallback

    from unet.cluster.session import ray_session
    from unet.supervise.driver import train

    settings = shared.settings(tune.get_context().get_trial_name(), config["draw"])
    run = open_run(settings, tracked=False)
    with ray_session():
        try:
            with shared.reporting():
                train(
                    run,
                    callbacks=(TuneReportCallback(),),
                    as_trial=True,
                    together=shared.together,
                    known=shared.knowledge(),
                )
        except Diverged as error:
            run.write_summary(reason=str(error))
            latest = run.checkpoints.latest()
            epoch = len(latest[1].history) + 1 if latest else 1
            tune.report({SCORE: 0.0, BEST: 0.0, "epoch": epoch, "diverged": True})
