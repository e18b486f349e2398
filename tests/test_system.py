"""What nodes do: readings of this one, samples in a thread, and points that a chart can hold however long a run is."""

import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from conftest import tiny_settings

from unet.errors import StorageFailed
from unet.runs.run import Run
from unet.supervise import supervisor
from unet.supervise.system import SystemMetrics, seconds_between
from unet.training import sampler
from unet.training.link import SAMPLE

CPU, MEMORY = "cpu_utilization_percentage", "system_memory_usage_megabytes"
DAY = 86400


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def metrics_of(tmp_path, clock=None) -> SystemMetrics:
    """Of a new start of the run `watched`."""
    run = Run.load("watched", tiny_settings(tmp_path, tmp_path, run_name="watched"))
    run.start()
    metrics = SystemMetrics(run, clock or Clock())
    metrics.open()
    return metrics


def after(metrics: SystemMetrics, seconds: float, **values: float) -> bool:
    """A sample of the node `a`, so long after the one before; whether a point came of it."""
    metrics.clock.seconds += seconds
    metrics.take("a", values)
    return metrics.point()


@pytest.mark.parametrize(("days", "least", "most"), [(0.004, 34, 35), (1, 370, 390), (7, 500, 510), (30, 590, 620)])
def test_a_chart_has_few_points_however_long_a_run_takes(days, least, most):
    """Without files: the rule alone, at the rate of the samples."""
    points, last, now = 0, 0.0, 0.0
    while now < days * DAY:
        now += sampler.SAMPLE_SECONDS
        if now - last >= seconds_between(points):
            points, last = points + 1, now
    assert least <= points <= most


def test_a_point_is_the_mean_of_the_samples_since_the_last(tmp_path):
    metrics = metrics_of(tmp_path)
    metrics.lines = [{"step": 1, "time": 1}] * 105  # points are twenty seconds apart by now
    assert [after(metrics, 10, cpu=1.0, gpu=5.0), after(metrics, 10, cpu=2.0), after(metrics, 10, cpu=7.0)] == [0, 1, 0]
    metrics.clock.seconds += 0.25
    metrics.take("b", {"cpu": 4.0})
    assert metrics.point(last=True) and not metrics.point(last=True), "nothing came since"
    first, second = metrics.lines[105:]
    values = {name: value for name, value in first.items() if name not in ("step", "time")}
    assert values == {"system/node_0/cpu": 1.5, "system/node_0/gpu": 5.0}
    assert (second["system/node_0/cpu"], second["system/node_1/cpu"]) == (7.0, 4.0)
    assert first["step"] >= 1 and abs(first["time"] - 1000 * time.time()) < 60_000
    assert metrics.run.system() == metrics.lines


def test_a_restart_goes_on_at_the_rate_and_with_the_names_it_had(tmp_path):
    metrics = metrics_of(tmp_path)
    for host in ("b", "a"):
        metrics.take(host, {"cpu": 1.0})
    assert metrics.point(last=True)
    metrics.run.write_system(metrics.lines * 105)
    again = metrics_of(tmp_path)
    assert again.run.summary["nodes"] == {"b": "node_0", "a": "node_1"}
    assert [after(again, 10, cpu=3.0), after(again, 10, cpu=3.0)] == [False, True]
    again.clock.seconds += 25
    again.take("c", {"cpu": 9.0})
    assert again.point()
    assert len(again.run.system()) == 107
    assert [set(line) - {"step", "time"} for line in again.lines[-2:]] == [
        {"system/node_1/cpu"},
        {"system/node_2/cpu"},
    ]


def test_a_disk_that_fails_for_a_moment_loses_no_point_and_ends_nothing(tmp_path, monkeypatch):
    metrics = metrics_of(tmp_path)
    with monkeypatch.context() as patch:

        def full(self, name, *args, **options):
            raise StorageFailed("full")

        patch.setattr(type(metrics.run.folder), "write_bytes", full)
        began = time.monotonic()
        metrics.run.summary["nodes"] = {"a": "node_0"}
        assert after(metrics, 10, cpu=1.0)
        assert time.monotonic() - began < 1, "nothing waits for another attempt"
    assert metrics.run.system() == []
    assert after(metrics, 10, cpu=2.0)
    assert [line["system/node_0/cpu"] for line in metrics.run.system()] == [1.0, 2.0]


def test_the_gauges_show_this_machine():
    gauges = sampler.Gauges()
    until = time.monotonic() + 0.3
    while time.monotonic() < until:  # something to see
        pass
    found = gauges.read()
    assert 0 < found[CPU] <= 100
    assert found[MEMORY] == pytest.approx(psutil.virtual_memory().used / 1e6, rel=0.3)
    assert 0 < found["system_memory_usage_percentage"] < 100
    disk = psutil.disk_usage("/")
    assert found["disk_usage_megabytes"] == pytest.approx(disk.used / 1e6, rel=0.1)
    assert found["disk_available_megabytes"] == pytest.approx(disk.free / 1e6, rel=0.1)
    assert found["network_receive_megabytes_per_second"] >= 0


def test_traffic_is_that_since_the_last_reading(monkeypatch):
    counted, now = iter([(0, 0), (3e6, 1e6), (3e6, 5e6)]), iter(range(0, 100, 2))

    def traffic():
        received, sent = next(counted)
        return SimpleNamespace(bytes_recv=received, bytes_sent=sent)

    monkeypatch.setattr(sampler.psutil, "net_io_counters", traffic)
    monkeypatch.setattr(sampler, "time", SimpleNamespace(monotonic=lambda: next(now)))
    gauges = sampler.Gauges()
    read = [gauges.read() for _ in range(2)]
    assert [found["network_receive_megabytes_per_second"] for found in read] == [1.5, 0.0]
    assert [found["network_transmit_megabytes_per_second"] for found in read] == [0.5, 2.0]


def test_gpus_are_read_by_number_and_without_what_they_cannot(monkeypatch):
    class NVMLError(Exception):
        pass

    def power(gpu):
        if gpu:
            raise NVMLError("Not Supported")
        return 70_500

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=4e9, total=16e9),
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=90 + gpu),
        nvmlDeviceGetPowerUsage=power,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = {name: value for name, value in sampler.Gauges().read().items() if name.startswith("gpu_")}
    each = {"memory_usage_megabytes": 4000.0, "memory_usage_percentage": 25.0}
    expected = {f"gpu_{index}_{name}": value for index in (0, 1) for name, value in each.items()}
    expected |= {
        "gpu_0_utilization_percentage": 90,
        "gpu_1_utilization_percentage": 91,
        "gpu_0_power_usage_watts": 70.5,
    }
    assert found == expected

    def no_driver():
        raise NVMLError("Driver Not Loaded")

    nvml.nvmlInit = no_driver
    assert not [name for name in sampler.Gauges().read() if name.startswith("gpu_")]


def test_samples_come_by_the_clock_and_once_more_at_the_end(monkeypatch):
    monkeypatch.setattr(sampler, "SAMPLE_SECONDS", 0.05)
    monkeypatch.setattr(sampler, "LEAST_SECONDS", 3600.0)  # the last one comes too soon after another
    sent, twice = [], threading.Event()
    with sampler.sampling(lambda sample: [sent.append(sample), len(sent) == 2 and twice.set()]):
        assert twice.wait(30)
    assert all(CPU in sample for sample in sent)
    monkeypatch.setattr(sampler, "SAMPLE_SECONDS", 3600.0)
    for least, count in ((0.0, 1), (3600.0, 0)):
        monkeypatch.setattr(sampler, "LEAST_SECONDS", least)
        sent.clear()
        with pytest.raises(ValueError), sampler.sampling(sent.append):
            raise ValueError
        assert len(sent) == count
    assert not [thread for thread in threading.enumerate() if thread.name == "sampler"]


def test_samples_of_a_worker_that_hangs_are_no_progress(tmp_path, monkeypatch):
    """Its thread samples on; they are taken in all the same."""
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.01)
    run = Run.load("hung", tiny_settings(tmp_path, tmp_path, run_name="hung", step_timeout="0.005m"))
    taken = []

    class Group:
        ended, begun, aborted_at, hosts = False, True, None, None

        def news(self, run):
            return None, [(SAMPLE, ("a", {"cpu": 1.0}))]

        def abort(self):
            self.ended = True

        def wait(self, seconds):
            time.sleep(seconds)

    recorder = SimpleNamespace(
        run=run,
        display=SimpleNamespace(waiting=lambda words: None),
        prepared=SimpleNamespace(folder=run.folder),
        receive=lambda: None,
        system=SimpleNamespace(take=lambda *sample: taken.append(sample)),
    )
    plan = SimpleNamespace(stream_bytes=0)
    watched = supervisor.Supervisor(recorder, {"train": 8}, plan, (), 1, None)
    monkeypatch.setattr(watched, "_look_around", lambda *args: False)
    assert "no progress" in watched._follow(Group(), threading.Event())
    assert len(taken) > 3 and taken[0] == ("a", {"cpu": 1.0})
