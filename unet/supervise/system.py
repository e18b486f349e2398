"""What the nodes of a run's workers do: their samples become points, few enough for a chart however long it takes."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from unet.errors import StorageFailed
from unet.metric_names import of_node
from unet.runs.run import Run, milliseconds
from unet.training.sampler import SAMPLE_SECONDS

EVERY_SAMPLE, DOUBLED_AFTER = 60, 45
"""So many points have the distance of samples; from there on it doubles after so many more: 500 take a week."""


def seconds_between(points: int) -> float:
    """How long after so many points the next one comes."""
    return SAMPLE_SECONDS * 2 ** (max(0, points - EVERY_SAMPLE) / DOUBLED_AFTER)


@dataclass
class SystemMetrics:
    """Of one start of a run.

    Attributes:
        run: in whose folder `system.jsonl` is; its summary names the nodes.
        clock: in seconds.
        lines: the points of all starts, each with the means of all nodes since the one before.
    """

    run: Run
    clock: Callable[[], float] = time.monotonic
    lines: list[dict] = field(default_factory=list)
    _samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def __post_init__(self):
        self._last = self.clock()

    def open(self) -> None:
        """Go on after the points of earlier starts."""
        self.lines = self.run.system()

    def node(self, host: str) -> str:
        """The name of a node, which a host has at all starts."""
        nodes = self.run.summary.get("nodes") or {}
        if host not in nodes:
            nodes = nodes | {host: f"node_{len(nodes)}"}  # MLflow's UI draws nodes of such names into one chart
            with contextlib.suppress(StorageFailed):  # whatever is written of the summary next has this, too
                self.run.write_summary(nodes=nodes)
        return nodes[host]

    def called(self, host: str) -> str:
        """The same for a person, who may have to find the machine: `node_1 (ip-10-0-0-6)`."""
        return f"{self.node(host)} ({host})"

    def take(self, host: str, values: dict[str, float]) -> None:
        """A sample of the node with this host name."""
        self._samples.setdefault(self.node(host), []).append(values)

    def point(self, last: bool = False) -> bool:
        """Write down what the samples since the last point come to, if it is time, or the run ends; whether it was."""
        now = self.clock()
        if not self._samples or (now - self._last < seconds_between(len(self.lines)) and not last):
            return False
        at = milliseconds()
        line = {"step": max(1, (at - self.run.summary["started"]) // 1000), "time": at}
        for node, samples in sorted(self._samples.items()):
            line |= of_node(node, _means(samples))
        self.lines, self._samples, self._last = [*self.lines, line], {}, now
        with contextlib.suppress(StorageFailed):  # the next point writes this one too
            self.run.write_system(self.lines)
        return True


def _means(samples: list[dict[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.items():
            found.setdefault(name, []).append(value)
    return {name: round(sum(values) / len(values), 3) for name, values in found.items()}
