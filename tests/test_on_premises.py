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
            # Process numbers are those of the machine only where its own /proc is seen.
            link = f"ip link add port{number} type veth peer name eth0 netns {one.first.pid}"
            subprocess.run(["nsenter", f"--net=/proc/{switch.first.pid}/ns/net", *link.split()], check=True)
            switch.run(f"ip link set port{number} master switch0 up")
            # Ray asks the way to the internet for the address of its host.
            one.run(f"ip address add 10.78.0.{number}/24 dev eth0; ip link set lo up; ip link set eth0 up")
            one.run("ip route add default dev eth0")
        yield hosts


def with_tls(text: str, desk: Host) -> str:
    """The cluster file with TLS, as docs/cluster.md says: its certificates are made, its two lines added."""
    section = (ROOT / "docs" / "cluster.md").read_text().partition("\n## TLS\n")[2].partition("\n## ")[0]
    commands, mount, setup = re.findall(r"^```\w*\n(.+?)^```$", section, re.DOTALL | re.MULTILINE)
    desk.run("bash -ec " + shlex.quote(commands.replace("HEAD_IP", "10.78.0.1").replace("WORKER_IP", "10.78.0.2")))
    text = text.replace("file_mounts:\n", f"file_mounts:\n{mount}")
    return text.replace("setup_commands:\n", f"setup_commands:\n{setup}")


@pytest.mark.parametrize("tls", [False, True], ids=["as it stands", "with TLS"])
def test_from_nothing_to_a_result_and_back(hosts, tmp_path, tls):
    head, worker, desk = hosts
    text = (ROOT / "clusters" / "on_premises.yaml").read_text()
    text = with_tls(text, desk) if tls else text
    blanks = {"HEAD_IP,": "10.78.0.1,", "head_ip: HEAD_IP": "head_ip: 10.78.0.1", "[WORKER_IP]": "[10.78.0.2]"}
    blanks |= {"ssh_user: ubuntu": "ssh_user: root", "~/.ssh/id_ed25519": "/srv/.ssh/id"}
    for blank, value in blanks.items():
        assert blank in text
        text = text.replace(blank, value)
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    asks = {"RAY_AUTH_MODE": "token"}
    desk.run("umask 077 && ray get-auth-token --generate > /dev/null")
    token = desk.run("cat ~/.ray/auth_token")
    assert len(token) == 64

    desk.run(f"ray up -y --no-config-cache {file}", **asks)
    wait_for(lambda: re.search(r"/[1-9]\d*\.0 CPU", desk.run(f"ray exec {file} 'ray status'", **asks)), "the worker")

    tunnel = subprocess.Popen(
        **desk.command(f"exec ray dashboard {file}", **asks), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    server = "http://127.0.0.1:8265"
    try:
        wait_for(lambda: desk.run(f"curl -s {server}/api/version", check=False), "the job server")
        refused = desk.run(f"ray job list --address {server}", check=False, RAY_AUTH_MODE="disabled")
        assert "oken" in refused and "JobDetails" not in refused
        train = f"python jobs/train.py --data synthetic:300 --storage-path {tmp_path}/runs --run-name first"
        small = "--recipe reference --image-size 32 --base-filters 4 --depth 2 --batch-size 16 --limit-train 64"
        submit = f"ray job submit --address {server} --working-dir . -- {train} {small} --threads 1 --epochs 1"
        said = desk.run(f"{submit} --num-workers 2", **asks)
        assert read_json(tmp_path / "runs" / "first" / "summary.json")["status"] == "finished"
        assert "does not have all" not in said, said  # MLflow
    finally:
        tunnel.kill()
        tunnel.wait()

    if tls:
        stranger = head.run("ray status --address 10.78.0.1:6379", check=False, **asks)
        assert "CPU" not in stranger and "10.78.0.1:6379" in stranger
    # No secret where others look.
    assert not any(token in line for host in hosts for line in host.command_lines())
    assert not head.run(f"grep -rl {token} /tmp/ray", check=False)

    desk.run(f"ray down -y {file}", **asks)
    for host in (head, worker):  # a worker's Ray ends by itself when its head has been gone for a minute
        wait_for(lambda host=host: not any("raylet" in line for line in host.command_lines()), "the end of Ray")
