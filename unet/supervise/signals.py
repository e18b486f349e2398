"""Ctrl-C and the end of a submitted job, as an event to look at instead of an interrupt."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set in the block; a second SIGINT is the usual KeyboardInterrupt.

    Signals reach the main thread only: elsewhere (a trial of a sweep) the event is never set.
    """
    event, before = threading.Event(), {}

    def handle(number, frame):
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
