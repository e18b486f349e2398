"""One start of the workers: a trainer of Ray Train in a thread, and the driver link through which they speak.

Ray Train is told to restart nothing: a group that ends in any other way than by itself is replaced by a new one, by
`unet.supervise.supervisor`, which so decides alike about workers, controller, nodes and hangs.

Why: docs/decisions.md#few-processes-to-start
"""

import contextlib
import functools
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train import DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unet.cluster.internals import Needless, on_controller_start, trainer
from unet.cluster.planner import Plan
from unet.data.ingest import Ingest, shards
from unet.progress import Live
from unet.training.backend import TensorflowBackendConfig
from unet.training.job import Job
from unet.training.link import News, start_link
from unet.training.worker import train_worker

ANSWER_SECONDS = 10
"""How long the driver link may take to answer, and a controller to hand over itself."""


def _announce(link: ray.actor.ActorHandle) -> None:
    """Tell the driver who the controller is, which it may have to end; called in the controller."""
    # A reference, in a list, which Ray leaves alone: to unpack the handle the link would load all of Ray Train.
    ray.get(link.event.remote("controller", [ray.put(ray.get_runtime_context().current_actor)]))


class OrderedData(DataConfig):
    """Gives each worker of Ray Train its `WorkerShard`; called anew, with the new world size, at every start."""

    def __init__(self, ingest: Ingest):
        super().__init__()
        self.ingest = ingest

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
        return [dict.fromkeys(datasets, shard) for shard in shards(self.ingest, world_size)]


class WorkerGroup:
    """Workers under way.

    Attributes:
        places: by rank the id and the host name of the node that a worker runs on, as far as it has said so.
        aborted_at: when they were ended, of `time.monotonic`; None before.
    """

    def __init__(self, name: str, plan: Plan, callbacks: tuple, debug: bool):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.link = start_link(scheduling_strategy=here)
        self.places: dict[int, tuple[str, str]] = {}
        self.aborted_at: float | None = None
        self._name, self._plan, self._callbacks, self._debug = name, plan, callbacks, debug
        self._seen, self._announced, self._silent, self._controller = 0, False, False, None
        self._failure: BaseException | None = None
        self._unread: BaseException | None = None
        self._threads: dict[str, threading.Thread] = {}

    def start(self, job: Job, reading: Ingest, keep: Callable[[], Ingest] | None) -> None:
        """Begin, in threads, since there Ray leaves the handling of signals to us.

        The workers stream `reading`, or get what `keep` returns, which reads while they load TensorFlow.
        """
        if keep:
            self._threads["data"] = threading.Thread(target=self._keep, args=(keep,), name="data", daemon=True)
        stream = None if keep else reading
        self._threads["fit"] = threading.Thread(
            target=self._fit, args=(job, stream, reading.label_selector), name="fit", daemon=True
        )
        for thread in self._threads.values():
            thread.start()

    def _keep(self, keep: Callable[[], Ingest]) -> None:
        try:
            self.link.give.remote([ray.put(keep())])
        except BaseException as error:
            self._unread = error
            self.abort()

    def _fit(self, job: Job, stream: Ingest | None, label_selector: dict[str, str]) -> None:
        # A name of its own for every start: Ray would silently continue from its snapshot of the same name.
        scratch = Path(tempfile.gettempdir()) / f"unet-ray-{uuid.uuid4().hex[:8]}"
        try:
            self._trainer(job, stream, label_selector, scratch).fit()
        except BaseException as error:
            self._failure = error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _trainer(
        self, job: Job, stream: Ingest | None, label_selector: dict[str, str], scratch: Path
    ) -> DataParallelTrainer:
        plan, data, without = self._plan, {}, set[Needless]()
        callbacks: list[Any] = [*self._callbacks, on_controller_start(functools.partial(_announce, self.link))]
        if stream:  # the data set is its place only: `OrderedData` gives the shards
            data = {"datasets": {"train": ray.data.range(1)}, "dataset_config": OrderedData(stream)}
        else:  # the workers have their data from the link
            without.add("datasets")
        if job.score_test:  # the job has no other group, as a sweep's has: `free_abandoned_places` does it
            without.add("placement group cleaner")
        return trainer(
            without,
            train_worker,
            train_loop_config={"job": job, "streamed": stream is not None},
            backend_config=TensorflowBackendConfig(),
            # Ray's types are those of the first version of Ray Train, which is not the one that runs.
            scaling_config=ScalingConfig(  # type: ignore[call-arg]
                num_workers=plan.num_workers,
                use_gpu=plan.use_gpu,
                resources_per_worker={"CPU": plan.cpus_per_worker} | ({"GPU": 1} if plan.use_gpu else {}),
                placement_strategy="SPREAD",  # as planned; packed, they take a small node's reserve
                label_selector=label_selector or None,
            ),
            run_config=RunConfig(  # type: ignore[call-arg]
                name=self._name,
                storage_path=str(scratch),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
                callbacks=callbacks,
                logging_config=LoggingConfig(log_level="DEBUG" if self._debug else "ERROR"),
            ),
            **data,
        )

    @property
    def ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads.values())

    @property
    def error(self) -> BaseException | None:
        """What it failed with, once `ended`."""
        return self._unread or self._failure  # data that cannot be read end the workers

    def wait(self, seconds: float) -> None:
        """Return when the group has ended, at the latest after so long."""
        until = time.monotonic() + seconds
        for thread in self._threads.values():
            thread.join(max(0.0, until - time.monotonic()))

    def news(self, run: str) -> tuple[Live | None, list[tuple]]:
        """Where the run is, and what has happened since the last call."""
        try:
            answer: ray.ObjectRef[News] = self.link.poll.remote(self._seen)
            lives, events = ray.get(answer, timeout=ANSWER_SECONDS)
        except RayActorError:
            return None, []  # the workers notice as well, and end
        except GetTimeoutError:
            self._silent = True
            return None, []
        self._silent, self._seen = False, self._seen + len(events)
        for kind, content in events:
            if kind == "controller":
                self._announced = True
                with contextlib.suppress(RayError):  # gone by now, and its reference with it
                    self._controller = ray.get(content[0], timeout=ANSWER_SECONDS)
                if self.aborted_at is not None:
                    self._end_controller()
            elif kind == "worker":
                rank, node, host = content
                self.places[rank] = (node, host)
        return lives.get(run), [event for event in events if event[0] not in ("controller", "worker")]

    @property
    def nodes(self) -> dict[str, str]:
        """Host names of the nodes that the workers run on, by id."""
        return dict(self.places.values())

    @property
    def hosts(self) -> dict[str, list[int]] | None:
        """The ranks that each host has, once all workers have said where they are."""
        if len(self.places) < self._plan.num_workers:
            return None
        found: dict[str, list[int]] = {}
        for rank, (_, host) in sorted(self.places.items()):
            found.setdefault(host, []).append(rank)
        return found

    def request(self, what: str) -> None:
        """Have the workers save after their step and end: "stop" for good, or "leave" for another group."""
        self.link.request.remote(what)

    def abort(self) -> None:
        """End the group now, or as soon as it has begun: workers die with the controller that owns them."""
        if self.aborted_at is None:
            self.aborted_at = time.monotonic()
            self._end_controller()

    def _end_controller(self) -> None:
        if self._controller is not None:
            ray.kill(self._controller)

    @property
    def begun(self) -> bool:
        """Whether its data are open and its controller is there, as far as the driver link answers."""
        reading = "data" in self._threads and self._threads["data"].is_alive()
        return self._silent or (self._announced and not reading)

    def close(self) -> None:
        """Let go of the driver link, and of the controller, which would stay for ever: it holds a handle of itself."""
        with contextlib.suppress(RayError):
            self._end_controller()
            ray.kill(self.link)
