"""Ceph's S3 gateway on loopback: a monitor, a manager, a store in memory and the gateway, from Debian's packages."""

import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest
from conftest import free_ports

PACKAGES = ["ceph-mon", "ceph-mgr", "ceph-osd", "radosgw", "ceph-common"]
KEY, SECRET, BUCKET = "owner", "word-of-the-owner", "pets"
CONFIG = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
keyring = {folder}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
auth allow insecure global id reclaim = false
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/log/$name.log
mon cluster log file = {folder}/log/cluster.log
mgr initial modules =
[mon.a]
mon data = {folder}/mon
[mgr.x]
mgr data = {folder}/mgr
[osd.0]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd journal =
[client]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw data = {folder}/rgw
"""


def require() -> None:
    """Have Ceph, or skip."""
    if os.geteuid() or not (shutil.which("radosgw") and shutil.which("ceph-osd")):
        pytest.skip(f"needs root, and {' '.join(PACKAGES)} (`make test-cluster` installs them on Debian)")


class Gateway:
    """The gateway and what is behind it; `place` is its host and port."""

    def __init__(self, folder: Path):
        self.folder, (self.port, v1, v2) = folder, free_ports(3)
        self.place, self._processes = f"127.0.0.1:{self.port}", []
        for name in ("mon", "mgr", "osd", "rgw", "run", "log"):
            (folder / name).mkdir()
        text = CONFIG.format(fsid=uuid.uuid4(), folder=folder, gateway=self.port, v1=v1, v2=v2)
        (folder / "ceph.conf").write_text(text)
        self._monitor = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"

    def start(self) -> None:
        folder, grants = (
            self.folder,
            {
                "mon.": {"mon": "allow *"},
                "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
                "mgr.x": {"mon": "allow profile mgr", "osd": "allow *"},
                "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
            },
        )
        self._run("ceph-authtool", f"{folder}/keyring", "--create-keyring")
        for name, caps in grants.items():
            words = [word for who, what in caps.items() for word in ("--cap", who, what)]
            self._run("ceph-authtool", f"{folder}/keyring", "--gen-key", "-n", name, *words)
        fsid = (folder / "ceph.conf").read_text().split("fsid = ")[1].split()[0]
        self._run("monmaptool", "--create", "--addv", "a", self._monitor, "--fsid", fsid, f"{folder}/monmap")
        monitor = ("--mkfs", "-i", "a", "--monmap", f"{folder}/monmap", "--keyring", f"{folder}/keyring")
        self._run("ceph-mon", *monitor)
        self._begin("ceph-mon", "-i", "a")
        self._run("ceph", "--connect-timeout", "60", "osd", "create")
        self._begin("ceph-mgr", "-i", "x")
        self._run("ceph-osd", "-i", "0", "--mkfs")
        self._begin("ceph-osd", "-i", "0")
        self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=localhost")
        self.gateway = self._begin("radosgw", "-n", "client.admin")
        while not self._answers():
            assert self.gateway.poll() is None, (folder / "log" / "radosgw.out").read_text()[-2000:]
            time.sleep(0.2)
        keys = ("--access-key", KEY, "--secret-key", SECRET)
        self._run("radosgw-admin", "user", "create", "--uid", KEY, "--display-name", KEY, *keys)
        self._run(
            "radosgw-admin",
            "user",
            "create",
            "--uid",
            "guest",
            "--display-name",
            "guest",
            "--access-key",
            "guest",
            "--secret-key",
            SECRET,
        )

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"http://{self.place}", timeout=10).close()
        except urllib.error.HTTPError:
            pass
        except OSError:
            return False
        return True

    def _run(self, program: str, *arguments: str) -> None:
        config = () if program in ("ceph-authtool", "monmaptool") else ("-c", f"{self.folder}/ceph.conf")
        done = subprocess.run([program, *config, *arguments], capture_output=True, text=True, env=self._env)
        assert done.returncode == 0, f"{program} {arguments}: {done.stderr[-2000:]}"

    def _begin(self, program: str, *arguments: str) -> subprocess.Popen:
        with open(self.folder / "log" / f"{program}.out", "wb") as log:
            command = [program, "-f", "-c", f"{self.folder}/ceph.conf", *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self._env)
        self._processes.append(process)
        return process

    @property
    def _env(self) -> dict[str, str]:
        # Ceph's own tools are of the system's Python.
        return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))} | {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"
        }

    def freeze(self) -> None:
        """It accepts, and never answers."""
        self.gateway.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.gateway.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
