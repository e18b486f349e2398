"""A sender killed at every call; and MLflow as a team has it: PostgreSQL, basic auth, files through the server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, job, read_json
from mlflow_server import Line, TeamServer
from test_tracking import check_synced, unsent  # noqa: F401


def again(folder: Path, uri: str) -> None:
    """Send a run that MLflow has already, as one whose last message was lost."""
    summary = read_json(folder / "summary.json")
    (folder / "summary.json").write_text(json.dumps(summary | {"delivered": None}))
    sent = job("train", "--sync", folder.name, "--storage-path", folder.parent, "--tracking-uri", uri)
    assert sent.returncode == 0, sent.stdout


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_any_call_loses_and_doubles_nothing(unsent, server, when):  # noqa: F811
    command = [sys.executable, ROOT / "tests" / "killed_sender.py", unsent, str(server.port), when]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 30  # the run, params, metrics, files, models
    state = check_synced(unsent, server)
    again(unsent, server.uri)
    assert check_synced(unsent, server) | {"tags": 0} == state | {"tags": 0}  # the description names the server


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    if os.getuid() or not Path("/usr/lib/postgresql").is_dir():
        pytest.skip("needs root, and PostgreSQL (`make test-cluster` installs it on Debian)")
    server = TeamServer(tmp_path_factory.mktemp("team"))
    server.start()
    yield server
    server.kill()
    server.postgres.remove()


@pytest.mark.cluster
def test_a_team_server_gets_all_of_a_run_once(unsent, team, monkeypatch):  # noqa: F811
    """The database goes away in the middle, and comes back; so does the server. Then all of it is sent again."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", team.PASSWORD)
    done = []

    def outages(number: int) -> None:
        if number == 9:
            team.postgres.stop()
        elif number == 12:  # what was tried meanwhile was refused
            team.postgres.start()
        elif number == 20:
            team.kill()
            team.start()
        done.append(number)

    line = Line(team, broken=outages)
    try:
        sent = job("train", "--sync", "trained", "--storage-path", unsent.parent, "--tracking-uri", line.uri)
    finally:
        line.close()
    assert sent.returncode == 0 and max(done) > 30, sent.stdout
    state = check_synced(unsent, team)
    again(unsent, team.uri)
    assert check_synced(unsent, team) | {"tags": 0} == state | {"tags": 0}
