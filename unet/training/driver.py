"""A training from an opened run to its end: data, resources, the workers of Ray Train, and their news."""

import contextlib
import math
import os
import re
import shutil
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from unet.data import ingest
from unet.data.prepare import resolve
from unet.data.shards import Prepared
from unet.errors import Diverged, InputError, RunFailed
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.terminal import Display, checks_row
from unet.tracking.courier import Courier, Untracked
from unet.tracking.send import PATIENCE, begin, kept_back, send, send_later
from unet.training import resources, results
from unet.training.backend import TensorflowBackendConfig
from unet.training.loop import Job, not_finite
from unet.training.monitor import Monitor
from unet.training.run import Run, milliseconds, where
from unet.training.signals import stop_wish
from unet.training.worker import train_worker

MAX_RESTARTS = 3
STOP_SECONDS = 2
"""How long a run that was stopped waits for MLflow."""
POLL_SECONDS = 0.5


def train(
    run: Run,
    display: Display | None = None,
    callbacks: tuple = (),
    as_trial: bool = False,
    together: int = 1,
    started: float | None = None,
    wish: threading.Event | None = None,
) -> dict:
    """Train an opened run to its end; its summary (the content of `summary.json`).

    Ray must be connected (`unet.session`). `callbacks` go to Ray Train. A trial of a sweep skips the test split,
    pictures, packaging and MLflow (the sweep writes it); `together` trials share the cluster. `started` is when the
    job began, in seconds since 1970; `wish` ends it with a checkpoint (default: set by Ctrl-C).

    Raises:
        InputError: before anything started.
        RunFailed: the run had started and failed.
    """
    started, display, settings = started or time.time(), display or Display(quiet=True), run.settings
    latest = run.checkpoints.latest()
    # A trial of a sweep may be finished without a test score, which is then made up for.
    if run.summary.get("status") == "finished" and latest and (as_trial or run.summary.get("test")):
        done, best = latest[1].epoch - 1, latest[1].best_epoch
        patience, stale = settings.training.patience, latest[1].stale_epochs
        if patience is not None and stale >= patience:
            display.say(
                f"The run {run.name} stopped early after epoch {done}, best {best}. More: --patience {stale + 5}."
            )
            return _finished(run, display, as_trial)
        if done >= settings.training.epochs:
            display.say(f"The run {run.name} is finished ({done} epochs, best {best}). More: --epochs {done + 10}.")
            return _finished(run, display, as_trial)
    storage, nodes = Folder(settings.run.storage_path), resources.cluster_nodes()
    resources.plan(settings, nodes, 0, together)  # before the data are prepared for a run that cannot be
    try:
        prepared = resolve(settings.data.data, settings.data.image_size, settings.data.resize, storage, display.working)
    finally:
        display.close()
    digest = prepared.manifest.data_digest
    if latest and latest[1].data_digest != digest:
        raise InputError(
            f"The run {run.name} was trained on data with digest {latest[1].data_digest[:12]}, {prepared.folder} has "
            f"{digest[:12]}: give the data of then, or another --run-name."
        )
    names = prepared.manifest.classes
    if latest and [c.name for c in latest[1].class_infos] != names:
        raise InputError(f"{prepared.folder} calls the classes {', '.join(names)} now: give another --run-name.")
    counts = resources.check_samples(settings, prepared)
    data_bytes = sum(prepared.bytes_in_memory(s, counts[s]) for s in ("train", "val"))
    classes = len(prepared.manifest.classes)
    parameters = resources.count_parameters(3, settings.model.base_filters, settings.model.depth, classes)
    plan = resources.plan(settings, nodes, data_bytes, together)
    if not as_trial:  # the sweep has asked for all its trials
        need = plan.num_workers * plan.cpus_per_worker
        resources.check_free(plan.num_workers, plan.cpus_per_worker, resources.free_cpus(need))
    resources.check_disk(settings, storage, parameters)

    display.table(f"Run {run.name}", _overview(run, prepared, counts, parameters, plan))
    if latest:
        display.say(f"Continuing at step {latest[1].step} of {latest[0]}.")
    session = _Session(run, prepared, counts, plan, parameters, display, callbacks, as_trial, started)
    return session.run_to_end(wish)


def _finished(run: Run, display: Display, as_trial: bool) -> dict:
    """The summary of a run that was finished before; what an outage or a kill kept from MLflow is sent."""
    if not as_trial and not run.summary.get("delivered", True):
        try:
            send_later(run, display)
        except RunFailed as error:
            display.say(str(error), "yellow")
    return run.summary


def _overview(run: Run, prepared: Prepared, counts, parameters: int, plan: resources.Plan) -> list[tuple[str, str]]:
    s = run.settings
    mode = "kept in memory" if plan.kept else "streamed"
    tracking = s.run.tracking_uri or f"sqlite in {s.run.storage_path}"
    return [
        ("data", f"{prepared.folder} ({plan.data_bytes / 1e6:.0f} MB, {mode})"),
        ("splits", ", ".join(f"{name} {count:,}" for name, count in counts.items())),
        *checks_row(prepared),
        ("model", f"U-Net, {parameters:,} parameters, {s.data.image_size} px, {s.model.base_filters} filters"),
        (
            "training",
            f"{s.training.epochs} epochs, global batch {s.training.batch_size}, Adam {s.training.learning_rate:g}, "
            f"{s.training.precision}, seed {s.training.seed}",
        ),
        (
            "workers",
            f"{plan.num_workers} x {plan.cpus_per_worker:g} CPUs, {plan.threads} thread(s) each"
            + (", a GPU each" if plan.use_gpu else ""),
        ),
        ("results", str(run.folder)),
        ("tracking", f"{tracking}, experiment {s.run.experiment}"),
    ]


@dataclass
class _Session:
    """One start of a run: the workers in a thread, their news taken in by the main thread."""

    run: Run
    prepared: Prepared
    counts: dict[str, int]
    plan: resources.Plan
    parameters: int
    display: Display
    callbacks: tuple
    as_trial: bool
    started: float
    tracker: Courier | Untracked = field(default_factory=Untracked)
    history: list[dict] = field(default_factory=list)
    failure: Diverged | None = None
    stopped: bool = False
    starts: int = 0
    restarts_before: int = 0
    test: dict | None = None
    test_time: int | None = None
    gallery: dict | None = None
    package: dict[str, bytes] | None = None

    def run_to_end(self, wish: threading.Event | None = None) -> dict:
        run, prepared = self.run, self.prepared
        if not self.as_trial:
            self.tracker = self._courier()
        self.restarts_before = run.summary.get("restarts") or 0
        facts = {"data_digest": prepared.manifest.data_digest, "prepared": without_secrets(prepared.folder.uri)}
        run.start(parameters=self.parameters, **facts)
        # What the checkpoints vouch for: the file may lack an epoch that a kill kept from being written.
        latest = run.checkpoints.latest()
        self.history = latest[1].history if latest else []
        run.write_history(self.history)
        self.monitor = Monitor.remote()
        with contextlib.nullcontext(wish) if wish else stop_wish() as wish:
            try:
                error = self._train(wish)
                return self._finish(error)
            except RunFailed:
                raise
            except BaseException as error:
                # Whatever ends the driver here (a second Ctrl-C, a full disk), the run does not stay "running".
                status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                self.tracker.status(status)
                run.write_summary(status=status, ended=milliseconds())
                self.tracker.deliver(PATIENCE, at_most=STOP_SECONDS)
                raise
            finally:
                self.tracker.close()
                self.display.close()
                if ray.is_initialized():
                    ray.kill(self.monitor)

    def _courier(self) -> Courier:
        """To MLflow. A new run is refused where that can never work; one that continues goes on."""
        part = self.run.settings.run
        say = lambda words: self.display.say(words, "yellow")  # noqa: E731
        courier = Courier(Folder(part.storage_path), part.experiment, part.tracking_uri, say)
        try:
            if not self.run.summary:
                courier.check(PATIENCE)
        except BaseException:
            courier.close()
            raise
        return courier

    def _train(self, wish: threading.Event) -> BaseException | None:
        """Run the workers in a thread to their end, whatever it is; what they failed with."""
        with ThreadPoolExecutor(1, thread_name_prefix="fit") as pool:
            fit = pool.submit(self._fit)
            try:
                if not self.as_trial:
                    begin(self.run, self.tracker, self.prepared)
                    self.tracker.tags({"status": "running"})
                    self.tracker.status("running")
                self._follow(fit, wish)
            except KeyboardInterrupt:  # the second one
                ray.shutdown()  # ends the workers at once, and with them the thread that waits for them
                raise
            except BaseException:
                self.monitor.stop.remote()  # the workers end after their step
                raise
            return fit.exception()

    def _fit(self):
        settings, plan, run = self.run.settings, self.plan, self.run

        def start() -> tuple[int, int]:
            latest = run.checkpoints.latest()
            return (latest[1].epoch, latest[1].epoch_step) if latest else (1, 0)

        reading = ingest.Ingest(
            folder=self.prepared.folder.uri,
            image_size=settings.data.image_size,
            samples=self.counts,
            batch_size=settings.training.batch_size,
            seed=settings.training.seed,
            epochs=settings.training.epochs,
            start=start,
            memory=plan.stream_bytes,
        )
        if plan.kept:
            reading = ingest.keep(reading)
        manifest = self.prepared.manifest
        job = Job(
            settings=settings,
            shown=run.shown_settings(),
            run=run.folder.uri,
            threads=plan.threads,
            data_digest=manifest.data_digest,
            classes=manifest.class_infos,
            monitor=self.monitor,
            score_test=not self.as_trial,
        )
        # A name of its own for every start: Ray would silently continue from its snapshot of the same name.
        scratch = Path(os.environ.get("TMPDIR", "/tmp")) / f"unet-ray-{uuid.uuid4().hex[:8]}"
        trainer = DataParallelTrainer(
            train_worker,
            train_loop_config={"job": job},
            backend_config=TensorflowBackendConfig(),
            scaling_config=ScalingConfig(
                num_workers=plan.num_workers,
                use_gpu=plan.use_gpu,
                resources_per_worker={"CPU": plan.cpus_per_worker} | ({"GPU": 1} if plan.use_gpu else {}),
            ),
            run_config=RunConfig(
                name=run.name,
                storage_path=str(scratch),
                failure_config=FailureConfig(max_failures=MAX_RESTARTS),
                callbacks=list(self.callbacks),
                logging_config=LoggingConfig(log_level="DEBUG" if settings.door.debug else "ERROR"),
            ),
            datasets={"train": ray.data.range(1)},  # its place only: `OrderedData` gives the shards
            dataset_config=ingest.OrderedData(reading),
        )
        try:
            trainer.fit()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _follow(self, fit: Future, wish: threading.Event) -> None:
        """Take in the workers' news until they end; pass a wish to stop on to them."""
        self.display.waiting("starting workers")
        seen = 0
        while True:
            ended = fit.done()  # asked before the news, so that the last of them are taken in
            lives, events = ray.get(self.monitor.poll.remote(seen))
            live = lives.get(self.run.folder.uri)
            seen += len(events)
            for kind, content in events:
                getattr(self, f"_on_{kind}")(content)
            self._hear()
            if ended:
                return
            if live is not None and not self.stopped:
                self.display.progress(live, self.run.settings.training.epochs)
            if wish.is_set() and not self.stopped:
                # Marked first: a submitted job may have few seconds left.
                self.stopped = True
                self.run.write_summary(status="stopped")
                self.display.waiting("stopping: saving a checkpoint (again to stop at once)")
                self.monitor.stop.remote()
                self.tracker.tags({"status": "stopped"})
                self.tracker.status("stopped")
            time.sleep(POLL_SECONDS)

    def _hear(self) -> None:
        """What the store says, and the id of the run there when it is known."""
        self.tracker.hear()
        if self.tracker.run_id not in (None, self.run.summary["mlflow_run_id"]):
            self.run.write_summary(mlflow_run_id=self.tracker.run_id)

    def _on_start(self, world_size: int) -> None:
        self.starts += 1
        if self.starts > 1:
            self.display.say(f"Workers started again ({self.starts - 1}); {world_size} of them.", "yellow")
            self.run.write_summary(restarts=self._restarts)

    @property
    def _restarts(self) -> int:
        return self.restarts_before + max(0, self.starts - 1)

    def _on_resumed(self, content: dict) -> None:
        self._take_history(content["history"])
        if content["changed"]:
            what = ", ".join(content["changed"])
            self.display.say(f"Resumed with another {what}: the numbers will not be bit-equal to before.", "yellow")

    def _on_first_step(self, at: float) -> None:
        self.run.write_summary(seconds_to_first_step=round(at - self.started, 2))

    def _on_epoch(self, content: dict) -> None:
        record = content["record"]
        self._take_history([r for r in self.history if r["epoch"] < record["epoch"]] + [record])
        self.run.write_summary(best_epoch=record["best_epoch"], val=content["validation"])
        self.display.epoch(record, self.run.settings.training.epochs, self.prepared.manifest.class_infos)

    def _take_history(self, history: list[dict]) -> None:
        """Write down the epochs so far and send what MLflow lacks: all of it, where workers started again."""
        new = [record for record in history if record not in self.history]
        self.history = history
        self.run.write_history(history)
        for record in new:
            self.tracker.epoch(record)

    def _on_test(self, result: dict) -> None:
        self.test, self.test_time = result, milliseconds()

    def _on_gallery(self, gallery: dict) -> None:
        self.gallery = gallery

    def _on_package(self, files: dict[str, bytes]) -> None:
        self.package = files

    def _on_stopped(self, step: int) -> None:
        self.stopped = True

    def _on_not_finite(self, content: dict) -> None:
        self.failure = Diverged(
            f"{not_finite(content)} The last checkpoint is whole: go on with --on-nan skip, or start anew with a "
            "smaller --learning-rate or --clip-norm 1."
        )

    def _finish(self, error: BaseException | None) -> dict:
        run = self.run
        latest = run.checkpoints.latest()
        state = latest[1] if latest else None
        speeds = [r["images_per_second"] for r in self.history if "images_per_second" in r]
        facts = {
            "best_epoch": state and state.best_epoch,
            "best_checkpoint": state and state.best_checkpoint and f"checkpoints/{state.best_checkpoint}",
            "images_per_second": round(float(np.median(speeds)), 2) if speeds else None,
            "val": state and state.validation,
            "restarts": self._restarts,
        }
        # A wish to stop that came when all was scored already changes nothing.
        if error is None and self.failure is None and (not self.stopped or self.package is not None):
            self._keep(state, facts)
            return run.summary
        status = "stopped" if self.stopped else "failed"
        reason = without_secrets(str(self.failure or (_cause(error) if error else "stopped by the user")))
        run.write_summary(status=status, reason=reason, ended=milliseconds(), **facts)
        self._send()
        if self.stopped:
            at = f"step {state.step}" if state else "the start"
            self.display.say(
                f"Stopped at {at}. Continue: python jobs/train.py --resume {run.name}{where(run.settings.run)}"
            )
            return run.summary
        raise self.failure or RunFailed(f"The training failed: {_cause(error)}") from error

    def _keep(self, state, facts: dict) -> None:
        run = self.run
        if not self.as_trial:
            self.display.waiting("drawing")
            results.keep(run, state, self.history, self.test, self.gallery, self.package)
            facts |= {"test": self.test, "test_time": self.test_time}
        run.write_summary(status="finished", ended=milliseconds(), **facts)
        self._send()
        if not self.as_trial:
            results.show(run, self.tracker.uri, self.display)

    def _send(self) -> None:
        """Have MLflow take all of the ended run, as long as it takes anything; after Ctrl-C nobody waits."""
        if self.as_trial:
            return
        self.display.waiting("sending to MLflow")
        at_most = STOP_SECONDS if self.stopped else math.inf
        delivered = send(self.run, self.tracker, at_most=at_most)
        self.display.close()
        if not delivered:
            self.display.say(kept_back(self.run, self.tracker), "yellow")


def _cause(error: BaseException | None) -> str:
    """The innermost message of a failure that came through Ray."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    # Ray Data gives on what its tasks raised as text only.
    if own := re.search(r"^unet\.errors\.\w+: (.+)$", str(error), re.MULTILINE):
        return own[1]
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause).strip() else ''}"
