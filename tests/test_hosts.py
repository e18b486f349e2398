"""Several hosts for real: what happens to their links, Rays and power while a run trains over them.

One run, watched from its folder alone, meets one fault after another, each at a random moment; it ends with the very
weights of a run that nothing happened to. `UNET_KILL_SEED=N` draws the same moments again.
"""

import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, read_json, weights_of
from hosts import Host, Hosts
from mlflow_server import Server
from test_tracking import check_synced

NODES = 4
"""Of the cluster: a head without CPUs, two that train, and one that takes the place of another."""
EVERY = 4
"""Steps between checkpoints."""
AWAY_SECONDS = 20
"""How long a cable is out that is put back."""
PATIENCE_SECONDS = 1200
"""A run that shows nothing for so long hangs."""
FLAGS = TINY | {"num_workers": 2, "threads": 1, "checkpoint_every": EVERY}
PASSING = ("time", "speed/images_per_second", "speed/data_wait_fraction")
"""What of an epoch's line differs between equal runs."""


def flags_of(data: Path, storage: Path, **values) -> list[str]:
    settings = FLAGS | {"data": data, "storage_path": storage} | values
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


@dataclass
class Training:
    """A run on the hosts, started on the first of them, and what its folder says.

    Attributes:
        hosts: of the cluster. Those after the first have one CPU each, and one more than the run has workers.
        flags: of the job.
        folder: of the run.
        told: a line for each fault.
    """

    hosts: Hosts
    flags: list[str]
    folder: Path
    told: list[str] = field(default_factory=list)

    def start(self, **more) -> None:
        command = (sys.executable, "jobs/train.py", *self.flags, *(f"--{key}={value}" for key, value in more.items()))
        with (self.folder.parent / "output.txt").open("a") as log:
            self.driver = self.hosts[0].popen(*command, env=self.hosts.joined, stdout=log, stderr=log)

    @property
    def output(self) -> str:
        return (self.folder.parent / "output.txt").read_text()

    @property
    def step(self) -> int:
        """Of the last whole checkpoint; 0 before the first."""
        with contextlib.suppress(FileNotFoundError):
            names = [p.parent.name for p in self.folder.glob("checkpoints/step_*/COMMIT")]
            return max((int(name.removeprefix("step_")) for name in names), default=0)
        return 0

    @property
    def log(self) -> list[dict]:
        """The restarts so far."""
        with contextlib.suppress(FileNotFoundError):
            return read_json(self.folder / "summary.json").get("restart_log") or []
        return []

    @property
    def history(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def busy(self) -> list[Host]:
        """The hosts that train."""
        return [host for host in self.hosts[1:] if host.processes("RayTrainWorker")]

    def wait(self, condition, what: str) -> None:
        """Until that holds. A run that ends meanwhile, or hangs, fails the test."""
        deadline, step = time.monotonic() + PATIENCE_SECONDS, self.step
        while not condition():
            assert self.driver.poll() is None, self.output
            if self.step != step:
                deadline, step = time.monotonic() + PATIENCE_SECONDS, self.step
            assert time.monotonic() < deadline, f"{what}: the run hangs\n{self.output}"
            time.sleep(0.05)

    def wait_for_steps(self) -> None:
        """Until steps were made from now on: one checkpoint may have been under way."""
        known = self.step
        self.wait(lambda: self.step >= known + 2 * EVERY, f"steps after {known}")

    def overcome(self, fault: str, host: Host, began: float, restarts: int, needs_restart: bool = True) -> str | None:
        """Wait for the steps after a fault, and before for a restart if there is to be one; the reason of the first.

        `restarts` are those before it.
        """
        if needs_restart:
            self.wait(lambda: len(self.log) > restarts, f"a restart after {fault}")
        noticed = time.monotonic() - began
        self.wait_for_steps()
        reasons = [entry["reason"] for entry in self.log[restarts:]]
        self.told.append(
            f"{fault:<18} {host.name}  {noticed:5.1f} s {time.monotonic() - began:5.1f} s  {'; then: '.join(reasons)}"
        )
        print(f"\n{self.told[-1]}")
        return reasons[0] if reasons else None

    def replace(self, host: Host) -> None:
        """Another machine in the place of one, as an autoscaler brings it."""
        host.end()
        self.hosts.add().start_ray(cpus=1)
        self.hosts.nodes(NODES)


@pytest.fixture(scope="module")
def draws() -> random.Random:
    seed = int(os.environ.get("UNET_KILL_SEED") or secrets.randbits(32))
    print(f"\nUNET_KILL_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """A head without CPUs and three hosts with one each."""
    with Hosts(tmp_path_factory.mktemp("hosts"), cpus=(0, 1, 1, 1)) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The storage of all runs, which all hosts see."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def training(hosts, packed, runs):
    """A run of two workers that lasts until it is stopped."""
    training = Training(hosts, flags_of(packed, runs, run_name="hurt"), runs / "hurt")
    training.start(epochs=100_000)
    training.wait(lambda: training.step >= EVERY, "the first steps")
    yield training
    print("\n" + "\n".join(training.told))


@pytest.fixture
def victim(training, draws) -> Host:
    """A host that trains, at a random moment."""
    training.wait_for_steps()
    time.sleep(3 * draws.random())
    return draws.choice(training.busy())


@pytest.mark.cluster
def test_a_slow_link_slows_the_steps_and_ends_nothing(training, victim):
    restarts, began = len(training.log), time.monotonic()
    victim.slow()
    epochs = epochs_of(training.folder)
    assert training.overcome("link at 20 Mbit/s", victim, began, restarts, needs_restart=False) is None
    training.wait(lambda: epochs_of(training.folder) > epochs + 1, "an epoch with its validation and checkpoints")
    victim.fast()
    assert len(training.log) == restarts


@pytest.mark.cluster
def test_a_node_that_is_called_back_is_left_with_a_checkpoint(training, victim):
    node = training.hosts.nodes()[victim.address]["NodeID"]
    why = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=120")
    restarts, began = len(training.log), time.monotonic()
    asked = training.hosts[0].run("ray", "drain-node", f"--node-id={node}", *why, env=training.hosts.joined)
    assert asked.returncode == 0, asked.stdout
    reason = training.overcome("called back", victim, began, restarts)
    assert reason.startswith("1 of 2 nodes are being shut down (") and f"({victim.name})" in reason
    assert victim not in training.busy()
    training.replace(victim)


def kill_raylet(host: Host) -> None:
    (raylet,) = host.processes("raylet/raylet")
    raylet.kill()


LOSSES = {
    "raylet killed": kill_raylet,
    "cable cut": Host.cut,
    "power lost": Host.lose,
    "cut from the head": lambda host: host.block(host.hosts[0]),
}


@pytest.mark.cluster
@pytest.mark.parametrize("fault", LOSSES)
def test_a_host_that_is_lost_is_named_and_another_takes_its_place(training, victim, fault):
    """Also one that only the driver has lost, while its peer still trains with it."""
    restarts, began = len(training.log), time.monotonic()
    LOSSES[fault](victim)
    reason = training.overcome(fault, victim, began, restarts)
    assert "; 1 of 2 nodes lost: " in reason and reason.endswith(f"({victim.name})")
    training.replace(victim)


@pytest.mark.cluster
def test_a_cable_that_is_out_for_a_while(training, victim):
    """Ray gives the host up, or not: the run goes on, and afterwards the host can be used again."""
    restarts, began = len(training.log), time.monotonic()
    victim.cut()
    time.sleep(AWAY_SECONDS)
    victim.mend()
    reason = training.overcome("cable out for 20 s", victim, began, restarts, needs_restart=False)
    assert reason is None or " on h" in reason or victim.name in reason  # its peer may be the one that speaks
    # Given up by Ray, it ends its own part of it.
    ended = lambda: not victim.processes("raylet/raylet")  # noqa: E731
    training.wait(lambda: ended() or victim.address in training.hosts.nodes(), f"{victim.name} in the cluster, or out")
    if ended():
        victim.start_ray(cpus=1)
    assert victim.address in training.hosts.nodes(NODES)


@pytest.mark.cluster
def test_the_run_ends_with_the_weights_of_one_that_nothing_happened_to(training, packed):
    """Stopped, it continues with the same command; another run takes its steps without a fault."""
    (driver,) = training.hosts[0].processes("jobs/train.py")
    driver.send_signal(signal.SIGINT)
    assert training.driver.wait() == 130, training.output
    epochs, restarts = training.history[-1]["epoch"] + 2, len(training.log)
    training.start(epochs=epochs)
    assert training.driver.wait() == 0, training.output
    still = training.folder.with_name("still")
    flags = flags_of(packed, still.parent, run_name=still.name, epochs=epochs)
    done = training.hosts[0].run(sys.executable, "jobs/train.py", *flags, env=training.hosts.joined)
    assert done.returncode == 0, done.stdout

    summary, plain = read_json(training.folder / "summary.json"), read_json(still / "summary.json")
    assert summary["status"] == "finished" and plain["restarts"] == 0
    assert len(training.log) == restarts
    output = " ".join(training.output.split()).lower()
    assert all(entry["reason"].lower() in output for entry in training.log)
    unhurt = Training(training.hosts, flags, still)
    same = [[{k: v for k, v in line.items() if k not in PASSING} for line in run.history] for run in (training, unhurt)]
    assert same[0] == same[1] and training.step == unhurt.step
    weights = [weights_of(run.folder, f"step_{run.step:08d}") for run in (training, unhurt)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(summary[key] == plain[key] for key in ("val", "test", "best_epoch", "best_checkpoint"))


class ServerOn(Server):
    """An MLflow server on a host."""

    def __init__(self, folder: Path, host: Host):
        super().__init__(folder)
        self.host, self.uri = host, f"http://{host.address}:{self.port}"

    def command(self) -> list[str]:
        *command, _ = super().command()
        return [*command, self.host.address]

    def popen(self, command: list[str], **options) -> subprocess.Popen:
        return self.host.popen(*command, env=self.settings(), **options)

    def answers(self, url: str) -> bool:
        ask = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=60)"
        return self.host.run(sys.executable, "-c", ask, url).returncode == 0


@pytest.mark.cluster
def test_one_server_gets_all_of_two_trainings_once_though_it_is_cut_off_and_started_anew(
    hosts, packed, runs, tmp_path_factory, draws
):
    """Two drivers on two hosts, and the server on a third, over their links."""
    server = ServerOn(tmp_path_factory.mktemp("server"), hosts.add())
    server.start()
    jobs = {}
    for number, host in enumerate([h for h in hosts[1:] if h.processes("raylet/raylet")][:2]):
        name = f"from-{host.name}"
        values = {"num_workers": 1, "batch_size": 1, "seed": number, "tracking_uri": server.uri, "run_name": name}
        command = (sys.executable, "jobs/train.py", *flags_of(packed, runs, **values))
        jobs[name] = host.popen(*command, env=hosts.joined, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def wait_for_epochs(count: int) -> None:
        """Until both have made so many."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not all(epochs_of(runs / name) >= count for name in jobs):
            assert not any(job.poll() for job in jobs.values()), [job.communicate()[0] for job in jobs.values()]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    wait_for_epochs(1)
    time.sleep(draws.random())
    known = min(epochs_of(runs / name) for name in jobs)
    server.host.cut()
    wait_for_epochs(min(known + 2, TINY["epochs"]))  # they go on
    server.kill()
    server.start()
    server.host.mend()
    outputs = {name: job.communicate()[0] for name, job in jobs.items()}
    assert all(job.returncode == 0 for job in jobs.values()), outputs
    for name in jobs:
        if not read_json(runs / name / "summary.json")["delivered"]:  # the server was away for long after its end
            assert f"--sync {name}" in outputs[name]
            flags = (f"--sync={name}", f"--storage-path={runs}", f"--tracking-uri={server.uri}")
            sent = hosts[0].run(sys.executable, "jobs/train.py", *flags)
            assert sent.returncode == 0, sent.stdout
    server.kill()
    here = Server(server.folder)  # the same database and files
    here.start()
    try:
        for name in jobs:
            check_synced(runs / name, here)
    finally:
        here.kill()


def epochs_of(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").read_text().count("\n")
    return 0
