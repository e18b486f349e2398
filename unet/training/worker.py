"""The training loop of one worker: restore, then epochs of steps, each followed by validation, then the test.

All workers run this; what one of them decides (stopping, saving by the clock) is decided on rank 0 and travels
with the step's sum, so nobody waits for another for ever.
"""

import math
import os
import platform
import time
from dataclasses import dataclass, field

import numpy as np
import ray

from unet import metrics
from unet.config import TrainSettings, parse_interval
from unet.data.ingest import Batch
from unet.data.shards import Prepared, pixels
from unet.evaluation import score
from unet.storage import Folder
from unet.training.checkpoint import Checkpoints, State, name_of
from unet.training.monitor import Line, Live

STOP, SAVE = 1, 2
GALLERY = 8
"""How many validation photos are shown with their masks."""


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker.

    Attributes:
        settings: of the run.
        shown: the same, flat, without passwords: what may be written down.
        run: URI of the run's folder.
        threads: TensorFlow threads of this worker.
        data_digest: of the prepared data.
        monitor: handle of the `Monitor`.
        score_test: whether the run ends with the test split (a trial of a sweep does not).
    """

    settings: TrainSettings
    shown: dict
    run: str
    threads: int
    data_digest: str
    monitor: ray.actor.ActorHandle
    score_test: bool = True


def train_worker(config: dict) -> None:
    """Run the job of `config["job"]` on this worker of Ray Train."""
    job: Job = config["job"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    line = Line(job.monitor, rank)
    line.event("start", world_size)
    strategy = _start_tensorflow(job.threads, world_size)

    from unet.training.learner import Learner  # imports TensorFlow, whose threads are set now

    learner = Learner(job.settings, rank, world_size, strategy)
    reader = ray.train.get_dataset_shard("train").reader()
    run = _Run(job, learner, reader, line, rank, world_size)
    if run.train() and job.score_test:
        run.test()


def _start_tensorflow(threads: int, world_size: int):
    """Import TensorFlow with its threads set, and join the other workers; None if there are none."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    return tf.distribute.MultiWorkerMirroredStrategy() if world_size > 1 else None


@dataclass
class _Clock:
    """Where the time of an epoch's training goes. Validation has no part in it."""

    images: int = 0
    waiting: float = 0.0
    stepping: float = 0.0
    steps: int = 0

    def add(self, images: int, waiting: float, stepping: float) -> None:
        self.steps, self.images = self.steps + 1, self.images + images
        self.waiting, self.stepping = self.waiting + waiting, self.stepping + stepping

    @property
    def images_per_second(self) -> float | None:
        return self.images / (self.waiting + self.stepping) if self.images else None

    @property
    def data_wait_fraction(self) -> float | None:
        return self.waiting / (self.waiting + self.stepping) if self.images else None


@dataclass
class _Run:
    """The loop and its state."""

    job: Job
    learner: object
    reader: object
    line: Line
    rank: int
    world_size: int
    state: State = field(init=False)
    last_save: float = field(init=False)
    stepped: bool = False

    def __post_init__(self):
        self.settings = self.job.settings
        self.plan = self.reader.ingest.plan("train", self.world_size)
        self.checkpoints = Checkpoints(Folder(self.job.run))
        every = self.settings.run.checkpoint_every
        self.interval = parse_interval(every) if every else None
        self._restore()
        self.last_save = time.monotonic()

    def _restore(self) -> None:
        equality = self._equality()
        latest = self.checkpoints.latest()
        if latest is None:
            self.state = State(self.settings.training.seed, self.job.data_digest, self.job.shown, equality)
        else:
            name, self.state = latest
            self.checkpoints.load(name, self.learner)
            changed = [key for key, value in equality.items() if self.state.equality.get(key) != value]
            self.state.equality, self.state.settings = equality, self.job.shown
            self.line.event("resumed", {"history": self.state.history, "changed": changed})
        self.learner.synchronise()

    def _equality(self) -> dict:
        import keras
        import tensorflow as tf

        return {
            "num_workers": self.world_size,
            "threads": self.job.threads,
            "precision": self.settings.training.precision,
            "processor": _processor(),
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        }

    def train(self) -> bool:
        """Train to the last epoch; False if the run was stopped or failed on the way."""
        state = self.state
        while state.epoch <= self.settings.training.epochs and not self._is_stale():
            clock = _Clock()
            if not self._train_epoch(clock):
                return False
            self._finish_epoch(clock, self.evaluate("val", self.reader.validation(state.epoch)))
        return True

    def _is_stale(self) -> bool:
        patience = self.settings.training.patience
        return patience is not None and self.state.stale_epochs >= patience

    def _train_epoch(self, clock: _Clock) -> bool:
        """The steps that are left of the epoch; False if the run is to end here."""
        state, waited = self.state, time.perf_counter()
        for batch in self.reader.train(state.epoch, state.epoch_step):
            began = time.perf_counter()
            result = self.learner.train_step(batch.images, batch.masks, state.step + 1, self._control())
            ended = time.perf_counter()
            if not result.finite and not self._pass_over(batch, result):
                return False
            state.step, state.epoch_step = state.step + 1, state.epoch_step + 1
            if result.finite:
                state.loss_sum, state.pixels = state.loss_sum + result.loss_sum, state.pixels + result.pixels
            images = min(self.plan.batch_size, self.plan.samples - batch.step * self.plan.batch_size)
            if self.stepped:  # the first step of all traces the graph
                clock.add(images, began - waited, ended - began)
            else:
                self.line.event("first_step", time.time())
                self.stepped = True
            self._tell(clock, "train", batch.step + 1, self.plan.steps)
            if result.control & STOP:
                self._save()
                self.line.event("stopped", state.step)
                return False
            # Not at the epoch's last step: its validation follows, and the epoch's own checkpoint.
            if self._is_due(result.control) and state.epoch_step < self.plan.steps:
                self._save()
            waited = time.perf_counter()
        return True

    def _control(self) -> int:
        """Rank 0's decisions, which reach all workers with the sum of the step."""
        if self.rank:
            return 0
        by_clock = self.interval and self.interval[0] == "seconds"
        due = by_clock and time.monotonic() - self.last_save >= self.interval[1]
        return STOP * self.line.stop_wished + SAVE * bool(due)

    def _is_due(self, control: int) -> bool:
        by_steps = self.interval and self.interval[0] == "steps" and self.state.step % self.interval[1] == 0
        return bool(by_steps or control & SAVE)

    def _pass_over(self, batch: Batch, result) -> bool:
        """After a step whose numbers were not finite (nothing was updated): whether to go on."""
        # In float16 an overflow only means that the loss scale was too large, unless it cannot shrink further.
        scale = float(self.learner.loss_scale.numpy())
        expected = self.learner.scales_loss and scale > 1.0
        if expected or self.settings.training.on_nan == "skip":
            self.state.skipped_steps += 1
            return True
        prepared = Prepared(Folder(self.reader.ingest.folder))
        order = self.reader.ingest.order("train", batch.epoch)
        size = self.plan.batch_size
        names = prepared.names("train")
        samples = [names[i] for i in order[batch.step * size : (batch.step + 1) * size]]
        content = {"epoch": batch.epoch, "step": self.state.step + 1, "grad_norm": result.grad_norm}
        self.line.event("not_finite", content | {"loss_sum": result.loss_sum, "samples": samples})
        return False

    def _finish_epoch(self, clock: _Clock, validation: dict) -> None:
        state = self.state
        record = {
            "epoch": state.epoch,
            "step": state.step,
            "time": int(time.time() * 1000),
            "train_loss": state.loss_sum / state.pixels if state.pixels else None,
            "learning_rate": self.settings.training.learning_rate,
            "images_per_second": clock.images_per_second,
            "data_wait_fraction": clock.data_wait_fraction,
            **metrics.flat("val", validation),
        }
        score = validation["mean_iou"]
        if score is not None and (state.best_score is None or score > state.best_score):
            state.best_score, state.best_epoch, state.best_checkpoint = score, state.epoch, name_of(state.step)
            state.stale_epochs, state.validation = 0, validation
        else:
            state.stale_epochs += 1
        record |= {"best_val_mean_iou": state.best_score, "best_epoch": state.best_epoch}
        state.history.append({k: v for k, v in record.items() if v is not None and math.isfinite(v)})
        state.score = score
        state.epoch, state.epoch_step, state.loss_sum, state.pixels = state.epoch + 1, 0, 0.0, 0.0
        self._save()
        state.score = None
        self.line.event("epoch", {"record": state.history[-1], "validation": state.validation})
        ray.train.report(state.history[-1])

    def _save(self) -> None:
        if self.rank == 0:
            self.checkpoints.save(self.learner, self.state)
            self.checkpoints.prune(self.settings.run.keep_checkpoints)
        self.last_save = time.monotonic()

    def evaluate(self, split: str, batches) -> dict:
        plan = self.reader.ingest.plan(split, self.world_size)
        tell = lambda batch: self._tell(_Clock(), split, batch.step + 1, plan.steps)  # noqa: E731
        return score(self.learner, batches, plan.samples, tell)

    def test(self) -> None:
        """Score the test split once, with the best weights, and show what they do on validation photos."""
        self.checkpoints.load_weights(self.state.best_checkpoint or self.checkpoints.whole()[-1], self.learner.model)
        result = self.evaluate("test", self.reader.direct("test"))
        if self.rank == 0:
            self.line.event("test", result)
            self.line.event("gallery", self._gallery())

    def _gallery(self) -> dict:
        """Photos of validation with their truth and what the model says: names and uint8 arrays."""
        ingest = self.reader.ingest
        prepared = Prepared(Folder(ingest.folder))
        split = "val" if ingest.samples["val"] else "train"
        table = prepared.read_chunk(split, 0, ("name", "image", "mask")).slice(0, GALLERY)
        size = ingest.image_size
        images, truth = pixels(table["image"], (size, size, 3)), pixels(table["mask"], (size, size))
        rows = [self.learner.predict(images[i : i + 1]) for i in range(len(images))]
        return {
            "names": table["name"].to_pylist(),
            "images": images.copy(),
            "truth": truth.copy(),
            "predicted": np.concatenate(rows),
        }

    def _tell(self, clock: _Clock, phase: str, step: int, steps: int) -> None:
        state = self.state
        seconds = (clock.waiting + clock.stepping) / clock.steps if clock.steps else None
        loss = state.loss_sum / state.pixels if state.pixels and phase == "train" else None
        self.line.live(
            Live(state.epoch, step, steps, phase, loss, clock.images_per_second, clock.data_wait_fraction, seconds)
        )


def _processor() -> str:
    """The kind of processor, as far as the system says."""
    try:
        with open("/proc/cpuinfo") as info:
            lines = dict(line.split(":", 1) for line in info.read().split("\n\n")[0].splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in lines.items()}
        return " ".join(fields.get(k, "") for k in ("model name", "cpu family", "model", "stepping")).strip()
    except OSError:
        return platform.processor() or platform.machine()
