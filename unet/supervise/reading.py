"""What a run's groups of workers read, one after another: the data are kept in memory once for all of them."""

from dataclasses import dataclass, replace

from unet.cluster import planner
from unet.cluster.nodes import away_from_silent, live_nodes
from unet.data.ingest import Ingest, keep
from unet.runs.state import State


@dataclass
class Reading:
    """A run's data.

    Attributes:
        ingest: where the group under way reads from; at first the run's beginning.
        nodes: ids of those that lived when the data were kept.
    """

    ingest: Ingest
    nodes: frozenset[str] = frozenset()

    def begin(self, state: State | None, plan: planner.Plan) -> Ingest:
        """The data from a checkpoint's place in their order on, read as planned."""
        # What was kept may have gone with a node.
        kept = self.ingest.kept if live_nodes().keys() >= self.nodes else None
        start = (state.epoch, state.epoch_step) if state else (1, 0)
        # A run goes on in the order that it began with.
        window = state.window if state else None
        self.ingest = replace(
            self.ingest,
            start=start,
            memory=plan.stream_bytes,
            tasks=plan.stream_tasks,
            kept=kept,
            window=window,
            label_selector=away_from_silent(),
        )
        return self.ingest

    def keep(self) -> Ingest:
        """The same with all that is trained and validated on in memory."""
        if self.ingest.kept is None:
            self.nodes = frozenset(live_nodes())
            self.ingest = keep(self.ingest)
        return self.ingest
