"""What passes between driver and workers while a run goes on: progress and events one way, requests the other."""

import asyncio
import contextlib
import socket
import time
from typing import Any

import ray
from ray.exceptions import RayError

from unet.progress import Live

LIVE_SECONDS, SAMPLE_TIMEOUT = 0.5, 5
SAMPLE = "sample"
"""The kind of event that is no progress: a node whose worker hangs is sampled on."""
News = tuple[dict[str, Live], list[tuple[str, Any]]]
"""Where each run is, by its folder, and events: their kind and content."""


class DriverLink:
    """An actor of the driver, which dies with it. It is there at once as long as it imports little."""

    def __init__(self) -> None:
        self._live: dict[str, Live] = {}
        self._events: list[tuple[str, Any]] = []
        self._seen = 0
        self._request, self._requested = "", asyncio.Event()
        self._reading: list[ray.ObjectRef] = []
        self._given = asyncio.Event()

    async def live(self, run: str, live: Live) -> None:
        """Rank 0 of a run says where it is."""
        self._live[run] = live

    async def event(self, kind: str, content: Any) -> None:
        self._events.append((kind, content))

    async def request(self, what: str) -> None:
        """Have the workers save after their step and "stop" or "leave"."""
        self._request = what
        self._requested.set()

    async def requested(self) -> str:
        """That request, as soon as there is one."""
        await self._requested.wait()
        return self._request

    async def give(self, reading: list[ray.ObjectRef]) -> None:
        """Let the workers have the data that are kept in memory: a reference in a list, which Ray leaves alone."""
        self._reading = reading
        self._given.set()

    async def reading(self) -> list[ray.ObjectRef]:
        """That list, as soon as it is there."""
        await self._given.wait()
        return self._reading

    async def now(self) -> float:
        """The time here, where the driver is, in seconds since 1970."""
        return time.time()

    async def poll(self, seen: int = 0) -> "News":
        """Where each run is, and the events after the first `seen`, which are kept no longer."""
        del self._events[: max(0, seen - self._seen)]
        self._seen = max(seen, self._seen)
        return self._live, list(self._events)


def start_link(**options: Any) -> ray.actor.ActorHandle:
    """A new `DriverLink`, with Ray's options for an actor."""
    # Ray would keep an event of each poll.
    actor = ray.remote(num_cpus=0)(DriverLink)
    return actor.options(enable_task_events=False, **options).remote()  # type: ignore[return-value]  # it is a handle


class WorkerLink:
    """A worker's end of the link, of a run by its folder; never waits inside a step. All but rank 0 keep silent."""

    def __init__(self, link: ray.actor.ActorHandle, run: str, rank: int = 0):
        self._link, self._run, self._speaks, self._last = link, run, rank == 0, 0.0
        self._requested: ray.ObjectRef | None = link.requested.remote() if rank == 0 else None
        self._ahead: float | None = None

    @property
    def request(self) -> str | None:
        """What the driver has asked rank 0 for by now: "stop", "leave", or nothing."""
        if self._requested is None or not ray.wait([self._requested], timeout=0)[0]:
            return None
        return ray.get(self._requested)

    def now(self) -> float:
        """The time by the driver's clock, in seconds since 1970: that of this machine may be minutes off."""
        if self._ahead is None:
            began = time.time()
            answer: ray.ObjectRef[float] = self._link.now.remote()
            there = ray.get(answer)
            self._ahead = there - (began + time.time()) / 2
        return time.time() + self._ahead

    def live(self, live: Live) -> None:
        if self._speaks and time.monotonic() - self._last >= LIVE_SECONDS:
            self._last = time.monotonic()
            self._link.live.remote(self._run, live)

    def event(self, kind: str, content: Any = None) -> None:
        """Delivered before this returns: what follows may be the end of the process."""
        if self._speaks:
            ray.get(self._link.event.remote(kind, content))

    def sample(self, values: dict[str, float]) -> None:
        """What this worker's node does, whatever its rank; lost where the link does not answer."""
        with contextlib.suppress(RayError):
            ray.get(self._link.event.remote(SAMPLE, (socket.gethostname(), values)), timeout=SAMPLE_TIMEOUT)


def not_finite(content: dict) -> str:
    """The event of the same name as a sentence."""
    samples = content["samples"]
    more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
    return (
        f"The numbers stopped being finite at step {content['step']} of epoch {content['epoch']} (loss "
        f"{content['loss']}, gradient norm {content['grad_norm']}). The batch: {', '.join(samples[:8])}{more}."
    )
