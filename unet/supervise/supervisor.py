"""A run from its first group of workers to its end: what they report, what ends them, and what follows.

A group is replaced by a new one, at the last checkpoint, when it is lost or hangs, when one of its nodes is called
back, or when an elastic run can grow.

Why: docs/decisions.md#the-driver-restarts-groups
"""

import contextlib
import math
import threading
import time
from dataclasses import dataclass

import ray

from unet.cluster import planner
from unet.cluster.demand import Demand, Needs, worker_memory
from unet.cluster.internals import autoscales, draining_nodes
from unet.cluster.nodes import cluster_nodes, free_abandoned_places, live_nodes, named
from unet.config import Device, parse_interval
from unet.data.ingest import Ingest
from unet.errors import InputError, NoGpu, RunFailed, StorageFailed
from unet.models.start import Start
from unet.remote import patience
from unet.runs.state import State
from unet.storage import reported
from unet.supervise.faults import Fault, Tries, fault_of, with_nodes
from unet.supervise.group import WorkerGroup
from unet.supervise.reading import Reading
from unet.supervise.recorder import RunRecorder
from unet.supervise.reports import Reports
from unet.supervise.signals import catch_stop_signals
from unet.training.job import Job
from unet.training.link import SAMPLE
from unet.training.meters import exported

POLL_SECONDS = 0.25
LOOK_SECONDS = 3.0
"""How often the cluster is asked for nodes that are called back and for room to grow."""
ROOM_SECONDS = 600
"""How long a run waits for places for its workers, once it has begun."""
GROW_SECONDS = 60.0
"""How long a group has trained before it may make room for more workers: their start costs as much."""
ABORT_SECONDS = 10
"""How long an aborted group has to end."""
SETTLE_SECONDS = 5.0
"""How long an elastic run waits for as many workers as before, until it continues with fewer."""


@dataclass
class Supervisor:
    """One start of a run by a driver.

    Attributes:
        recorder: of the run.
        counts: samples by split.
        plan: of the group under way, or the next.
        callbacks: for Ray Train.
        together: how many such trainings share the cluster.
        latest: name and state of the last checkpoint.
        start: weights to begin with, where there is no checkpoint.
        leaving: why the group under way is to be replaced.
    """

    recorder: RunRecorder
    counts: dict[str, int]
    plan: planner.Plan
    callbacks: tuple
    together: int
    latest: tuple[str, State] | None
    start: Start | None = None
    leaving: str | None = None
    promised: int | None = None
    """How many workers there was room for when the group was asked to leave."""

    def __post_init__(self):
        self.reports = Reports(self.recorder)
        self._more: Demand | None = None
        self.run, self.display, self.settings = self.recorder.run, self.recorder.display, self.recorder.run.settings
        self._start = ray.put(self.start.weights) if self.start else None
        training = self.settings.training
        self.reading = Reading(
            Ingest(
                folder=self.recorder.prepared.folder.uri,
                image_size=self.settings.data.image_size,
                samples=self.counts,
                batch_size=training.batch_size,
                seed=training.seed,
                epochs=self.settings.epochs,
                start=(1, 0),
                memory=self.plan.stream_bytes,
            )
        )

    def run_to_end(self, stop_signal: threading.Event | None = None) -> dict:
        """Train, test and keep; the run's summary. `stop_signal` ends it with a checkpoint (default: set by Ctrl-C).

        Raises:
            RunFailed: the run failed.
        """
        recorder, run = self.recorder, self.run
        lost = "the driver was lost" if run.summary.get("status") == "running" else None
        with (
            contextlib.closing(recorder),
            contextlib.nullcontext(stop_signal) if stop_signal else catch_stop_signals() as stop_signal,
            contextlib.nullcontext() if recorder.as_trial else exported(recorder.meters, run.name, "driver"),
        ):
            recorder.stop_signal = stop_signal
            try:
                recorder.open(self.latest and self.latest[1], self.start.facts if self.start else {})
                run.take_over()
                self._end(self._supervise(stop_signal, lost))
                return run.summary
            except BaseException as error:
                # Whatever ends the driver here (a second Ctrl-C, a full disk), the run does not stay "running".
                if run.summary.get("status") == "running":
                    recorder.mark("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
                raise
            finally:
                self.display.close()

    def _supervise(self, stop_signal: threading.Event, lost: str | None) -> Fault | None:
        """Groups of workers, one after another, until the run is done or stopped (None) or cannot go on."""
        tries, reason = Tries(self.settings.compute.max_failures), lost
        while True:
            fault = self._one_group(stop_signal, reason)
            if self.reports.stopped or self.reports.failure or not (fault or self.reports.left):
                return fault
            if not self._look_for_checkpoint():
                return fault
            reason = self.leaving
            if fault:
                wait = tries.failed(fault, self.latest and self.latest[0])
                if wait is None:
                    return fault
                reason = fault.reason
                step = self.latest[1].step if self.latest else 0
                self.display.say(
                    f"{reason[0].upper()}{reason[1:]}. Continuing from step {step}"
                    + (f" in {wait:.0f} s" if wait else "")
                    + (f" (failure {tries.failures} of at most {tries.most} in a row)." if tries.failures > 1 else "."),
                    "yellow",
                )
                stop_signal.wait(wait)
            self._find_room(stop_signal)
            if self.reports.failure:
                return fault
            if stop_signal.is_set():
                self._mark_stopped()
                return None

    def _look_for_checkpoint(self) -> bool:
        """Take the last one that verifies; whether the run can go on."""
        try:
            with reported(self.run.checkpoints.folder, "use"):
                # First, so that everything earlier workers wrote is seen, and they write nothing after it.
                self.run.take_over()
                self.latest, passed_over = self.run.checkpoints.resume(self.settings)
        except InputError as error:
            self.reports.failure = RunFailed(str(error))
            return False
        except StorageFailed as error:
            self.reports.failure = error
            return False
        for sentence in passed_over:
            self.display.say(f"{sentence[0].upper()}{sentence[1:]}.", "yellow")
        self.recorder.catch_up(self.latest and self.latest[1])
        return True

    def _find_room(self, stop_signal: threading.Event) -> None:
        """Wait for places for a new group and make its plan, or set `failure` where there are none for too long."""
        run, began, before = self.run, time.monotonic(), self.promised or self.plan.num_workers
        self.promised = None
        with contextlib.ExitStack() as stack:
            demand = None
            while not stop_signal.is_set():
                waited = time.monotonic() - began
                try:
                    plan = self._plan_now()
                except InputError as error:  # what is left of the cluster is too small
                    plan, why = None, str(error)
                else:
                    each = f"{self.plan.cpus_per_worker:g} free CPUs each" + (
                        " and a free GPU each" * self.plan.use_gpu
                    )
                    why = f"{self.settings.compute.least_workers} workers need {each}"
                if plan is not None and (plan.num_workers >= before or waited > SETTLE_SECONDS):
                    self.plan = plan
                    return
                if waited > ROOM_SECONDS:
                    self.reports.failure = RunFailed(
                        f"The cluster had no room for the workers for {ROOM_SECONDS // 60} minutes: {why}. When there "
                        f"is, continue with --resume {run.name}; --num-workers 1:{before} continues with what there is."
                    )
                    return
                if waited > SETTLE_SECONDS:
                    if demand is None and autoscales():
                        demand = stack.enter_context(Demand(self._needs()))
                    coming = demand is not None and not demand.is_met()
                    self.display.waiting_for_others(f"waiting for {'the autoscaler to bring ' * coming}room: {why}")
                stop_signal.wait(POLL_SECONDS)

    def _needs(self) -> Needs:
        """What an autoscaler is asked for: nodes like those that are lost, not the least that would do."""
        least = self.settings.compute.least_workers
        return self._like_these(least, of=least)

    def _like_these(self, workers: int, of: int) -> Needs:
        """Workers as those of the plan, of so many in all."""
        cpus, use_gpu = math.ceil(self.plan.cpus_per_worker), self.plan.use_gpu
        return Needs(workers, cpus, use_gpu, worker_memory(self.settings, of, use_gpu))

    def _plan_now(self, held: int = 0) -> planner.Plan | None:
        """The plan for now, on what the run began on: GPUs that are lost are waited for, not replaced by CPUs."""
        device: Device = "gpu" if self.plan.use_gpu else "cpu"
        nodes, data_bytes = cluster_nodes(), self.plan.data_bytes
        return planner.plan_now(self.settings, nodes, data_bytes, self.together, held, device)

    def _one_group(self, stop_signal: threading.Event, reason: str | None) -> Fault | None:
        """Workers from their start to their end; what ended them if it was not themselves.

        `reason` is why an earlier group is replaced.
        """
        run, name = self.run, self.latest and self.latest[0]
        self.reports.left, self.leaving, self._more = False, None, None
        group = WorkerGroup(run.name, self.plan, self.callbacks, self.settings.command.debug)
        try:
            reading = self.reading.begin(self.latest and self.latest[1], self.plan)
            keep = self.reading.keep if self.plan.kept or reading.kept is not None else None
            group.start(self._job(group, name), reading, keep)
            if reason:
                self.recorder.restart(reason, self.latest[1].step if self.latest else 0, self.plan.num_workers)
            hung = self._follow(group, stop_signal)
        except KeyboardInterrupt:  # the second one
            ray.shutdown()  # ends the workers at once
            raise
        except BaseException:
            group.abort()
            group.wait(ABORT_SECONDS)
            raise
        finally:
            if ray.is_initialized():
                group.close()
                if self._more:
                    self._more.withdraw()
                if not self.recorder.as_trial:  # a sweep's job has other groups too
                    free_abandoned_places()
        if hung:
            return Fault(hung)
        if group.error is None or (self.reports.stopped and group.aborted_at is not None):
            return None
        lost = group.nodes.keys() - live_nodes().keys()
        hosts = {rank: host for rank, (_, host) in group.places.items()}
        return with_nodes(fault_of(group.error, hosts), self._names(group, lost), len(group.nodes))

    def _job(self, group: WorkerGroup, checkpoint: str | None) -> Job:
        manifest = self.recorder.prepared.manifest
        return Job(
            settings=self.settings,
            public_settings=self.run.public_settings(),
            run=self.run.folder.uri,
            threads=self.plan.threads,
            use_gpu=self.plan.use_gpu,
            data_digest=manifest.data_digest,
            classes=manifest.class_infos,
            checkpoint=checkpoint,
            fencing_token=self.run.fencing_token,
            link=group.link,
            score_test=not self.recorder.as_trial,
            start=self._start if checkpoint is None else None,
        )

    def _follow(self, group: WorkerGroup, stop_signal: threading.Event) -> str | None:
        """Take in the workers' news until they end; how long they hung if that was their end."""
        limit = parse_interval(self.settings.compute.step_timeout)[1]
        live, hung, roomy, since, placed = None, None, False, None, False
        moved = looked = time.monotonic()
        self.display.waiting("starting workers")
        while True:
            ended = group.ended  # asked before the news, so that the last of them are taken in
            at, events = group.news(self.run.folder.uri)
            for kind, content in events:
                self.reports.handle(kind, content)
            if group.hosts and not placed:
                placed = True
                self.recorder.placed(group.hosts)
            self.recorder.receive()
            now = time.monotonic()
            if ended or now - (group.aborted_at or now) > ABORT_SECONDS:
                return hung
            # Opening the data takes as long as it takes.
            if any(kind != SAMPLE for kind, _ in events) or not group.begun or (at is not None and at != live):
                live, moved, since = at or live, now, since or (now if at else None)
            if live is not None and not self.reports.stopped:
                self.display.progress(live, self.settings.epochs, self.settings.length.minutes)
            if now - moved > limit and not hung:
                where = f" after {live.phase} step {live.step} of epoch {live.epoch}" if live else ""
                hung = f"no progress for {limit / 60:g} minutes{where}: a worker hangs (see --step-timeout)"
            if stop_signal.is_set() and not self.reports.stopped:
                group.request("stop")
                self._mark_stopped()
                self.display.waiting("stopping: saving a checkpoint (again to stop at once)")
            # Before its first step and after its last one a group has nothing that is not saved.
            saved = live is None or (live.phase == "test" and self.reports.package is None)
            if hung or isinstance(self.reports.failure, StorageFailed | NoGpu) or (self.reports.stopped and saved):
                group.abort()
            ending = self.reports.stopped or self.leaving or (live and live.phase == "test")
            if now - looked > LOOK_SECONDS and not ending:
                # A group that has not begun does not hold its own CPUs yet, which would look like room.
                may_grow = since is not None and now - since > GROW_SECONDS and self.settings.compute.is_elastic
                looked, roomy = now, self._look_around(group, may_grow, roomy)
            group.wait(POLL_SECONDS)

    def _look_around(self, group: WorkerGroup, may_grow: bool, roomy: bool) -> bool:
        """Have the workers leave a node that is called back, or make room for more of them.

        Returns:
            Whether there is room for more: twice in a row, and the group is to grow.
        """
        called_back, reason, room = group.nodes.keys() & draining_nodes(), None, False
        if called_back:
            names = named(self._names(group, called_back))
            reason = f"{len(called_back)} of {len(group.nodes)} nodes are being shut down ({names})"
        elif may_grow:
            with contextlib.suppress(InputError):
                found = self._plan_now(held=self.plan.num_workers + self._ask_for_more())
                room = found is not None and found.num_workers > self.plan.num_workers
                if found and room and roomy:
                    self.promised = found.num_workers
                    reason = f"there is room for {found.num_workers} workers"
            if self._more and not room:
                self._more.is_met()  # all has come and is of no use: others may have it
        if reason:
            self.leaving = reason
            self.display.say(f"{reason[0].upper()}{reason[1:]}: saving, then continuing with new workers.", "yellow")
            group.request("leave")
        return room

    def _ask_for_more(self) -> int:
        """Ask an autoscaler for the workers that an elastic run lacks; how many places for them are held by now."""
        has = self.plan.num_workers
        if self._more is None and (lacking := self.settings.worker_counts[-1] - has) and autoscales():
            self._more = Demand(self._like_these(lacking, of=has + 1), apart=True)
        return self._more.held() if self._more else 0

    def _names(self, group: WorkerGroup, nodes: set[str]) -> list[str]:
        return [self.recorder.system.called(host) for host in sorted({group.nodes[node] for node in nodes})]

    def _mark_stopped(self) -> None:
        self.reports.stopped = True
        self.recorder.stopped()

    def _end(self, fault: Fault | None) -> None:
        """The end of the run, of which its folder, MLflow and whoever called hear. Raises RunFailed."""
        state, lost = None, isinstance(self.reports.failure, StorageFailed)
        with patience(0 if lost else None):  # it has been waited for
            with contextlib.suppress(StorageFailed) if lost else contextlib.nullcontext():
                latest = self.run.checkpoints.latest()
                state = latest and latest[1]
            self._close(fault, state, lost)

    def _close(self, fault: Fault | None, state: State | None, lost: bool) -> None:
        reports = self.reports
        # A stop signal that came when all was scored already changes nothing.
        done = fault is None and reports.failure is None and (not reports.stopped or reports.results is not None)
        if done and state:
            self.recorder.finished(state, reports.results)
            return
        # Where the storage is lost, the checkpoint of the stop is missing too.
        status = "stopped" if reports.stopped and not lost else "failed"
        with contextlib.suppress(StorageFailed):
            self.recorder.catch_up(state)
        reason = "stopped by the user" if status == "stopped" else str(reports.failure or (fault and fault.reason))
        self.recorder.broken_off(status, state, reason)
        if status == "failed":
            go_on = ""
            if state and fault and fault.kind != "final":
                go_on = f" Continue from step {state.step} with --resume {self.run.name}."
            raise reports.failure or RunFailed(f"The training failed: {reason}.{go_on}")
