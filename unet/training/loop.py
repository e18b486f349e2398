"""The training loop of one worker: restore, then epochs of steps, each followed by validation.

All workers run this; what one of them decides (stopping, leaving, saving by the clock) is decided on rank 0 and
travels with the sum of a step or with a batch of validation, so nobody waits for another for ever.

Why: docs/decisions.md#control-travels-with-the-step
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from unet import metric_names
from unet.config import CONFIG, FENCING_TOKEN, parse_interval
from unet.data.ingest import Batch, Reader
from unet.data.shards import opened
from unet.errors import StorageAway, StorageFailed
from unet.progress import Clock, Live
from unet.recipe.schedule import Horizon
from unet.remote import PATIENCE_SECONDS, patience
from unet.runs.checkpoint import Checkpoints
from unet.runs.state import State, name_of
from unet.storage import Folder, reported
from unet.training.equality import equality_of
from unet.training.job import Job
from unet.training.link import WorkerLink
from unet.training.plan import Pace, capped, change_of_rate, has_ended, horizon, planned_steps
from unet.training.scoring import score

if TYPE_CHECKING:
    from unet.recipe.step import Learner, StepResult

SAVE, STOP, LEAVE, ESTIMATE = 1, 2, 4, 8
ENDS = {STOP: "stopped", LEAVE: "left"}
WRITTEN, PUT_OFF, FAILED = 0, 1, 2
TRY_SECONDS, AGAIN_SECONDS = 5.0, 30.0
"""How long training waits for an object store that is away, and how long it then goes on before it tries again."""


class FirstCannotWrite(StorageFailed):
    """On every worker but the first, which says why."""


class _Ended(Exception):
    """The run is to end in the middle of a validation."""


@dataclass
class Loop:
    """The loop of one worker and its state, restored from the job's checkpoint."""

    job: Job
    learner: "Learner"
    reader: Reader
    link: WorkerLink
    rank: int
    world_size: int
    state: State = field(init=False)
    last_save: float = field(init=False)
    away: float | None = None
    """Since when the object store cannot be written to, by the monotonic clock; rank 0 knows."""
    traced: set[bool] = field(default_factory=set)
    """Of which kinds there were steps: with what comes before the decoder frozen, and without."""
    seconds: float = 0.0
    """Spent training and validating, without the first step, which traces the graph, and without saving."""

    def __post_init__(self):
        self.settings = self.job.settings
        self.plan = self.reader.ingest.plan("train", self.world_size)
        self.checkpoints = Checkpoints(Folder(self.job.run))
        every = self.settings.run.checkpoint_every
        self.interval = parse_interval(every) if every else ("never", math.inf)
        self._restore()
        self.pace = self._pace()
        self.last_save = time.monotonic()

    def _restore(self) -> None:
        job = self.job
        equality = equality_of(self.settings, self.world_size, job.threads)
        if job.checkpoint is None:
            seed, window = self.settings.training.seed, self.reader.ingest.chunks_of_window
            self.state = State(
                seed, job.data_digest, job.public_settings, equality, classes=list(job.classes), window=window
            )
            self.state.planned_steps = planned_steps(self.settings, self.state, self.plan.steps)
            self.learner.synchronise()
        else:
            self.state = self.checkpoints.state(job.checkpoint)
            self.checkpoints.load(job.checkpoint, self.learner)
            self.state.score = None  # of that step only
            planned = planned_steps(self.settings, self.state, self.plan.steps)
            change = change_of_rate(self.settings, self.state, planned, self.plan.steps)
            self.state.planned_steps = planned
            changed = [key for key, value in equality.items() if self.state.equality.get(key) != value]
            self.state.equality, self.state.settings = equality, job.public_settings
            if changed and not self.is_done:
                self.link.event("changed", changed)
            if change and not self.is_done:
                self.link.event("rate", change)
        self._before = self.state.seconds

    def _pace(self) -> Pace | None:
        """What the length of the run is estimated by; None where its epochs are the length."""
        minutes, ingest = self.settings.length.minutes, self.reader.ingest
        if minutes is None:
            return None
        test = ingest.plan("test", self.world_size).steps if self.job.score_test else 0
        frozen = self.settings.optimizer.frozen_epochs * self.plan.steps
        return Pace(60 * minutes, self.plan.steps, ingest.plan("val", self.world_size).steps, test, frozen)

    @property
    def elapsed(self) -> float:
        """Seconds of this run, over all its starts."""
        return self._before + max(0.0, self.link.now() - self.job.began)

    @property
    def horizon(self) -> Horizon:
        """What the learning rate goes by now."""
        return horizon(self.settings, self.state.planned_steps, self.plan.steps)

    def train(self, report: Callable[[dict], None]) -> bool:
        """Train to the last epoch, reporting each; False if the run was stopped or failed on the way."""
        streamed = self.reader.ingest.epochs
        while not self.is_done:
            if streamed is not None and self.state.epoch > streamed:  # so long that another stream is to be made
                self.link.event(ENDS[LEAVE], self.state.step)
                return False
            record = self.run_epoch()
            if record is None:
                return False
            report(record)
        return True

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to train."""
        return has_ended(self.settings, self.state, self.state.planned_steps)

    @property
    def _is_cut(self) -> bool:
        """Whether the run has its steps, and the epoch under way has some of them."""
        planned = self.state.planned_steps
        return planned is not None and self.state.step >= planned and 0 < self.state.epoch_step < self.plan.steps

    def run_epoch(self) -> dict | None:
        """What is left of the epoch under way, its validation and its checkpoint.

        Returns:
            Its line of `metrics.jsonl`; None if the run was stopped or failed on the way.
        """
        clock = Clock()
        trained = self._train_epoch(clock)
        self.seconds += clock.waiting + clock.stepping
        if not trained:
            return None
        self.learner.trace_evaluation()  # its time is none of a validation's, of which there will be more
        began = time.perf_counter()
        validation = self._validate()
        seconds = time.perf_counter() - began
        self.seconds += seconds
        if validation is None:
            return None
        if self.pace:
            self.pace.validated(seconds)
        self._finish_epoch(clock, validation)
        return self.state.history[-1]

    def _train_epoch(self, clock: Clock) -> bool:
        """The steps that are left of the epoch; False if the run is to end here."""
        state, waited = self.state, time.perf_counter()
        if self._is_cut:
            return True
        for batch in self.reader.train(state.epoch, state.epoch_step):
            is_frozen = self.settings.optimizer.is_frozen(state.step + 1, self.horizon)
            began = time.perf_counter()
            result = self.learner.train_step(
                batch.images,
                batch.masks,
                state.step + 1,
                self._control() | self._asks(),
                self.horizon,
                batch.draws,
            )
            ended = time.perf_counter()
            if not result.finite and not self._pass_over(batch, result):
                return False
            state.step, state.epoch_step = state.step + 1, state.epoch_step + 1
            state.learning_rate = result.learning_rate
            if result.finite:
                state.add_losses(result.loss_sums)
            images = min(self.plan.batch_size, self.plan.samples - batch.step * self.plan.batch_size)
            if is_frozen in self.traced:  # the first step of its kind traces the graph
                clock.add(images, began - waited, ended - began)
                if self.pace:
                    self.pace.stepped(ended - waited, is_frozen)
            elif not self.traced:
                self.link.event("first_step", self.link.now())
            self.traced.add(is_frozen)
            if result.control & ESTIMATE:
                self._estimate()
            self._report(clock, "train", batch.step + 1, self.plan.steps)
            if self._ends(result.control):
                return False
            # Not at the epoch's last step: its validation follows, and the epoch's own checkpoint.
            if self._is_due(result.control) and state.epoch_step < self.plan.steps:
                self._save(may_wait=True)
            if self._is_cut:
                break
            waited = time.perf_counter()
        return True

    def _validate(self) -> dict | None:
        """The scores on the validation split; None if the run is to end before all of it is scored.

        What is saved on the way is the epoch's last step: whoever continues there begins with the validation.
        """

        def handle(batch: Batch) -> None:
            control = int(self.learner.sum_over_workers(np.array([self._control()], np.int64))[0])
            if self._ends(control):
                raise _Ended
            if control & SAVE:
                self._save(may_wait=True)

        try:
            return self.evaluate("val", self.reader.validation(self.state.epoch, self._is_cut), handle)
        except _Ended:
            return None

    def _ends(self, control: int) -> bool:
        """Whether the workers are to end here; then a checkpoint is written, and that is said."""
        end = control & (STOP | LEAVE)
        if end:
            self._save()
            self.link.event(ENDS[end], self.state.step)
        return bool(end)

    def _control(self) -> int:
        """Rank 0's decisions, which reach all workers with the sum of the step, or over a batch of validation."""
        if self.rank:
            return 0
        unit, interval = self.interval
        since = time.monotonic() - self.last_save
        due = (unit == "seconds" and since >= interval) or (self.away is not None and since >= AGAIN_SECONDS)
        return SAVE * due + {None: 0, "stop": STOP, "leave": LEAVE}[self.link.request]

    def _asks(self) -> int:
        """Whether rank 0 is to estimate the length of the run after the step that comes, which all workers are told."""
        return ESTIMATE * bool(self.pace and self.rank == 0 and self.pace.is_due(self.elapsed))

    def _estimate(self) -> None:
        """Let all workers plan with the number of steps that rank 0 expects."""
        planned = self.pace.planned(self.state, self.elapsed) if self.pace and self.rank == 0 else None
        planned = capped(self.settings, planned or 0, self.plan.steps)
        self.state.planned_steps = int(self.learner.sum_over_workers(np.array([planned], np.int64))[0]) or None

    def _is_due(self, control: int) -> bool:
        unit, interval = self.interval
        return bool(control & SAVE) or (unit == "steps" and self.state.step % interval == 0)

    def _pass_over(self, batch: Batch, result: "StepResult") -> bool:
        """After a step whose numbers were not finite (nothing was updated): whether to go on."""
        hopeless = (
            batch.step + 1 == self.plan.steps and not self.state.loss_sums
        )  # not one step of the epoch was finite
        if result.overflowed or (self.settings.training.on_nan == "skip" and not hopeless):
            self.state.skipped_steps += 1
            return True
        if self.rank:
            return False
        order, size = self.reader.ingest.order("train", batch.epoch), self.plan.batch_size
        places = order[batch.step * size : (batch.step + 1) * size].tolist()
        samples = opened(self.reader.ingest.folder).names_at("train", places)
        content = {"epoch": batch.epoch, "step": self.state.step + 1, "grad_norm": result.grad_norm}
        self.link.event("not_finite", content | {"loss": result.loss, "samples": samples})
        return False

    def _finish_epoch(self, clock: Clock, validation: dict) -> None:
        state = self.state
        record = {
            "epoch": state.epoch,
            "step": state.step,
            "time": int(time.time() * 1000),
            metric_names.TRAIN_LOSS: self.learner.loss.mean_of(state.loss_sums) if state.loss_sums else None,
            metric_names.LEARNING_RATE: state.learning_rate,
            metric_names.SPEED: clock.images_per_second,
            metric_names.DATA_WAIT: clock.data_wait_fraction,
            **metric_names.of("val", validation),
        }
        score = validation["mean_iou"]
        if state.best_score is None:
            state.validation = validation
        if score is not None and (state.best_score is None or score > state.best_score):
            state.best_score, state.best_epoch, state.best_checkpoint = score, state.epoch, name_of(state.step)
            state.stale_epochs, state.validation = 0, validation
        elif score is not None:  # else there is nothing that patience could go by
            state.stale_epochs += 1
        record |= {metric_names.BEST: state.best_score, metric_names.BEST_EPOCH: state.best_epoch}
        record |= {metric_names.SKIPPED_STEPS: state.skipped_steps} if state.skipped_steps else {}
        state.history.append({k: v for k, v in record.items() if v is not None and math.isfinite(v)})
        state.score = score
        state.epoch, state.epoch_step, state.loss_sums = state.epoch + 1, 0, []
        if self.pace and not self.is_done:
            self._estimate()
        self._save(may_wait=not self.is_done)
        state.score = None
        is_kept = state.validation is validation  # else those of the best were told: they hold the confusion matrix
        self.link.event("epoch", {"record": state.history[-1], "validation": validation if is_kept else None})

    def _save(self, may_wait: bool = False) -> None:
        """Write a checkpoint. One that `may_wait` is put off while its object store is away, for some minutes.

        Raises:
            StorageFailed: it could not be written; on all workers alike, so that none waits for one that gave up.
        """
        began, self.state.seconds = time.perf_counter(), self.elapsed
        may_wait = may_wait and self.job.score_test  # a trial's epochs are compared, and taken over by others
        with patience(TRY_SECONDS if may_wait else None, check=self._show_fencing_token):
            failure = self._write() if self.rank == 0 else None
        outcome = self._outcome(failure, may_wait) if self.rank == 0 else WRITTEN
        outcome = int(self.learner.sum_over_workers(np.array([outcome], np.int64))[0])
        if outcome == FAILED:
            raise failure or FirstCannotWrite
        self.last_save = time.monotonic()
        if self.pace and outcome == WRITTEN:
            self.pace.saving = time.perf_counter() - began

    def _outcome(self, failure: StorageFailed | None, may_wait: bool) -> int:
        """What follows from how rank 0's writing ended, which the driver is told."""
        now, was_away = time.monotonic(), self.away
        if failure is None:
            self.away = None
            if was_away is not None:
                self.link.event("saved_again", self.state.step)
            return WRITTEN
        if not (may_wait and isinstance(failure, StorageAway)) or now - (was_away or now) > PATIENCE_SECONDS:
            return FAILED
        if was_away is None:
            self.away = now
            self.link.event("put_off", str(failure))
        return PUT_OFF

    def _write(self) -> StorageFailed | None:
        """Save and prune; what the storage says if it cannot be done."""

        def write() -> None:
            with reported(self.checkpoints.folder, "use"):
                self._show_fencing_token()
                self.checkpoints.save(self.learner, self.state)
                self.checkpoints.prune(self.settings.run.keep_checkpoints)

        try:
            self.checkpoints.folder.persistently(write)
        except StorageFailed as error:
            return error
        return None

    def _show_fencing_token(self) -> None:
        """Workers outlive a killed driver by a second or two: where others have taken over they write nothing."""
        run = self.checkpoints.run
        if not self.job.fencing_token:
            return
        try:
            token = run.read_text(FENCING_TOKEN)
        except FileNotFoundError:
            run.require(CONFIG)
            raise
        if token != self.job.fencing_token:
            raise RuntimeError("other workers have taken over the run")

    def evaluate(
        self, split: str, batches: Iterable[Batch], handle: Callable[[Batch], None] = lambda batch: None
    ) -> dict:
        """The scores on a split; `handle` is called after each of its batches."""
        plan = self.reader.ingest.plan(split, self.world_size)

        def done(batch: Batch) -> None:
            self._report(Clock(), split, batch.step + 1, plan.steps)
            handle(batch)

        return score(self.learner, batches, plan.samples, [c.name for c in self.job.classes], done)

    def _report(self, clock: Clock, phase: str, step: int, steps: int) -> None:
        state = self.state
        seconds = (clock.waiting + clock.stepping) / clock.steps if clock.steps else None
        loss = self.learner.loss.mean_of(state.loss_sums) if state.loss_sums and phase == "train" else None
        self.link.live(
            Live(
                *(state.epoch, step, steps, phase, loss, clock.images_per_second, clock.data_wait_fraction, seconds),
                self.elapsed if self.pace else None,
            )
        )
