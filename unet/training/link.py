"""What passes between the driver and the workers while a run goes on: news one way, a wish to end the other."""

import asyncio
import time

import ray

from unet.progress import Live

LIVE_SECONDS = 0.5


@ray.remote(num_cpus=0, enable_task_events=False)  # Ray would keep one of each poll
class Monitor:
    """A mailbox owned by the driver; dies with it. It is there at once as long as it imports little."""

    def __init__(self):
        self._live, self._events, self._wish, self._wished = {}, [], None, asyncio.Event()
        self._told = 0
        self._reading, self._given = None, asyncio.Event()

    async def live(self, run: str, live: Live) -> None:
        """Rank 0 of a run says where it is."""
        self._live[run] = live

    async def event(self, kind: str, content) -> None:
        self._events.append((kind, content))

    async def wish(self, what: str) -> None:
        """Have the workers save after their step and "stop" or "leave"."""
        self._wish = what
        self._wished.set()

    async def wished(self) -> str:
        """That wish, as soon as there is one."""
        await self._wished.wait()
        return self._wish

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
        del self._events[: max(0, seen - self._told)]
        self._told = max(seen, self._told)
        return self._live, list(self._events)


class Line:
    """Rank 0's end of the line to the monitor; never waits inside a step. Other ranks keep silent."""

    def __init__(self, monitor, run: str, rank: int = 0):
        self._monitor, self._run, self._speaks = monitor, run, rank == 0
        self._wished, self._last = self._monitor.wished.remote() if rank == 0 else None, 0.0

    @property
    def wish(self) -> str | None:
        """What the driver wishes by now."""
        return ray.get(self._wished) if ray.wait([self._wished], timeout=0)[0] else None

    def live(self, live: Live) -> None:
        if self._speaks and time.monotonic() - self._last >= LIVE_SECONDS:
            self._last = time.monotonic()
            self._monitor.live.remote(self._run, live)

    def event(self, kind: str, content=None) -> None:
        """Delivered before this returns: what follows may be the end of the process."""
        if self._speaks:
            ray.get(self._monitor.event.remote(kind, content))
