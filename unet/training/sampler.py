"""What a node does while a run trains on it: processor, memory, disk, network and GPUs, read in a thread.

Why: docs/decisions.md#what-nodes-do-is-sampled-by-a-worker
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import psutil

SAMPLE_SECONDS = 10.0
LEAST_SECONDS = 1.0
"""A shorter last sample would be noise."""


@contextlib.contextmanager
def sampling(send: Callable[[dict[str, float]], None]) -> Iterator[None]:
    """Send what the node does every ten seconds, and once more at the end."""
    ended = threading.Event()
    thread = threading.Thread(target=_sample, args=(send, ended), name="sampler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(SAMPLE_SECONDS)


def _sample(send: Callable[[dict[str, float]], None], ended: threading.Event) -> None:
    gauges = Gauges()
    while not ended.wait(SAMPLE_SECONDS):
        send(gauges.read())
    if gauges.seconds >= LEAST_SECONDS:
        send(gauges.read())


class Gauges:
    """The gauges of this node, as its kernel and NVIDIA's driver show them; of one thread, as psutil wants it."""

    def __init__(self):
        self._gpus = _gpus()
        psutil.cpu_percent()  # which begins to count
        self._traffic, self._at = psutil.net_io_counters(), time.monotonic()

    @property
    def seconds(self) -> float:
        """Since they were read last."""
        return time.monotonic() - self._at

    def read(self) -> dict[str, float]:
        """What they show, in the names and units of MLflow's own; processor and network since the last reading."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
        before, self._traffic = self._traffic, psutil.net_io_counters()
        seconds, self._at = self.seconds, time.monotonic()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes_per_second": (self._traffic.bytes_recv - before.bytes_recv) / seconds / 1e6,
            "network_transmit_megabytes_per_second": (self._traffic.bytes_sent - before.bytes_sent) / seconds / 1e6,
        }
        for index, gpu in enumerate(self._gpus):
            found |= {f"gpu_{index}_{name}": value for name, value in _read_gpu(gpu).items()}
        return found


def _gpus() -> list:
    """NVML's handles of the node's GPUs; none without NVIDIA's driver, or without its Python package."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _read_gpu(gpu) -> dict[str, float]:
    """What one GPU shows, without what its model cannot."""
    import pynvml

    found: dict[str, float] = {}
    with contextlib.suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        found["memory_usage_megabytes"] = memory.used / 1e6
        found["memory_usage_percentage"] = 100 * memory.used / memory.total
    with contextlib.suppress(pynvml.NVMLError):
        found["utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
    with contextlib.suppress(pynvml.NVMLError):
        found["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    return found
