"""Jobs of a cluster that asks for a token (`RAY_AUTH_MODE=token`): with it they run, without nothing does."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from conftest import RAY, ROOT, TINY, free_ports, read_json


def environment(home: Path, token: Path | None) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} if token else {"RAY_AUTH_MODE": "disabled"}
    return kept | {"HOME": str(home)} | mode


@pytest.fixture
def cluster(tmp_path):
    """A head of its own that asks for a token: the address of its jobs, and the file with the token."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    folder = tempfile.mkdtemp(prefix="r")  # short: the names of sockets have a limit
    port, dashboard, client, agent = free_ports(4)
    command = [
        *(*RAY, "start", "--head", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *(f"--dashboard-agent-listen-port={agent}", "--include-dashboard=true", "--disable-usage-stats"),
    ]
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(
        command, env=environment(tmp_path, token), stdout=log, stderr=log, start_new_session=True, cwd=tmp_path
    )
    own = psutil.Process(head.pid)
    try:
        deadline = time.monotonic() + 180
        while not answers(dashboard):
            assert head.poll() is None and time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{dashboard}", token
    finally:
        processes = [own, *own.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _, left = psutil.wait_procs(processes, 30)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
    assert not left


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    except OSError:
        return False


def submit(address: str, home: Path, token: Path | None, *command) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(home, token),
        cwd=ROOT,
        timeout=400,
    )


@pytest.mark.slow
@pytest.mark.versions
def test_jobs_need_the_token(cluster, packed, tmp_path):
    address, token = cluster
    wrong, home = tmp_path / "wrong", tmp_path / "home"
    wrong.write_text("f" * 64)
    home.mkdir()
    touch = [sys.executable, "-c", f"open({str(tmp_path / 'canary')!r}, 'w')"]
    for given, words in ((None, "Missing authentication token"), (wrong, "Invalid authentication token")):
        refused = submit(address, home, given, *touch)
        assert refused.returncode != 0 and words in refused.stdout, refused.stdout
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | {"epochs": 1}).items()]
    flags += [f"--data={packed}", f"--storage-path={tmp_path / 'runs'}", "--run-name=tokened"]
    done = submit(address, home, token, sys.executable, "jobs/train.py", *flags)
    assert done.returncode == 0, done.stdout
    assert read_json(tmp_path / "runs" / "tokened" / "summary.json")["status"] == "finished"
    assert not (tmp_path / "canary").exists()
