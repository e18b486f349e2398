"""MLflow's database in a file: many first starts, kills in their midst, broken ones, odd paths, moved folders."""

import contextlib
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import ROOT, command

from unet.config import read_config
from unet.errors import InputError
from unet.paths import database_of, sqlite_uri
from unet.runs.run import prepared_of
from unet.storage import Folder
from unet.terminal import Display
from unet.tracking import database
from unet.tracking.database import check_database, ready
from unet.tracking.library import load_mlflow
from unet.tracking.logged_models import Best, Models, reconcile
from unet.tracking.reach import default_uri
from unet.tracking.registry import register
from unet.tracking.store import Store
from unet.tracking.stored_run import StoredRun

START = """
import sys
from unet.storage import Folder
from unet.tracking.store import Store, load_mlflow
from unet.tracking.stored_run import StoredRun
load_mlflow()
import mlflow.store.tracking.sqlalchemy_store
print("ready", flush=True)
input()
StoredRun(Store(Folder(sys.argv[1]), "x")).start("run", None, {})
"""


def starts(count: int, storage: Path) -> list[subprocess.Popen]:
    """Processes that have loaded MLflow and wait for a line to make a run in a storage path."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    made = [subprocess.Popen([sys.executable, "-c", START, str(storage)], **pipes) for _ in range(count)]
    assert [process.stdout.readline() for process in made] == [b"ready\n"] * count
    return made


def go(process: subprocess.Popen) -> None:
    process.stdin.write(b"\n")
    process.stdin.flush()


def test_first_runs_that_are_killed_or_start_together_leave_one_database(tmp_path):
    """Killed at any moment from its first file on: what that leaves hinders nobody, and goes."""
    storage, moments = tmp_path / "runs", random.Random(0)
    processes = starts(4, storage)
    for process in processes[:2]:
        go(process)
        while not (storage.exists() and os.listdir(storage)) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.wait()
        check_database(default_uri(Folder(storage)))
        for left in storage.glob("mlflow.db"):  # it was quick: the next one is to be the first again
            left.unlink()
    for process in processes[2:]:
        go(process)
    assert [process.wait() for process in processes[2:]] == [0, 0]
    runs = sqlite3.connect(storage / "mlflow.db").execute("select count(*) from runs").fetchone()
    assert runs == (2,) and os.listdir(storage) == ["mlflow.db"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with a run of an experiment, in a folder whose name no library takes for what it is."""
    storage = tmp_path_factory.mktemp("of") / "50%20 off? (ü#1)"
    run = StoredRun(Store(Folder(storage), "50% more?"))
    run_id = run.start("run", None, {"kind": "x"})
    run.params({"a": 1})
    run.file(Folder(ROOT), "README.md", "below")
    model = Folder(tmp_path_factory.mktemp("model"))
    model.write_text("MLmodel", "metadata: {}\n")
    best = Best("step_00000001", 1, 1000, {"val/mean_iou": 0.5}, kept=True)
    tags = {"run_name": "run", "data_digest": "d"}
    reconcile(run, Models([best], tags, {}, ("pets/val", "d"), package=model, packaged=best.checkpoint))
    register(run.store.uri, "m", run_id, Display(quiet=True))
    return storage, run_id


def test_any_path_does(whole):
    """Nothing but the storage path is written to, and the UI's own reading finds the files."""
    storage, run_id = whole
    assert os.listdir(storage.parent) == [storage.name]
    assert sorted(os.listdir(storage)) == ["mlartifacts", "mlflow.db"]
    assert (storage / "mlartifacts" / "50% more?" / run_id / "artifacts" / "below" / "README.md").exists()
    uri = default_uri(Folder(storage))
    assert database_of(uri) == storage / "mlflow.db"
    assert [f.path for f in mlflow.MlflowClient(uri).list_artifacts(run_id)] == ["below"]
    mlflow.set_tracking_uri(uri)  # MLflow asks that for the models of a run, whatever store it is given
    made = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/model")
    mlflow.set_tracking_uri(None)
    assert "MLmodel" in os.listdir(made)
    assert command("train", f"--storage-path={storage}", "--data=/nothing") == 2  # and not for its name


AFTER = """
import json, sys
import mlflow
from unet.storage import Folder
from unet.terminal import Display
from unet.tracking.registry import register
from unet.tracking.stored_run import StoredRun
storage, run_id, scratch = sys.argv[1:]
run = StoredRun.of_existing(Folder(storage), run_id)
store = run.store
mlflow.set_tracking_uri(store.uri)
Folder(scratch).write_text("a.txt", "a")
run.file(Folder(scratch), "a.txt", "later")
found = {
    "listed": sorted(file.path for file in store.client.list_artifacts(run_id)),
    "version": register(store.uri, "m", run_id, Display(quiet=True)),
    "source": store.client.get_model_version("m", "1").source,
    "model": mlflow.artifacts.download_artifacts("models:/m/1", dst_path=scratch),
    "experiment": store.client.get_experiment_by_name("50% more?").artifact_location,
}
print(json.dumps(found))
"""


def test_a_moved_storage_path_finds_its_artifacts(whole, tmp_path):
    """Also where new runs have begun at the old place, and as a copy that leaves the original alone."""
    processes, before = {}, {}
    for how in ("moved", "copied", "begun anew"):
        folder = tmp_path / how
        origin, there = shutil.copytree(whole[0], folder / "origin?"), folder / "there" / "runs"
        ready(default_uri(Folder(origin)))
        (shutil.copytree if how == "copied" else shutil.move)(origin, there)
        if how == "begun anew":
            Folder(origin / "mlartifacts").write_text("file", "")
            shutil.copy(whole[0] / "mlflow.db", origin)
        before[folder] = everything(origin)
        # A process for each: MLflow remembers where files are.
        command, env = [sys.executable, "-c", AFTER, there, whole[1], folder], os.environ | {"PYTHONPATH": str(ROOT)}
        processes[folder] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    for folder, process in processes.items():
        place = folder / "there" / "runs" / "mlartifacts" / "50% more?"
        found = json.loads(process.communicate()[0].splitlines()[-1])
        assert found["experiment"] == place.as_uri() and found["version"] == "models:/m/1"
        (model,) = (place / "models").iterdir()
        assert found["source"] == (model / "artifacts").as_uri()
        assert found["listed"] == ["below", "later"] and Path(found["model"], "MLmodel").exists()
        assert (place / whole[1] / "artifacts" / "later" / "a.txt").exists()
        assert everything(folder / "origin?") == before[folder]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """A database without a run."""
    storage = tmp_path_factory.mktemp("empty")
    ready(default_uri(Folder(storage)))
    return storage / "mlflow.db"


@pytest.fixture
def quick(empty, monkeypatch):
    """New databases are copies of it, with the place of their own first files: MLflow takes seconds to make one."""

    def create(path: Path) -> None:
        shutil.copy(empty, path)
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            place = (path.parent / database.ARTIFACTS / "0").as_uri()
            connection.execute("update experiments set artifact_location = ?", [place])

    monkeypatch.setattr(database, "_create", create)


def test_the_files_of_others_stay_where_they_are(quick, tmp_path):
    """A database that several storage paths share knows the files of each."""
    uri = sqlite_uri(tmp_path / "shared" / "mlflow.db")
    (tmp_path / "own" / "mlartifacts").mkdir(parents=True)
    before = Store(Folder(tmp_path / "own"), "mine", uri).client.get_experiment_by_name("mine").artifact_location
    after = Store(Folder(tmp_path / "other"), "mine", uri).client.get_experiment_by_name("mine").artifact_location
    assert before == after == (tmp_path / "own" / "mlartifacts" / "mine").as_uri()


def place_of(folder: Path, uri: str, name: str) -> str:
    return Store(Folder(folder), name, uri).client.get_experiment_by_name(name).artifact_location


@pytest.mark.parametrize("name", ["team.db", "mlflow.db"])
@pytest.mark.parametrize("begun", [True, False])
def test_files_that_only_others_see_stay_theirs(quick, tmp_path, name, begun):
    """A team's database, from a machine that does not see the disk of another; with a store of its own or without."""
    uri, mine = sqlite_uri(tmp_path / "shared" / name), tmp_path / "mine"
    before = place_of(mine, uri, "mine")
    if begun:
        Folder(mine).write_text("mlartifacts/mine/file", "")
        ready(default_uri(Folder(mine)))
    mine.mkdir(exist_ok=True)
    mine.rename(tmp_path / "unseen")
    place_of(tmp_path / "theirs", uri, "theirs")
    (tmp_path / "unseen").rename(mine)
    assert place_of(mine, uri, "mine") == before == (mine / "mlartifacts" / "mine").as_uri()


def test_a_copy_of_the_database_alone_knows_the_files_where_they_are(whole, tmp_path):
    origin = shutil.copytree(whole[0], tmp_path / "origin")
    ready(default_uri(Folder(origin)))
    (tmp_path / "backup").mkdir()
    shutil.copy(origin / "mlflow.db", tmp_path / "backup")
    copied = place_of(origin, sqlite_uri(tmp_path / "backup" / "mlflow.db"), "50% more?")
    assert copied == (origin / "mlartifacts" / "50% more?").as_uri()


def test_an_older_database_follows_by_the_files_that_are_there(whole, tmp_path):
    """Of one that MLflow made by itself the first experiment lies below whatever folder a job was started in."""
    origin, there = shutil.copytree(whole[0], tmp_path / "origin"), tmp_path / "there"
    ready(default_uri(Folder(origin)))
    with contextlib.closing(sqlite3.connect(origin / "mlflow.db")) as connection, connection:
        connection.execute("update experiments set artifact_location = '/elsewhere/mlruns/0' where experiment_id = 0")
    origin.rename(there)
    assert place_of(there, default_uri(Folder(there)), "50% more?") == (there / "mlartifacts" / "50% more?").as_uri()


OLDER = "update alembic_version set version_num = '89d3d66ed43f'"
BROKEN = {
    "an older one": ([OLDER], r"python -m mlflow db upgrade sqlite:///"),
    "a newer one": (["update alembic_version set version_num = 'f00'"], "created by a newer MLflow than"),
    "half-made": (["delete from experiments"], "is incomplete: .* holds no run. Remove it"),
    "another's": (["drop table experiments", "drop table alembic_version"], "not MLflow's"),
}
NOT_ONE = {
    "no database": (lambda path: path.write_bytes(b"x" * 5000), "file is not a database"),
    "a part of one": (lambda path: os.truncate(path, 200_000), "malformed"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder, not a database"),
}


@pytest.mark.parametrize("kind", [*BROKEN, *NOT_ONE])
@pytest.mark.parametrize("job", ["train", "tune"])
def test_what_no_waiting_mends_is_told_at_the_start(whole, tmp_path, monkeypatch, capsys, kind, job):
    monkeypatch.setattr(database, "CREATION_SECONDS", 0)
    path = Path(shutil.copy(whole[0] / "mlflow.db", tmp_path))
    change, words = (BROKEN | NOT_ONE)[kind]
    if kind in BROKEN:
        with sqlite3.connect(path) as connection:
            for statement in change:
                connection.execute(statement)
    else:
        change(path)
    assert command(job, f"--storage-path={tmp_path}", "--data=synthetic", "--run-name=x") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(path) in error
    assert re.search(words, error)


def test_one_that_is_in_use_or_empty_is_no_reason_to_refuse(whole, tmp_path):
    path = Path(shutil.copy(whole[0] / "mlflow.db", tmp_path))
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.execute("begin exclusive")
        check_database(sqlite_uri(path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "mlflow.db").touch()
    assert StoredRun(Store(Folder(tmp_path / "empty"), "x")).start("run", None, {})


READ = """
import sys
from unet.errors import InputError
from unet.storage import Folder
from unet.terminal import Display
from unet.tracking.database import check_database, ready
from unet.tracking.store import Store
store = Store(Folder(sys.argv[1]), None)
print(store.client.get_run(sys.argv[2]).data.params)
try:
    check_database(store.uri)
except InputError as error:
    print(error)
"""


def test_what_this_user_may_not_write_is_told_but_can_be_read(whole):
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        path = Path(shutil.copy(whole[0] / "mlflow.db", place))
        path.chmod(0o444)
        nobody = [] if os.geteuid() else ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        command = [*nobody, sys.executable, "-c", READ, place, whole[1]]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    params, words = done.stdout.splitlines()
    assert params == "{'a': '1'}"
    assert words.startswith(f"This user may not write MLflow's database {path}: change its permissions"), done.stderr


def test_what_mlflow_itself_finds_out_of_date_is_no_outage(whole, tmp_path):
    """As a server's database, whose tables are not looked at before."""
    path = Path(shutil.copy(whole[0] / "mlflow.db", tmp_path))
    with sqlite3.connect(path) as connection:
        connection.execute(OLDER)
    load_mlflow()
    with pytest.raises(InputError, match=r"MLflow cannot use .*out-of-date database schema"):
        Store(Folder(tmp_path), "x", f"sqlite+pysqlite:///file:{path}?uri=true")


@pytest.mark.versions
def test_the_latest_version_is_known_without_mlflow(whole):
    (made,) = sqlite3.connect(whole[0] / "mlflow.db").execute("select version_num from alembic_version").fetchone()
    known, latest = database._revisions()
    assert latest == made and latest in known and "89d3d66ed43f" in known


def test_what_a_moved_run_says_of_places_is_followed(tmp_path):
    """Data under the storage path and its database, also of a trial, whose storage path is its sweep's folder."""
    before, now = tmp_path / "before" / "runs", tmp_path / "now" / "elsewhere" / "runs"
    for name, storage in (("run", before), ("trial", before / "sweep")):
        folder, data = Folder(storage / name), before / "data" / "pets"
        config = {"storage_path": str(storage), "data": str(data), "tracking_uri": sqlite_uri(before / "mlflow.db")}
        folder.write_text("config.yaml", yaml.safe_dump(config))
        folder.write_text("summary.json", json.dumps({"prepared": str(data)}))
    Folder(data).write_text("manifest.json", "{}")
    (before / "mlflow.db").touch()
    (tmp_path / "now" / "data" / "pets").mkdir(parents=True)  # what others have there is not meant
    now.parent.mkdir()
    shutil.move(before, now)
    for folder in (Folder(now / "run"), Folder(now / "sweep" / "trial")):
        config = read_config(folder)
        assert config["data"] == prepared_of(folder) == str(now / "data" / "pets")
        assert config["tracking_uri"] == sqlite_uri(now / "mlflow.db")
    before.mkdir()
    shutil.move(now / "data", before / "data")
    assert read_config(folder)["data"] == prepared_of(folder) == str(before / "data" / "pets")
