"""A training's calls to MLflow: they return at once, and a thread makes them in their order when the store answers."""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from unet.data.shards import Prepared
from unet.errors import InputError, first_line
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.tracking.library import load_mlflow
from unet.tracking.reach import default_uri
from unet.tracking.store import Store, refused

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds from a failed attempt to the next, doubled each time."""
HANG_SECONDS = 120.0
"""How long an attempt without an answer is waited for at the end; that of a file as long as it may take."""
SLOW_SECONDS = 5.0
"""An attempt that fails so late is said at once; one that fails fast is tried again first."""


@dataclass(frozen=True)
class _Call:
    """What is to be made of the store.

    Attributes:
        make: does it.
        needed: the rest is of no use without it, so it is made until it succeeds.
        file: steps aside when it fails: a store whose files cannot be written takes metrics all the same.
    """

    make: Callable[[Store], object]
    needed: bool = False
    file: bool = False


class AsyncWriter:
    """Brings one run's news to MLflow. All methods but the thread's own belong to the main thread.

    What is given here is also in the run's folder, so whatever is left when the process ends is not lost
    (`unet.tracking.send`).

    Attributes:
        uri: of the store.
        run_id: of the MLflow run, once the store has answered.
        reason: why the store did not take something the last time, as text.
    """

    def __init__(self, storage: Folder, experiment: str, uri: str | None, say: Callable[[str], None]):
        self.uri, self.run_id, self.reason = uri or default_uri(storage), None, None
        self._place, self._say = f"MLflow at {without_secrets(self.uri)}", say
        self._store: Store | None = None
        self._calls: deque[_Call] = deque()
        self._files: deque[_Call] = deque()
        self._given: set[Hashable] = set()
        self._words: list[str] = []
        self._error: Exception | None = None
        self._attempts, self._failures, self._refusals = 0, 0, 0
        self._taken_at = time.monotonic()
        self._away: set[bool] = set()
        self._hurry = self._closed = self._opened = False
        self._changed = threading.Condition()

        def connect(_) -> None:
            self._store = Store(storage, experiment, uri)

        self._put(connect, needed=True)

    def open(self) -> None:
        """Begin to deliver. MLflow takes a second to load, and so long nothing is sent yet."""
        if not self._opened:
            self._opened = True
            load_mlflow()  # not in the thread: beside other imports of the main one it might meet half-made modules
            threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    # Calls, in the order in which they are given.

    def start(self, run_name: str, run_id: str | None, params: dict, tags: dict, key: str, started: int) -> None:
        """As `Store.start`; then `run_id` is known."""

        def start(store: Store) -> None:
            self.run_id = store.start(run_name, run_id, {}, tags, key=key, started=started)

        self._put(start, needed=True, once="start")
        self._put(lambda store: store.params(params), once="params")

    def single(self, key: str) -> None:
        """Remove what a creation whose answer was lost may have left beside the run."""
        self._put(lambda store: store.find(key))

    def data(self, prepared: Prepared) -> None:
        self._put(lambda store: store.data(prepared), file=True, once="data")

    def epoch(self, *records: dict) -> None:
        """Lines of `metrics.jsonl`; those that were given before are left out."""
        lines = {json.dumps(record): record for record in records}
        new = [record for line, record in lines.items() if line not in self._given]
        self._given |= lines.keys()
        if new:
            self._put(lambda store: store.epoch(*new))

    def metrics(self, values: dict[str, float], step: int, time_ms: int) -> None:
        self._put(lambda store: store.metrics(values, step, time_ms))

    def tags(self, tags: dict) -> None:
        self._put(lambda store: store.tags(tags))

    def file(self, source: Folder, name: str, folder: str = "") -> None:
        self._put(lambda store: store.file(source, name, folder), file=True, once=(source.path, name, folder))

    def status(self, status: str, ended: int | None = None) -> None:
        self._put(lambda store: store.status(status, ended))

    def _put(self, make: Callable[[Store], object], *, once: Hashable = None, **kind: bool) -> None:
        if once is not None:
            if once in self._given:
                return
            self._given.add(once)
        with self._changed:
            self._calls.append(_Call(make, **kind))
            self._changed.notify_all()

    # Waiting.

    def check(self, seconds: float) -> None:
        """Wait for the first attempt to use the store.

        Raises:
            InputError: it can never be used so.
        """
        self.open()
        with self._changed:
            self._changed.wait_for(lambda: self._attempts, seconds)
            if isinstance(self._error, InputError):
                raise self._error

    def deliver(self, seconds: float, at_most: float = float("inf"), until: threading.Event | None = None) -> bool:
        """Wait until everything is taken; whether it is.

        Gives up when the store has taken nothing for `seconds` and attempts fail, when one hangs, after `at_most` in
        any case, and when `until` is set.
        """
        return self._wait(lambda: not (self._calls or self._files), seconds, at_most, until) and not self._refusals

    @property
    def refuses(self) -> bool:
        """Whether all is taken but what the store refuses, and would again."""
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
                waited, sending = now - max(began, self._taken_at), self._store and self._store.file_seconds
                fails = self._failures and not sending and waited > seconds
                # MLflow tries twice.
                hangs = waited > max(seconds, HANG_SECONDS, 2 * (sending or 0))
                ended = done() or fails or hangs or now - began > at_most or (until is not None and until.is_set())
            self.receive()
        return done()

    def receive(self) -> None:
        """Say what there is to say of the store."""
        with self._changed:
            words, self._words = self._words, []
        for sentence in words:
            self._say(sentence)

    def close(self) -> None:
        """End the thread after the attempt under way; what is left stays in the run's folder."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # The thread.

    def _work(self) -> None:
        while (call := self._next()) is not None:
            began = time.monotonic()
            try:
                call.make(self._store)
            except Exception as error:  # whatever its library raises must not reach the training
                self._failed(call, error, time.monotonic() - began)
            else:
                self._taken(call)

    def _next(self) -> _Call | None:
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

    def _taken(self, call: _Call) -> None:
        with self._changed:
            self._remove(call)
            self._attempts, self._failures, self._taken_at = self._attempts + 1, 0, time.monotonic()
            if call.file in self._away:
                self._away.remove(call.file)
                self._words.append(f"{self._place} answers again: what was kept back is being sent.")
            self._changed.notify_all()

    def _failed(self, call: _Call, error: Exception, seconds: float) -> None:
        logging.getLogger(__name__).debug("MLflow: %s", without_secrets(str(error)))
        with self._changed:
            self._attempts, self._error = self._attempts + 1, error
            self.reason = without_secrets(first_line(_root(error)))[:300]
            if refused(error) and not call.needed:
                self._remove(call)
                if not self._refusals:
                    self._words.append(f"{self._place} refuses a part of the run ({self.reason}).")
                self._refusals += 1
            else:
                self._keep_back(call, seconds)
            self._changed.notify_all()

    def _keep_back(self, call: _Call, seconds: float) -> None:
        if call.file:
            self._remove(call)
            self._files.append(call)
            if self._calls:  # these first, at once
                return
        self._failures += 1
        if call.file not in self._away and (self._failures > 1 or seconds > SLOW_SECONDS):
            self._away.add(call.file)
            how = "does not take the run's files" if call.file else "does not answer"
            if isinstance(self._error, InputError):
                how = "cannot be used"
            words = f"{self._place} {how} ({self.reason}): the training goes on, what is kept back is sent later."
            self._words.append(words)

    def _remove(self, call: _Call) -> None:
        (self._calls if self._calls and self._calls[0] is call else self._files).popleft()


def _root(error: BaseException) -> BaseException:
    """What an error of MLflow comes from, which says it in fewer words: the refused connection, the locked file."""
    while not isinstance(error, InputError) and (cause := error.__cause__ or error.__context__):
        error = cause
    return error


class Untracked:
    """Stands in for a `AsyncWriter` where somebody else writes the run: a sweep writes those of its trials."""

    run_id = None

    def epoch(self, *args, **kwargs) -> None:
        """Nothing, as with all that would be sent."""

    open = tags = status = receive = deliver = close = epoch
