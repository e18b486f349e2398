"""One start of the workers: a trainer of Ray Train in a thread, and the mailbox through which they speak.

Ray Train is told to restart nothing: a group that ends in any other way than by itself is replaced by a new one, by
`unet.training.supervisor`, which so decides alike about workers, controller, nodes and hangs.
"""

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unet.data.ingest import Ingest, OrderedData
from unet.training.backend import TensorflowBackendConfig
from unet.training.loop import Job
from unet.training.monitor import Live, Monitor
from unet.training.resources import Plan
from unet.training.worker import train_worker


@dataclass
class _Announce(ControllerCallback):
    """Tells the driver who the controller is, which it may have to end."""

    monitor: ray.actor.ActorHandle

    def after_controller_start(self, train_run_context) -> None:
        ray.get(self.monitor.event.remote("controller", ray.get_runtime_context().current_actor))


class Group:
    """Workers under way.

    Attributes:
        nodes: ids of the nodes that they run on, as far as they have said so.
        error: what they failed with, once `ended`.
        aborted_at: when they were ended, of `time.monotonic`; None before.
    """

    def __init__(self, name: str, plan: Plan, callbacks: tuple, debug: bool):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.monitor = Monitor.options(scheduling_strategy=here).remote()
        self.nodes: set[str] = set()
        self.error: BaseException | None = None
        self.aborted_at: float | None = None
        self._name, self._plan, self._callbacks, self._debug = name, plan, callbacks, debug
        self._seen, self._controller = 0, None
        self._thread: threading.Thread | None = None

    def start(self, job: Job, read: Callable[[], Ingest]) -> None:
        """Begin, in a thread, since there Ray leaves the handling of signals to us. `read` opens the data in it."""
        self._thread = threading.Thread(target=self._fit, args=(job, read), name="fit", daemon=True)
        self._thread.start()

    def _fit(self, job: Job, read: Callable[[], Ingest]) -> None:
        # A name of its own for every start: Ray would silently continue from its snapshot of the same name.
        scratch = Path(os.environ.get("TMPDIR", "/tmp")) / f"unet-ray-{uuid.uuid4().hex[:8]}"
        plan = self._plan
        try:
            DataParallelTrainer(
                train_worker,
                train_loop_config={"job": job},
                backend_config=TensorflowBackendConfig(),
                scaling_config=ScalingConfig(
                    num_workers=plan.num_workers,
                    use_gpu=plan.use_gpu,
                    resources_per_worker={"CPU": plan.cpus_per_worker} | ({"GPU": 1} if plan.use_gpu else {}),
                ),
                run_config=RunConfig(
                    name=self._name,
                    storage_path=str(scratch),
                    failure_config=FailureConfig(max_failures=0),
                    callbacks=[*self._callbacks, _Announce(self.monitor)],
                    logging_config=LoggingConfig(log_level="DEBUG" if self._debug else "ERROR"),
                ),
                datasets={"train": ray.data.range(1)},  # its place only: `OrderedData` gives the shards
                dataset_config=OrderedData(read()),
            ).fit()
        except BaseException as error:
            self.error = error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @property
    def ended(self) -> bool:
        return self._thread is not None and not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Return when the group has ended, at the latest after so long."""
        self._thread.join(seconds)

    def news(self, run: str) -> tuple[Live | None, list[tuple]]:
        """Where the run is, and what has happened since the last call."""
        try:
            lives, events = ray.get(self.monitor.poll.remote(self._seen))
        except RayActorError:
            return None, []  # the workers notice as well, and end
        self._seen += len(events)
        for kind, content in events:
            if kind == "controller":
                self._controller = content
            elif kind == "worker":
                self.nodes.add(content)
        return lives.get(run), [event for event in events if event[0] not in ("controller", "worker")]

    def wish(self, what: str) -> None:
        """Have the workers save after their step and end: "stop" for good, or "leave" for another group."""
        self.monitor.wish.remote(what)

    def abort(self) -> None:
        """End the group now, or as soon as it has begun: workers die with the controller that owns them."""
        if self._controller is not None and self.aborted_at is None:
            ray.kill(self._controller)
            self.aborted_at = time.monotonic()

    def close(self) -> None:
        """Let go of the mailbox."""
        with contextlib.suppress(RayError):
            ray.kill(self.monitor)
