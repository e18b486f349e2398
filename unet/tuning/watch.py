"""Ends the process of a trial that hangs, so that Tune tries it again from its checkpoint in another one."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator

LOOK_SECONDS = 1.0
HUNG = 75
"""Exit code of a process that ended this way."""


class Watch:
    """A watch over work in steps: when none has ended for `seconds`, this process ends.

    It runs in a thread of the process itself, so it notices a step that never returns, but not that the whole process
    is stopped.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._moved: float | None = None  # None: no work in progress
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def moved(self) -> None:
        """A step has ended."""
        if self._moved is not None:
            self._moved = time.monotonic()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Watch during the block."""
        self._moved = time.monotonic()
        try:
            yield
        finally:
            self._moved = None

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            moved = self._moved
            if moved is not None and time.monotonic() - moved > self.seconds:
                os._exit(HUNG)  # not a clean exit: whatever hangs would prevent it
