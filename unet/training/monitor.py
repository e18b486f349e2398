"""What passes between the driver and the workers while a run goes on: news one way, a wish to end the other."""

import time
from dataclasses import dataclass

import ray

LIVE_SECONDS = 0.5


@dataclass(frozen=True)
class Live:
    """The state of the step under way, for the progress line.

    Attributes:
        epoch, step: from 1; `step` within the epoch.
        steps: in the epoch.
        phase: "train", "val" or "test".
        loss: mean per pixel over the epoch so far.
        images_per_second, data_wait_fraction: over the epoch so far.
        seconds_per_step: for the time left.
    """

    epoch: int
    step: int
    steps: int
    phase: str
    loss: float | None = None
    images_per_second: float | None = None
    data_wait_fraction: float | None = None
    seconds_per_step: float | None = None


@ray.remote(num_cpus=0)
class Monitor:
    """A mailbox owned by the driver; dies with it."""

    def __init__(self):
        self._live, self._events, self._wish = {}, [], None

    def live(self, run: str, live: Live) -> str | None:
        """Rank 0 of a run says where it is; answers whether it should save and "stop" or "leave"."""
        self._live[run] = live
        return self._wish

    def event(self, kind: str, content) -> None:
        self._events.append((kind, content))

    def wish(self, what: str) -> None:
        self._wish = what

    def poll(self, seen: int = 0) -> tuple[dict[str, Live], list[tuple]]:
        """Where each run is, and the events after the first `seen`."""
        return self._live, self._events[seen:]


class Line:
    """Rank 0's end of the line to the monitor; never waits inside a step. Other ranks keep silent."""

    def __init__(self, monitor, run: str, rank: int = 0):
        self._monitor, self._run, self._speaks = monitor, run, rank == 0
        self._pending, self._last, self.wish = None, 0.0, None

    def live(self, live: Live) -> None:
        if not self._speaks:
            return
        if self._pending is not None and ray.wait([self._pending], timeout=0)[0]:
            self.wish = ray.get(self._pending)
            self._pending = None
        if self._pending is None and time.monotonic() - self._last >= LIVE_SECONDS:
            self._last = time.monotonic()
            self._pending = self._monitor.live.remote(self._run, live)

    def event(self, kind: str, content=None) -> None:
        """Delivered before this returns: what follows may be the end of the process."""
        if self._speaks:
            ray.get(self._monitor.event.remote(kind, content))
