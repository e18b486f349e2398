"""What a training tells Prometheus while it goes on, through Ray: the agent of each node exports it as `ray_unet_…`.

A loop only adds up; a thread hands over what there is, so no step waits for it.

Why: docs/decisions.md#meters-are-read-by-a-thread
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields

EXPORT_SECONDS = 5.0
"""Ray forgets a gauge that nobody has set for twenty seconds, and passes on what it has every ten."""


@dataclass
class Meters:
    """The meters of one process. What begins at 0 only grows (a counter, `_total` in Prometheus); what begins at None
    is shown as it is, once it is known (a gauge).

    Attributes:
        steps: of training, as `speed/images_per_second` counts them: without the first, which traces the graph.
        step_seconds: in these steps, with the sum over the workers, in which each waits for the slowest.
        step_cpu_seconds: of the processor, of this process, during these steps.
        data_wait_seconds: waited for the batches of these steps.
        images: this worker's share of the batches of these steps.
        checkpoints: written, or put off while the storage is away.
        checkpoint_seconds: waited for them, by every worker.
        loss: of the last step, over the global batch.
        val_mean_iou: of the last epoch.
        restarts: of the run, over all its starts.
    """

    steps: float = 0
    step_seconds: float = 0
    step_cpu_seconds: float = 0
    data_wait_seconds: float = 0
    images: float = 0
    checkpoints: float = 0
    checkpoint_seconds: float = 0
    loss: float | None = None
    val_mean_iou: float | None = None
    restarts: float | None = None

    def stepped(self, images: int, waiting: float, stepping: float, computing: float) -> None:
        """A step of so many images, and its seconds: before it, in it, and of the processor."""
        self.steps += 1
        self.images += images
        self.data_wait_seconds += waiting
        self.step_seconds += stepping
        self.step_cpu_seconds += computing

    def saved(self, seconds: float) -> None:
        """A checkpoint that was waited for so long."""
        self.checkpoints += 1
        self.checkpoint_seconds += seconds


@contextlib.contextmanager
def exported(meters: Meters, run: str, rank: str) -> Iterator[None]:
    """Hand over the meters during the block, and once more at its end; `rank` is that of a worker, or "driver"."""
    ended = threading.Event()
    thread = threading.Thread(target=_export, args=(meters, run, rank, ended), name="meters", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(EXPORT_SECONDS)


def _export(meters: Meters, run: str, rank: str, ended: threading.Event) -> None:
    from ray.util.metrics import Counter, Gauge

    labels, told = {"run": run, "rank": rank}, Meters()
    kinds = {each.name: Gauge if each.default is None else Counter for each in fields(Meters)}
    known = {name: kind(f"unet_{name}", tag_keys=tuple(labels)) for name, kind in kinds.items()}
    last = False
    while not last:
        last = ended.wait(EXPORT_SECONDS)
        for name, metric in known.items():
            value = getattr(meters, name)
            if isinstance(metric, Gauge):
                if value is not None:
                    metric.set(value, labels)
            elif value > (before := getattr(told, name)):
                metric.inc(value - before, labels)
                setattr(told, name, value)
