"""clusters/on_premises.yaml as it stands: up, a job, down, by ssh between hosts in namespaces of this machine."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, read_json

NEEDED = ("ip", "nsenter", "unshare", "ssh", "ssh-keygen", "rsync")
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") or ""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
    pytest.mark.skipif(
        not (SSHD and all(map(shutil.which, NEEDED))), reason="needs openssh-server, rsync and iproute2"
    ),
]

ENTER = """
set -e
mkdir -p /tmp/ray
for folder in /srv /tmp/ray /dev/shm /run; do mount -t tmpfs tmpfs $folder; done
hostname "$NAME"
mkdir -p /run/sshd /srv/.ssh /srv/unet-pets/venv
cp "$KEYS/id" "$KEYS/host" /srv/.ssh
cp "$KEYS/id.pub" /srv/.ssh/authorized_keys
mount --bind -o ro "$VENV" /srv/unet-pets/venv
echo 'root:x:0:0:root:/srv:/bin/bash
sshd:x:100:65534::/run/sshd:/usr/sbin/nologin' > /run/passwd
mount --bind /run/passwd /etc/passwd
touch "$READY"
exec "$@"
"""
"""A host's own home directory, folder of Ray and shared memory. The packages are there as if installed before; the rest
of the disk is shared by all."""
DAEMON = [SSHD, "-D", "-e", "-f", "/dev/null", "-h", "/srv/.ssh/host", "-o", "StrictModes=no", "-o", "PidFile=none"]


def wait_for(there, what: str):
    deadline = time.monotonic() + 180
    while not (found := there()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


class Host:
    """Processes with a network, process numbers and mounts of their own, which end with the first of them."""

    def __init__(self, folder: Path, name: str, command: list[str]):
        self.log, ready = folder / f"{name}.log", folder / f"{name}.ready"
        env = {"NAME": name, "KEYS": str(folder), "VENV": sys.prefix, "READY": str(ready)}
        enter = [
            "unshare",
            "--net",
            "--pid",
            "--uts",
            "--mount",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
        ]
        with self.log.open("w") as log:
            self.outer = subprocess.Popen(
                [*enter, ENTER, name, *command], env=os.environ | env, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(lambda: ready.exists() or self.outer.poll() is not None, name)
        assert self.outer.poll() is None, self.log.read_text()
        self.first = psutil.Process(self.outer.pid).children()[0]

    def command(self, command: str, **env) -> dict:
        """What `subprocess` takes to run a command as a user who has set nothing but this."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        target = f"nsenter --target={self.first.pid} --net --pid --uts --mount".split()
        known = {"PATH": path, "HOME": "/srv", "USER": "root", "LANG": "C.UTF-8"}
        return {"args": [*target, "bash", "-c", f"cd {ROOT} && {command}"], "env": known | env, "text": True}

    def run(self, command: str, check: bool = True, **env) -> str:
        done = subprocess.run(
            **self.command(command, **env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}"
        return done.stdout

    def command_lines(self) -> list[str]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [" ".join(process.cmdline()) for process in self.first.children(recursive=True)]
        return []

    def end(self) -> None:
        self.outer.kill()
        self.outer.wait()


@pytest.fixture
def hosts(tmp_path):
    """A head and a worker with ssh, and a desk from which they are used: 10.78.0.1 to 3 on one switch."""
    for name in ("id", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    idle = ["sleep", "infinity"]
    with contextlib.ExitStack() as stack:

        def host(name: str, command: list[str]) -> Host:
            host = Host(tmp_path, name, command)
            stack.callback(host.end)
            return host

        switch = host("switch", idle)
        switch.run("ip link add name switch0 type bridge && ip link set switch0 up")
        hosts = [host("head", DAEMON), host("worker", DAEMON), host("desk", idle)]
        for number, one in enumerate(hosts, 1):
            # From here: a host knows the others' processes by no number.
            link = f"ip link add port{number} type veth peer name eth0 netns {one.first.pid}"
            subprocess.run(["nsenter", f"--net=/proc/{switch.first.pid}/ns/net", *link.split()], check=True)
            switch.run(f"ip link set port{number} master switch0 up")
            # Ray asks the way to the internet for the address of its host.
            one.run(f"ip address add 10.78.0.{number}/24 dev eth0; ip link set lo up; ip link set eth0 up")
            one.run("ip route add default dev eth0")
        yield hosts


SERVER = "http://127.0.0.1:8265"
ASKS = {"RAY_AUTH_MODE": "token"}


def filled_in() -> str:
    """The cluster file with the hosts' addresses, user and key."""
    text = (ROOT / "clusters" / "on_premises.yaml").read_text()
    blanks = {"HEAD_IP,": "10.78.0.1,", "head_ip: HEAD_IP": "head_ip: 10.78.0.1", "[WORKER_IP]": "[10.78.0.2]"}
    blanks |= {"ssh_user: ubuntu": "ssh_user: root", "~/.ssh/id_ed25519": "/srv/.ssh/id"}
    for blank, value in blanks.items():
        assert blank in text
        text = text.replace(blank, value)
    return text


@contextlib.contextmanager
def job_server(desk: Host, file: Path):
    """The cluster of that file is up, its worker has joined, and its job server answers at the desk."""
    desk.run("umask 077 && ray get-auth-token --generate > /dev/null")
    desk.run(f"ray up -y --no-config-cache {file}", **ASKS)
    wait_for(lambda: re.search(r"/[1-9]\d*\.0 CPU", desk.run(f"ray exec {file} 'ray status'", **ASKS)), "the worker")
    tunnel = subprocess.Popen(
        **desk.command(f"exec ray dashboard {file}", **ASKS), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: desk.run(f"curl -s {SERVER}/api/version", check=False), "the job server")
        yield
    finally:
        tunnel.kill()
        tunnel.wait()


def train(desk: Host, storage: Path) -> None:
    flags = f"--data synthetic:300 --storage-path {storage} --run-name first --num-workers 2 --threads 1 --epochs 1"
    small = "--recipe reference --image-size 32 --base-filters 4 --depth 2 --batch-size 16 --limit-train 64"
    said = desk.run(
        f"ray job submit --address {SERVER} --working-dir . -- python jobs/train.py {flags} {small}", **ASKS
    )
    assert read_json(storage / "first" / "summary.json")["status"] == "finished"
    assert "does not have all" not in said, said  # MLflow


def test_from_nothing_to_a_result_and_back(hosts, tmp_path):
    head, worker, desk = hosts
    file = tmp_path / "cluster.yaml"
    file.write_text(filled_in())
    with job_server(desk, file):
        refused = desk.run(f"ray job list --address {SERVER}", check=False, RAY_AUTH_MODE="disabled")
        assert "oken" in refused and "JobDetails" not in refused
        train(desk, tmp_path / "runs")

    token = desk.run("cat ~/.ray/auth_token")  # is nowhere where others look
    assert len(token) == 64 and head.command_lines() and worker.command_lines()
    assert not any(token in line for host in hosts for line in host.command_lines())
    assert not head.run(f"grep -rl {token} /tmp/ray", check=False)

    desk.run(f"ray down -y {file}", **ASKS)
    for host in (head, worker):  # a worker's Ray ends by itself when its head has been gone for a minute
        wait_for(lambda host=host: not any("raylet" in line for line in host.command_lines()), "the end of Ray")


def test_tls_as_the_docs_say(hosts, tmp_path):
    """Certificates made by the commands of docs/cluster.md, and its two lines added to the file."""
    head, _, desk = hosts
    section = (ROOT / "docs" / "cluster.md").read_text().partition("\n## TLS\n")[2].partition("\n## ")[0]
    commands, mount, setup = re.findall(r"^```\w*\n(.+?)^```$", section, re.DOTALL | re.MULTILINE)
    desk.run("bash -ec " + shlex.quote(commands.replace("HEAD_IP", "10.78.0.1").replace("WORKER_IP", "10.78.0.2")))
    text = filled_in().replace("file_mounts:\n", f"file_mounts:\n{mount}")
    file = tmp_path / "cluster.yaml"
    file.write_text(text.replace("\nsetup_commands:\n", f"\nsetup_commands:\n{setup}"))
    with job_server(desk, file):
        train(desk, tmp_path / "runs")
        without = head.run("ray status --address 10.78.0.1:6379", check=False, **ASKS)
        assert "Failed to connect to GCS" in without and "CPU" not in without
        shown = head.run("echo | openssl s_client -connect 10.78.0.1:6379 -CAfile ~/ray-tls/ca.crt", check=False)
        assert "subject=CN = unet-pets" in shown and "Verify return code: 0" in shown
    assert not head.run("ls ~/ray-tls | grep ca.key", check=False)  # with it anybody could join
