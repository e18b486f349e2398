"""A sweep's MLflow runs: written where the sweep stands, kept back where the store is away."""

import logging
from collections.abc import Callable
from typing import Any

from unet.errors import InputError
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.tracking.store import Store


class Tracker(Store):
    """A run of a sweep: every call but `start` that fails is remembered and made again by `deliver`."""

    def __init__(self, storage: Folder, experiment: str, uri: str | None = None):
        self._outbox: list[Callable[[], Any]] = []
        self._files: list[Callable[[], Any]] = []
        try:
            super().__init__(storage, experiment, uri)
        except InputError:
            raise
        except Exception as error:  # whatever the store's library raises
            raise self.unusable(error) from error

    def start(self, *args, **kwargs) -> str:
        run_id = super().start(*args, **kwargs)
        self.client.update_run(run_id, status="RUNNING")
        return run_id

    def of_run(self, run_id: str | None) -> "Tracker":
        other = super().of_run(run_id)
        other._outbox, other._files = [], []
        return other

    def _make(self, call: Callable[[], Any], file: bool = False) -> None:
        # Files apart from the rest: a store whose files cannot be written takes metrics all the same.
        (self._files if file else self._outbox).append(call)
        self.deliver()

    def deliver(self) -> bool:
        """Make the calls that are waiting, in their order; whether none is left."""
        for waiting in (self._outbox, self._files):
            while waiting:
                try:
                    waiting[0]()
                except Exception as error:
                    # Any failure of the store, whatever its library raises, must not reach the sweep.
                    logging.getLogger(__name__).debug("MLflow: %s", without_secrets(str(error)))
                    break
                waiting.pop(0)
        return not (self._outbox or self._files)
