"""Several hosts on one machine: each with a network, a name, processes, shared memory and temporary files of its own.

    with Hosts(tmp_path, cpus=(0, 2, 2)) as hosts:  # a Ray cluster: the first is its head
        hosts[0].run(sys.executable, "jobs/train.py", …, env=hosts.joined)
        hosts[2].cut()

They are Linux namespaces without names, joined by a bridge in one more, so that nothing is left when their first
processes end, whatever happened, and nothing that is sent leaves the machine. The rest of the disk is shared: what is
in `tmp_path` is a file system that all of them see. A `~` is a host's own. As root only: elsewhere the test is skipped.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import RAY, ROOT

NETWORK = "10.77.0"
TOOLS = ("unshare", "nsenter", "ip", "tc", "hostname")
FIRST_PROCESS = """
set -e
hostname "$1"
mount --bind "$2" "$3"
mount --bind "$4" /etc/hosts
mount -t tmpfs -o size="$5" tmpfs /dev/shm
ip link set lo up
echo ready
sleep infinity & wait
"""
"""Of a host, as bash, which takes in the processes that lost their parents."""
SWITCH = "set -e; ip link add sw0 type bridge; ip link set sw0 up; echo ready; exec sleep infinity"
NODES = """
import json, sys, time
import ray
count, address, deadline = int(sys.argv[1]), sys.argv[2], time.monotonic() + 240
while True:
    try:
        if not ray.is_initialized():
            ray.init(address, logging_level="ERROR", log_to_driver=False)
        nodes = ray.nodes()
        if sum(node["Alive"] for node in nodes) >= count:
            break
    except Exception as error:
        nodes = error
    assert time.monotonic() < deadline, nodes
    time.sleep(0.2)
print(json.dumps(nodes))
"""
"""What Ray says of its nodes, once so many are alive."""


class Host:
    """One of them.

    Attributes:
        name: its host name.
        address: its IP address.
        folder: of its files, seen from outside: `ray.log`, and in `own` what it has at `hosts.own`.
    """

    def __init__(self, hosts: "Hosts", number: int, shared_memory: str):
        self.hosts, self.name, self.address = hosts, f"h{number}", f"{NETWORK}.{number}"
        self.folder, self._port = hosts.folder / self.name, f"p{number}"
        for part in ("home", "tmp"):
            (self.folder / "own" / part).mkdir(parents=True)
        names = (self.name, self.folder / "own", hosts.own, hosts.names, shared_memory)
        script = ("bash", "-c", FIRST_PROCESS, "bash", *map(str, names))
        apart = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._unshare = _started("unshare", *apart, *script)
        (self._first,) = psutil.Process(self._unshare.pid).children()
        hosts.switch("link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(self._first.pid))
        hosts.switch("link", "set", self._port, "master", "sw0", "up")
        for words in (f"addr add {self.address}/24 dev eth0", "link set eth0 up"):
            self._net("ip", *words.split())

    def popen(self, *command: Any, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
        """Start a command here, in the checkout. It ends with the host, if not before; `processes` finds it."""
        enter = ("nsenter", f"--target={self._first.pid}", "--net", "--mount", "--uts", "--ipc", "--pid")
        line = [*enter, "env", f"--chdir={ROOT}", *map(str, command)]
        return subprocess.Popen(line, env=self.hosts.environment | (env or {}), text=True, **options)

    def run(self, *command: Any, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        """Run a command here; stdout and stderr together in `stdout`."""
        with self.popen(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            output, _ = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def start_ray(self, *flags: str, cpus: float = 1, limits: Sequence[str] = (), env: dict | None = None) -> None:
        """Start Ray's node, the head's on the first host; `limits` as prlimit takes them, such as `--nofile=1024`."""
        if self is self.hosts[0]:
            place = ("--head", f"--port={self.hosts.port}", f"--dashboard-host={self.address}")
            place = (*place, f"--temp-dir={self.hosts.own}")
        else:
            place = (f"--address={self.hosts.joined['RAY_ADDRESS']}",)
        usual = ("--block", "--disable-usage-stats", "--object-store-memory=150000000", f"--num-cpus={cpus:g}")
        ray = (*RAY, "start", f"--node-ip-address={self.address}", *place, *usual)
        with (self.folder / "ray.log").open("a") as log:
            self.popen(*(("prlimit", *limits) if limits else ()), *ray, *flags, env=env, stdout=log, stderr=log)

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Processes of this host with this word in their command line, such as `raylet/raylet` or `RayTrainWorker`."""
        with contextlib.suppress(OSError):  # the host is gone
            own, found = os.readlink(f"/proc/{self._first.pid}/ns/pid"), []
            for process in psutil.process_iter():
                with contextlib.suppress(OSError, psutil.Error):
                    if os.readlink(f"/proc/{process.pid}/ns/pid") == own and word in " ".join(process.cmdline()):
                        found.append(process)
            return found
        return []

    def cut(self) -> None:
        """Pull the network cable: nothing comes through, and nobody is told."""
        self.hosts.switch("link", "set", self._port, "down")

    def mend(self) -> None:
        """Put the cable back."""
        self.hosts.switch("link", "set", self._port, "up")

    def slow(self, rate: str = "20mbit", burst: str = "64kb", latency: str = "400ms") -> None:
        """Let both directions of the link carry no more than that, as `tc` writes it."""
        shape = f"root tbf rate {rate} burst {burst} latency {latency}".split()
        self._net("tc", "qdisc", "replace", "dev", "eth0", *shape)
        self.hosts.switch("qdisc", "replace", "dev", self._port, *shape, tool="tc")

    def fast(self) -> None:
        """End what `slow` did."""
        self._net("tc", "qdisc", "del", "dev", "eth0", "root")
        self.hosts.switch("qdisc", "del", "dev", self._port, "root", tool="tc")

    def block(self, other: "Host") -> None:
        """A firewall between two hosts: each still reaches all others."""
        for one, there in ((self, other), (other, self)):
            one._net("ip", "route", "add", "prohibit", there.address)

    def lose(self) -> None:
        """The power fails: no word reaches the others, and every process is gone."""
        self.cut()
        self.end()

    def end(self) -> None:
        """End all processes of the host, and with them its namespaces."""
        self._unshare.kill()
        self._unshare.wait()
        psutil.wait_procs([self._first], timeout=60)

    def _net(self, *command: str) -> None:
        _in_network(self._first.pid, *command)


class Hosts(list[Host]):
    """A cluster of hosts, the first of which is the head.

    Attributes:
        folder: of the hosts' own files, in `tmp_path`.
        environment: of every process on them.
        joined: the variables of a job that is to run on the cluster.
        own: a folder that is another one on each host; its home and Ray's folder are there.
    """

    port = 6379

    def __init__(self, folder: Path, cpus: Sequence[float] = (0, 1, 1), shared_memory: str = "1g"):
        """With one host for each of `cpus`, which Ray is told. Ray starts when the block begins; without any, later."""
        super().__init__()
        self.folder, self._cpus, self._shared_memory = folder / "hosts", cpus, shared_memory
        self.names, self._token = self.folder / "names", self.folder / "token"
        self.joined = {"RAY_ADDRESS": f"{NETWORK}.1:{self.port}"}

    def __enter__(self) -> "Hosts":
        if reason := why_not():
            pytest.skip(reason)
        self.folder.mkdir(parents=True)
        self.names.write_text("127.0.0.1 localhost\n" + "".join(f"{NETWORK}.{i} h{i}\n" for i in range(1, 100)))
        self._token.write_text(secrets.token_hex(32))
        self.own = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: the names of sockets have a limit
        self._switch = _started("unshare", "--net", "bash", "-c", SWITCH)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and "proxy" not in k.lower()}
        ours = {"HOME": self.own / "home", "TMPDIR": self.own / "tmp", "PYTHONPATH": ROOT}
        ours |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": self._token}
        ours["RAY_worker_niceness"] = 0  # usually 15, and then they wait for all else on this machine
        ours |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.environment = kept | {name: str(value) for name, value in ours.items()}
        try:
            for number, count in enumerate(self._cpus):
                self.add().start_ray(cpus=count)
                if number == 0:
                    self.nodes()  # the others ask it
            if self._cpus:
                self.nodes(len(self))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._end()

    def add(self) -> Host:
        """One more host, on which nothing runs."""
        self.append(Host(self, len(self) + 1, self._shared_memory))
        return self[-1]

    def nodes(self, count: int = 1) -> dict[str, dict]:
        """What Ray says of its live nodes, by address, once there are so many."""
        done = self[0].run(sys.executable, "-c", NODES, count, self.joined["RAY_ADDRESS"])
        assert done.returncode == 0, "\n".join([done.stdout, *(h.folder.joinpath("ray.log").read_text() for h in self)])
        found = json.loads(done.stdout.splitlines()[-1])
        return {node["NodeManagerAddress"]: node for node in found if node["Alive"]}

    def switch(self, *words: str, tool: str = "ip") -> None:
        """`ip` or `tc` in the network of the switch."""
        _in_network(self._switch.pid, tool, *words)

    def _end(self) -> None:
        for host in self:
            host.end()
        self._switch.kill()
        self._switch.wait()
        shutil.rmtree(self.own, ignore_errors=True)


def why_not() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"hosts in namespaces need {', '.join(missing)} (packages iproute2 and util-linux)"
    tried = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")
    done = subprocess.run([*tried, "ip", "link", "add", "sw0", "type", "bridge"], capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


def _started(*command: str) -> subprocess.Popen:
    """A process that has said that it is ready: before that, what enters its network would be in this machine's."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n", command
    process.stdout.close()
    return process


def _in_network(pid: int, *command: str) -> None:
    subprocess.run(["nsenter", f"--target={pid}", "--net", *command], check=True)
