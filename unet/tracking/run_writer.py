"""One run's calls to MLflow, which return at once: a queue makes them."""

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from unet.data.shards import Prepared
from unet.storage import Folder
from unet.tracking.logged_models import Models, reconcile
from unet.tracking.store import Store
from unet.tracking.stored_run import StoredRun


@dataclass(frozen=True, eq=False)
class Call:
    """What is to be done with the store.

    Attributes:
        run: whose call it is.
        make: does it.
        needed: the run's other calls are of no use without it.
        file: it steps aside when it fails: a store that cannot write files still accepts metrics.
    """

    run: "RunWriter"
    make: Callable[[Store], object]
    needed: bool = False
    file: bool = False


class RunWriter:
    """One run's calls, in the order in which they are given. What was given once is left out.

    Attributes:
        run_id, experiment_id: of the MLflow run, once the store has answered.
        waiting: how many calls have not been made.
        refused: how many the store has refused, and would again.
    """

    def __init__(self, put: Callable[[Call], None], parent: "RunWriter | None" = None):
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.waiting = self.refused = 0
        self._queue, self._parent = put, parent
        self._given: set[Hashable] = set()

    @property
    def taken(self) -> bool:
        """Whether MLflow has accepted all that was given."""
        return not (self.waiting or self.refused)

    @property
    def lost(self) -> bool:
        """Whether the store has refused to have the run at all."""
        return bool(self.refused) and self.run_id is None

    def start(
        self, run_name: str, run_id: str | None, params: dict, tags: dict, key: str, started: int | None = None
    ) -> None:
        """As `StoredRun.start`; then `run_id` is known."""

        def start(run: StoredRun) -> None:
            above = self._parent.run_id if self._parent else None
            self.experiment_id = run.store.experiment_id
            self.run_id = run.start(run_name, run_id, tags, above, key, started)

        self._put(start, needed=True, once="start")
        self._put(lambda run: run.params(params), once="params")

    def single(self, key: str) -> None:
        self._put(lambda run: run.single(key))

    def data(self, prepared: Prepared) -> None:
        self._put(lambda run: run.data(prepared), file=True, once="data")

    def epoch(self, *records: dict) -> None:
        """Lines of `metrics.jsonl` and `system.jsonl`."""
        lines = {json.dumps(record): record for record in records}
        new = [record for line, record in lines.items() if line not in self._given]
        self._given |= lines.keys()
        if new:
            self._put(lambda run: run.epoch(*new))

    def metrics(self, values: dict[str, float], step: int, time_ms: int) -> None:
        self._put(lambda run: run.metrics(values, step, time_ms))

    def models(self, models: Models) -> None:
        """What MLflow is to have of the run's models."""
        self._put(lambda run: reconcile(run, models), file=True, once=("models", repr(models)))

    def tags(self, tags: dict) -> None:
        self._put(lambda run: run.tags(tags))

    def file(self, source: Folder, name: str, folder: str = "") -> None:
        self._put(lambda run: run.file(source, name, folder), file=True, once=(source.path, name, folder))

    def status(self, status: str, ended: int | None = None) -> None:
        self._put(lambda run: run.status(status, ended))

    def _put(
        self, make: Callable[[StoredRun], object], *, once: Hashable = None, needed: bool = False, file: bool = False
    ) -> None:
        if once is not None:
            if once in self._given:
                return
            self._given.add(once)
        self._queue(Call(self, lambda store: make(StoredRun(store, self.run_id)), needed, file))
