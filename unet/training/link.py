"""What passes between driver and workers while a run goes on: progress and events one way, requests the other."""

import asyncio
import time

import ray

from unet.progress import Live

LIVE_SECONDS = 0.5


@ray.remote(num_cpus=0, enable_task_events=False)  # Ray would keep one of each poll
class DriverLink:
    """A driver link owned by the driver; dies with it. It is there at once as long as it imports little."""

    def __init__(self):
        self._live, self._events, self._request, self._requested = {}, [], None, asyncio.Event()
        self._seen = 0
        self._reading, self._given = None, asyncio.Event()

    async def live(self, run: str, live: Live) -> None:
        """Rank 0 of a run says where it is."""
        self._live[run] = live

    async def event(self, kind: str, content) -> None:
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

    async def poll(self, seen: int = 0) -> tuple[dict[str, Live], list[tuple]]:
        """Where each run is, and the events after the first `seen`, which are kept no longer."""
        del self._events[: max(0, seen - self._seen)]
        self._seen = max(seen, self._seen)
        return self._live, list(self._events)


class WorkerLink:
    """Rank 0's end of the line to the link; never waits inside a step. Other ranks keep silent."""

    def __init__(self, link, run: str, rank: int = 0):
        self._link, self._run, self._speaks = link, run, rank == 0
        self._requested, self._last = self._link.requested.remote() if rank == 0 else None, 0.0

    @property
    def request(self) -> str | None:
        """What the driver has asked for by now."""
        return ray.get(self._requested) if ray.wait([self._requested], timeout=0)[0] else None

    def live(self, live: Live) -> None:
        if self._speaks and time.monotonic() - self._last >= LIVE_SECONDS:
            self._last = time.monotonic()
            self._link.live.remote(self._run, live)

    def event(self, kind: str, content=None) -> None:
        """Delivered before this returns: what follows may be the end of the process."""
        if self._speaks:
            ray.get(self._link.event.remote(kind, content))
