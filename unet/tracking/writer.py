"""The one queue of calls to MLflow: they return at once, and a thread makes them when the store answers.

Why: docs/decisions.md#an-asynchronous-writer-for-mlflow
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from unet.errors import InputError, first_line
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.tracking.library import load_mlflow
from unet.tracking.reach import default_uri
from unet.tracking.run_writer import Call, RunWriter
from unet.tracking.store import Store, refused

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds from a failed attempt to the next, doubled each time."""
HANG_SECONDS = 120.0
"""How long `deliver` waits for an attempt without an answer; for that of a file as long as it may take."""
SLOW_SECONDS = 5.0
"""A first failure that took longer is reported at once; a quick one is tried again first."""


class AsyncWriter(RunWriter):
    """The calls of one run, and of others below it (`child`): a queue for all, in the order in which they are given.

    A training has one run; a sweep has one with a child for each trial. All methods but the thread's own belong to
    the main thread. What is given here is also in the run's folder, so whatever is left when the process ends is not
    lost (`unet.tracking.send`, `unet.tuning.sweep_runs`).

    Attributes:
        uri: of the store.
        reason: why the last attempt that failed did, as text; "" before.
    """

    def __init__(self, storage: Folder, experiment: str, uri: str | None, say: Callable[[str], None]):
        super().__init__(self._append)
        self.uri, self.reason = uri or default_uri(storage), ""
        self._name, self._say = f"MLflow at {without_secrets(self.uri)}", say
        self._store: Store | None = None
        self._calls: deque[Call] = deque()
        self._files: deque[Call] = deque()
        self._words: list[str] = []
        self._error: Exception | None = None
        self._attempts, self._failures, self._refusals = 0, 0, 0
        self._taken_at = time.monotonic()
        self._away: set[bool] = set()
        self._hurry = self._closed = self._opened = False
        self._changed = threading.Condition()
        self._connect = lambda: Store(storage, experiment, uri)
        self._append(Call(self, lambda store: None, needed=True))  # to open the store

    def open(self) -> None:
        """Begin to deliver. MLflow takes a second to load; nothing is sent before."""
        if not self._opened:
            self._opened = True
            load_mlflow()  # not in the thread: beside other imports of the main one it might meet half-loaded modules
            threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    def child(self) -> RunWriter:
        """A run below this one, which is to be started first."""
        return RunWriter(self._append, self)

    def _append(self, call: Call) -> None:
        with self._changed:
            if not call.run.lost:
                call.run.waiting += 1
                self._calls.append(call)
                self._changed.notify_all()

    def drop(self, run: RunWriter) -> None:
        """Forget the calls of a run that have not been made."""
        with self._changed:
            self._calls = deque(call for call in self._calls if call.run is not run)
            self._files = deque(call for call in self._files if call.run is not run)
            run.waiting = 0
            self._changed.notify_all()

    # Waiting.

    def check(self, seconds: float) -> None:
        """Wait for the first attempt to use the store.

        Raises:
            InputError: it can never be used.
        """
        self.open()
        with self._changed:
            self._changed.wait_for(lambda: self._attempts, seconds)
            if isinstance(self._error, InputError):
                raise self._error

    def deliver(self, seconds: float, at_most: float = float("inf"), until: threading.Event | None = None) -> bool:
        """Wait until the store has accepted everything; whether it has.

        Gives up when the store has accepted nothing for `seconds` and attempts fail, when one hangs, after `at_most`
        in any case, and when `until` is set.
        """
        return self._wait(lambda: not (self._calls or self._files), seconds, at_most, until) and not self._refusals

    @property
    def refuses(self) -> bool:
        """Whether the store has accepted everything but what it refuses, and would again."""
        with self._changed:
            return bool(self._refusals) and not (self._calls or self._files)

    def reach(self, seconds: float, at_most: float = float("inf"), until: threading.Event | None = None) -> bool:
        """Wait until `run_id` is known, as `deliver` does; whether it is."""
        return self._wait(lambda: self.run_id is not None, seconds, at_most, until)

    def _wait(self, done: Callable[[], bool], seconds: float, at_most: float, until: threading.Event | None) -> bool:
        self.open()
        began = time.monotonic()
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
        ended = False
        while not ended:
            with self._changed:
                self._changed.wait_for(done, 0.2)
                now = time.monotonic()
                waited = now - max(began, self._taken_at)
                sending = self._store.file_seconds if self._store else None
                fails = bool(self._failures) and not sending and waited > seconds
                # MLflow tries twice.
                hangs = waited > max(seconds, HANG_SECONDS, 2 * (sending or 0))
                stopped = until is not None and until.is_set()
                ended = done() or fails or hangs or stopped or now - began > at_most
            self.receive()
        return done()

    def receive(self) -> None:
        """Show what the thread has to say about the store."""
        with self._changed:
            words, self._words = self._words, []
        for sentence in words:
            self._say(sentence)

    def close(self) -> None:
        """End the thread after the attempt in progress; what is left stays in the run's folder."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # The thread.

    def _work(self) -> None:
        while (call := self._next()) is not None:
            began = time.monotonic()
            try:
                self._store = self._store or self._connect()
                call.make(self._store)
            except Exception as error:  # whatever its library raises must not reach the job
                self._failed(call, error, time.monotonic() - began)
            else:
                self._taken(call)

    def _next(self) -> Call | None:
        """The call to make now, after a pause where the last one failed; None at the end."""
        with self._changed:
            if self._failures:
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self._failures - 1))
                only_files = not self._calls
                self._changed.wait_for(lambda: self._closed or self._hurry or (only_files and self._calls), pause)
                self._hurry = False
            self._changed.wait_for(lambda: self._closed or self._calls or self._files)
            if self._closed:
                return None
            return self._calls[0] if self._calls else self._files[0]

    def _taken(self, call: Call) -> None:
        with self._changed:
            self._finish(call)
            self._attempts, self._failures, self._taken_at = self._attempts + 1, 0, time.monotonic()
            if call.file in self._away:
                self._away.remove(call.file)
                self._words.append(f"{self._name} answers again: sending what was queued.")
            self._changed.notify_all()

    def _failed(self, call: Call, error: Exception, seconds: float) -> None:
        logging.getLogger(__name__).debug("MLflow: %s", without_secrets(str(error)))
        with self._changed:
            self._attempts, self._error = self._attempts + 1, error
            self.reason = without_secrets(first_line(_root(error)))[:300]
            # Without the first run there is nothing to do but try again; without a child, all the rest.
            if (refused(error) or _is_ours(error)) and not (call.needed and call.run is self):
                self._refuse(call)
            else:
                self._hold_back(call, seconds)
            self._changed.notify_all()

    def _refuse(self, call: Call) -> None:
        if not self._refusals:
            self._words.append(f"{self._name} refuses part of the run ({self.reason}).")
        self._refusals += 1
        call.run.refused += 1
        self._finish(call)
        if call.needed:
            self.drop(call.run)

    def _hold_back(self, call: Call, seconds: float) -> None:
        if call.file:
            if self._remove(call):
                self._files.append(call)
            if self._calls:  # these first, at once
                return
        self._failures += 1
        if call.file not in self._away and (self._failures > 1 or seconds > SLOW_SECONDS):
            self._away.add(call.file)
            how = "does not accept files" if call.file else "does not answer"
            if isinstance(self._error, InputError):
                how = "cannot be used"
            self._words.append(f"{self._name} {how} ({self.reason}): the job goes on, and what it sends is queued.")

    def _finish(self, call: Call) -> None:
        if self._remove(call):
            call.run.waiting -= 1

    def _remove(self, call: Call) -> bool:
        """Take a call that was made from where it waited; whether it was there: `drop` may have been quicker."""
        for calls in (self._calls, self._files):
            if calls and calls[0] is call:
                calls.popleft()
                return True
        return False


def _is_ours(error: Exception) -> bool:
    """Whether this program has made a mistake, which it would make again: it must not hold up what else there is."""
    return isinstance(error, TypeError | AssertionError)


def _root(error: BaseException) -> BaseException:
    """What an error of MLflow comes from, which says it in fewer words: the refused connection, the locked file."""
    while not isinstance(error, InputError) and (cause := error.__cause__ or error.__context__):
        error = cause
    return error


class Untracked:
    """Stands in for an `AsyncWriter` where another process writes the run: a sweep writes those of its trials."""

    run_id = experiment_id = None

    def epoch(self, *args, **kwargs) -> None:
        """Nothing, as with all that would be sent."""

    open = tags = status = receive = deliver = close = file = epoch
