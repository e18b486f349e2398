"""MLflow away: a real server frozen and killed, a locked sqlite, a lost answer, a store that never comes back."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import ROOT, TINY, command, read_json, tiny_settings, train
from mlflow_server import Line, Server
from test_run import start_job, wait_for

from unet.errors import InputError
from unet.runs.checkpoint import OPTIMIZER, STATE, WEIGHTS
from unet.runs.run import Run
from unet.storage import Folder
from unet.tracking import database
from unet.tracking.images import parsed
from unet.tracking.patience import patient
from unet.tracking.reach import check_server
from unet.tracking.send import kept_back, send
from unet.tracking.store import KEY, Store
from unet.tracking.stored_run import StoredRun
from unet.tracking.writer import AsyncWriter


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Requests are given up after a second, so that a frozen server costs no more."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def writers(tmp_path):
    """Makes writers, and ends them; what they say goes into the list of the second value."""
    made, words = [], []

    def make(uri, experiment):
        made.append(AsyncWriter(Folder(tmp_path), experiment, uri, words.append))
        made[-1].open()
        return made[-1]

    yield make, words
    for writer in made:
        writer.close()


def nothing_is_delivered(writer: AsyncWriter, words: list[str], count: int) -> None:
    """Try until the writer has said so much: a first failure in a row is not told yet."""
    for _ in range(20):
        assert not writer.deliver(0, at_most=60)
        if len(words) >= count:
            return
    pytest.fail(f"nothing is said of an outage: {words}")


def line(epoch: int) -> dict:
    return {"epoch": epoch, "step": 3 * epoch, "time": 1000 + epoch, "val/loss": 1 / epoch, "train/loss": 2 / epoch}


def expected(lines: list[dict]) -> Counter:
    """Metrics as MLflow keeps them."""
    return Counter(
        (name, value, record["time"], record.get("epoch", record["step"]))
        for record in lines
        for name, value in record.items()
        if name not in ("epoch", "step", "time")
    )


def metrics_of(server: Server, run_id: str) -> Counter:
    return Counter(server.rows("select key, value, timestamp, step from metrics where run_uuid = ?", run_id))


def runs_of(server: Server, key: str) -> list[str]:
    """The ids of the runs with this key that were not deleted."""
    query = "select r.run_uuid from runs r join tags t on t.run_uuid = r.run_uuid where t.key = ? and t.value = ?"
    return [row[0] for row in server.rows(f"{query} and r.lifecycle_stage = 'active'", KEY, key)]


@pytest.mark.versions
def test_a_frozen_and_a_killed_server_lose_and_double_nothing(server, writers, tmp_path):
    make, words = writers
    (tmp_path / "some.txt").write_text("text")
    server.freeze()
    writer = make(server.uri, "frozen")
    writer.start("run", None, {"a": 1, "none": None}, {"kind": "x"}, "key-1", 1)
    for epoch in (1, 2):
        writer.epoch(line(epoch))
    writer.file(Folder(tmp_path), "some.txt", "below")
    assert writer.run_id is None, "the calls were to return before the server answers"
    nothing_is_delivered(writer, words, 1)
    assert writer.run_id is None
    server.thaw()
    assert writer.deliver(60)
    server.kill()
    writer.epoch(*map(line, (1, 2, 3)))  # the first two were given before
    writer.epoch(line(4))
    nothing_is_delivered(writer, words, 3)
    server.start()
    writer.epoch(line(5))
    writer.status("finished", 5)
    assert writer.deliver(60)

    assert runs_of(server, "key-1") == [writer.run_id]
    assert metrics_of(server, writer.run_id) == expected(list(map(line, range(1, 6))))
    run = mlflow.MlflowClient(server.uri).get_run(writer.run_id)
    assert run.data.params == {"a": "1"} and run.data.tags["kind"] == "x" and run.info.status == "FINISHED"
    assert (run.info.start_time, run.info.end_time) == (1, 5)
    assert [p.read_text() for p in (server.folder / "artifacts").rglob("below/some.txt")] == ["text"]
    place = f"MLflow at {server.uri}"
    assert [w.partition(" (")[0] for w in words[::2]] == [f"{place} does not answer"] * 2, words
    assert words[1::2] == [f"{place} answers again: sending what was queued."] * 2
    assert all(w.endswith(": the job goes on, and what it sends is queued.") for w in words[::2])


def test_a_run_whose_creation_was_not_answered_is_made_once(server, writers):
    """Also the experiment and the metrics: what the server has taken is not taken twice."""
    make, _ = writers
    wire = Line(server, ["experiments/create", "runs/create", "runs/log-batch"])
    try:
        writer = make(wire.uri, "lost")
        writer.start("run", None, {"a": 1}, {}, "key-2", 1)
        writer.epoch(line(1))
        assert writer.deliver(60)
    finally:
        wire.close()
    assert sorted(wire.lost) == ["experiments/create", "runs/create", "runs/log-batch"]
    assert runs_of(server, "key-2") == [writer.run_id]
    assert metrics_of(server, writer.run_id) == expected([line(1)])


def test_of_two_runs_with_one_key_one_stays(server, tmp_path):
    """A frozen server may answer the first of two creations after the second."""
    store = Store(Folder(tmp_path), "doubled", server.uri)
    run = StoredRun(store)
    own = run.start("run", None, {}, key="key-3", started=5)
    late = store.client.create_run(store.experiment_id, 1, {KEY: "key-3"}).info.run_id
    assert set(runs_of(server, "key-3")) == {own, late}
    run.single("key-3")
    assert runs_of(server, "key-3") == [own]
    assert StoredRun(Store(Folder(tmp_path), "doubled", server.uri)).start("run", None, {}, key="key-3") == own


def test_a_file_that_cannot_be_sent_holds_nothing_up(server, writers, tmp_path):
    make, words = writers
    writer = make(server.uri, "files")
    writer.start("run", None, {}, {}, "key-5", 1)
    writer.file(Folder(tmp_path), "late.txt")
    writer.epoch(line(1))
    writer.status("finished", 5)
    assert not writer.deliver(0, at_most=60)
    assert metrics_of(server, writer.run_id) == expected([line(1)])
    assert mlflow.MlflowClient(server.uri).get_run(writer.run_id).info.status == "FINISHED"
    (tmp_path / "late.txt").write_text("late")
    assert writer.deliver(60)
    assert [p.read_text() for p in (server.folder / "artifacts").rglob("late.txt")] == ["late"]
    assert not any("does not answer" in w for w in words)


def test_a_file_may_take_longer_than_a_metric(server, writers, tmp_path):
    """The server takes three seconds to hand it on, and a request is given up after one."""
    make, words = writers
    wire = Line(server, [], slow=3)
    (tmp_path / "large.bin").write_bytes(b"x" * 100_000)
    try:
        writer = make(wire.uri, "slow")
        writer.start("run", None, {}, {}, "key-7", 1)
        writer.file(Folder(tmp_path), "large.bin")
        writer.epoch(line(1))
        assert writer.deliver(0, at_most=60) and not words
        with patient(2**28) as seconds:
            assert seconds > 1000
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"
    finally:
        wire.close()
    sent = {p.name: p.stat().st_size for p in (server.folder / "artifacts").rglob("*.bin")}
    assert sent == {"large.bin": 100_000}


def test_a_run_that_was_removed_is_made_anew(server, writers):
    make, words = writers
    client, lines = mlflow.MlflowClient(server.uri), [line(1), line(2)]
    first = make(server.uri, "removed")
    first.start("run", None, {}, {}, "key-6", 1)
    first.epoch(lines[0])
    assert first.deliver(60)
    client.delete_run(first.run_id)
    first.epoch(lines[1])
    assert not first.deliver(60), "refused, not waited for"
    assert "refuses part of the run" in words[0] and len(words) == 1 and first.refuses
    again = make(server.uri, "removed")
    again.start("run", first.run_id, {}, {}, "key-6", 1)
    again.epoch(*lines)
    assert again.deliver(60) and again.run_id != first.run_id
    assert runs_of(server, "key-6") == [again.run_id] and metrics_of(server, again.run_id) == expected(lines)


def test_what_can_never_work_is_refused_and_an_outage_is_not(server, writers):
    make, words = writers
    client = mlflow.MlflowClient(server.uri)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(InputError, match="experiment gone was deleted: restore it"):
        make(server.uri, "gone").check(60)
    with pytest.raises(InputError, match=r"MLflow cannot use foo://me: .*unsupported URI"):
        make("foo://me", "x").check(60)
    nothing_is_delivered(make("foo://me", "x"), words, 1)  # as a run that continues finds it
    assert "MLflow at foo://me cannot be used (MLflow cannot use foo://me: " in words.pop()
    away = make("http://127.0.0.1:9", "x")
    away.check(60)
    # A run that continues asks nothing; it takes what is deleted as an outage.
    assert not away.deliver(0, at_most=60)
    check_server(server.uri.replace("//", "//me:password@"))
    for uri in ("http://127.0.0.1:9", "http://me:password@nowhere.invalid", "postgresql://me:password@127.0.0.1:9/x"):
        with pytest.raises(InputError, match="does not answer") as error:
            check_server(uri)
        assert "password" not in str(error.value)
    assert any("does not answer" in w for w in words)


def test_a_locked_sqlite_delays_nobody(server, writers, tmp_path, monkeypatch):
    monkeypatch.setattr(database, "LOCKED_SECONDS", 1)
    make, words = writers
    path = shutil.copy(server.database, tmp_path / "locked.db")
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("begin exclusive")
    writer = make(f"sqlite:///{path}", "locked")
    writer.start("run", None, {}, {}, "key-4", 1)
    writer.epoch(line(1), line(2))
    writer.status("stopped")
    writer.check(60)  # the first attempt has failed, which is no reason to refuse
    assert writer.run_id is None and "locked" in writer.reason
    nothing_is_delivered(writer, words, 1)
    lock.close()
    assert writer.deliver(60)
    found = sqlite3.connect(path).execute("select key, value, timestamp, step from metrics").fetchall()
    assert Counter(row for row in found) >= expected([line(1), line(2)])
    assert mlflow.MlflowClient(writer.uri).get_run(writer.run_id).info.status == "KILLED"
    assert "locked" in words[0]


@pytest.fixture
def unsent(trained, tmp_path):
    """The session's run in another place, as one that MLflow has never heard of."""
    folder = shutil.copytree(trained[0], tmp_path / "storage" / "trained")
    summary = read_json(folder / "summary.json") | {"mlflow_run_id": None, "model_uri": None, "delivered": False}
    (folder / "summary.json").write_text(json.dumps(summary | {"mlflow_key": folder.parent.parent.name}))
    return folder


def test_a_store_that_never_comes_back_is_given_up(unsent, writers):
    make, _ = writers
    settings = tiny_settings(unsent.parent, ROOT, tracking_uri="http://me:word@127.0.0.1:9")
    run, writer = Run.load("trained", settings), make(settings.run.tracking_uri, "x")
    assert not send(run, writer, patience=0)
    words = kept_back(run, writer)
    command = (
        f"python jobs/train.py --sync trained --storage-path {unsent.parent} --tracking-uri 'http://***@127.0.0.1:9'"
    )
    assert words.endswith(command) and "the run's folder holds everything" in words


@pytest.mark.versions
def test_sync_sends_all_of_a_run_once(unsent, server, packed):
    """Line by line as in its folder, in a process that never imports TensorFlow; again, it changes nothing."""
    flags = ["--sync", "trained", "--storage-path", str(unsent.parent), "--tracking-uri", server.uri]
    code = f"""
import runpy, sys
sys.argv = ["train.py", *{flags!r}]
try:
    runpy.run_path("{ROOT}/jobs/train.py", run_name="__main__")
except SystemExit as end:
    import ray
    sys.exit(end.code or ("tensorflow" in sys.modules and "TensorFlow") or (ray.is_initialized() and "Ray") or 0)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_json(unsent / "summary.json")
    run_id = summary["mlflow_run_id"]
    assert done.stdout.split("\n")[:-1] == [
        f"MLflow at {server.uri} has all of the run trained (finished, 10 epochs): run {run_id}."
    ]
    state = check_synced(unsent, server)
    # As after a kill while it was sent: the same command answers that the run is finished, and sends it.
    (unsent / "summary.json").write_text(json.dumps(summary | {"delivered": None}))
    train(unsent.parent, packed, run_name="trained", tracking_uri=server.uri)
    assert check_synced(unsent, server) == state and read_json(unsent / "summary.json") == summary


def check_synced(folder: Path, server: Server) -> dict:
    """Compare a run's folder with what the server has; the server's rows of it."""
    summary, config = read_json(folder / "summary.json"), yaml.safe_load((folder / "config.yaml").read_text())
    run_id = summary["mlflow_run_id"]
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    found = metrics_of(server, run_id)
    test = Counter({row: n for row, n in found.items() if row[0].startswith("test/")})
    system = [json.loads(text) for text in (folder / "system.jsonl").read_text().splitlines()]
    assert found - test == expected(lines + system) and system
    assert {row[2:] for row in test} == {(summary["test_time"], 10)} and len(test) == 10
    assert ("test/mean_iou", summary["test"]["mean_iou"], summary["test_time"], 10) in test
    client = mlflow.MlflowClient(server.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and runs_of(server, summary["mlflow_key"]) == [run_id]
    assert (run.info.start_time, run.info.end_time) == (summary["started"], summary["ended"])
    shown = {k: str(v) for k, v in config.items() if v is not None}
    assert run.data.params == shown | {k: str(summary[k]) for k in ("parameters", "data_digest")}
    assert config["sync"] is None and run.data.tags["best_checkpoint"] == summary["best_checkpoint"]
    assert {summary["data_digest"][:36]} == {data.dataset.digest for data in run.inputs.dataset_inputs}
    check_models(client, run, summary, lines, folder)
    assert summary["model_uri"] == f"runs:/{run_id}/model" and summary["delivered"]
    (top,) = (server.folder / "artifacts").glob(f"*/{run_id}/artifacts")
    files = {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()}
    best = folder / summary["best_checkpoint"]
    places = {"": folder, "best_checkpoint/": best, "images/": folder / "images"}
    kept_here = {"COMMIT", OPTIMIZER, "metrics.jsonl", "system.jsonl", "summary.json", ".fencing-token"}
    own = {
        f"{place}{p.relative_to(where)}": p.read_bytes()
        for place, where in places.items()
        for p in (where.rglob("*") if place else where.glob("*"))
        if p.is_file() and p.name not in kept_here
    }
    assert {name: content for name, content in files.items() if name in own} == own
    shown = {parsed(name.removeprefix("images/"))[:2] for name in own if name.startswith("images/")}
    assert {epoch for _, epoch in shown} == {0, 1, 2, 3, 4, 6, 8} and len({key for key, _ in shown}) == 4
    assert set(files) - set(own) == {"summary.json", "data/manifest.json", "data/data_report.html"}
    assert {f for f in files if f.startswith("best_")} == {f"best_checkpoint/{f}" for f in (WEIGHTS, STATE)}
    outputs = [output.model_id for output in run.outputs.model_outputs]
    assert len(set(outputs)) == len(outputs)
    return {"metrics": found, "tags": run.data.tags, "files": sorted(files), "models": sorted(outputs)}


def check_models(client, run, summary: dict, lines: list[dict], folder: Path) -> None:
    """Each kept best checkpoint is a model once, with the scores of its epoch; the packaged one has the files."""
    models = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'")
    kept = {p.name for p in (folder / "checkpoints").iterdir()}
    best = {f"step_{r['step']:08d}": r for r in lines if r["val/best_epoch"] == r["epoch"]}
    final = Path(summary["best_checkpoint"]).name
    there = {model.tags["checkpoint"]: model for model in models if model.tags["checkpoint_kept"] == "true"}
    assert set(there) == kept & set(best) and there[final].name == "model"
    assert len({model.tags["checkpoint"] for model in models}) == len(models)
    assert {output.model_id for output in run.outputs.model_outputs} >= {model.model_id for model in models}
    for name, model in there.items():
        measured = {m.key: (m.value, m.step, m.dataset_name) for m in model.metrics if m.key.startswith("val/")}
        of_epoch = {k: v for k, v in best[name].items() if k.startswith("val/")}
        data = run.inputs.dataset_inputs[0].dataset.name.rpartition("/")[0]
        assert measured == {k: (v, best[name]["epoch"], f"{data}/val") for k, v in of_epoch.items()}
        assert model.status.value == "READY" and model.params["seed"] == run.data.params["seed"]
    (test,) = [m for m in there[final].metrics if m.key == "test/mean_iou"]
    assert test.value == summary["test"]["mean_iou"] and test.dataset_name.endswith("/test")
    mlflow.set_tracking_uri(client.tracking_uri)
    packed = Path(mlflow.artifacts.download_artifacts(summary["model_uri"]))
    mlflow.set_tracking_uri(None)
    there = {str(p.relative_to(packed)): p.read_bytes() for p in packed.rglob("*") if p.is_file()}
    own = folder / "model"
    sent = [p for p in own.rglob("*") if p.is_file() and p.name != "COMMIT"]
    there.pop("registered_model_meta", None)  # MLflow adds it as it downloads
    assert there == {str(p.relative_to(own)): p.read_bytes() for p in sent}


@pytest.mark.parametrize(
    ("status", "words", "flags"),
    [
        ("finished", "There is no run nobody under", ["--sync=nobody"]),
        ("failed", "does not answer", ["--sync=trained", "--tracking-uri=http://127.0.0.1:9"]),
        ("running", "has not ended, and sends what MLflow lacks as it goes on", ["--sync=trained"]),
        ("finished", "--sync names the run itself", ["--sync=trained", "--run-name=x"]),
    ],
)
def test_sync_of_what_cannot_be_is_one_sentence(unsent, capsys, status, words, flags):
    summary = read_json(unsent / "summary.json") | {"status": status}
    (unsent / "summary.json").write_text(json.dumps(summary))
    assert command("train", *flags, f"--storage-path={unsent.parent}") == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and words in output.err and output.err.count("\n") == 1 and not output.out
    assert read_json(unsent / "summary.json") == summary


def test_a_continued_run_gets_the_params_it_lacks(server, tmp_path):
    run = StoredRun(Store(Folder(tmp_path), "params", server.uri))
    run_id = run.start("run", None, {})
    run.params({"a": 1})
    run.start("run", run_id, {})
    run.params({"a": 2, "b": 3, "c": None})
    assert run.client.get_run(run_id).data.params == {"a": "1", "b": "3"}


def test_children_share_the_queue_of_their_parent(server, writers, tmp_path):
    """A server that is away for a while: all arrive, in their order, once, below the parent."""
    make, _ = writers
    server.freeze()
    writer = make(server.uri, "family")
    writer.start("sweep", None, {"searched": "x"}, {}, "key-8", 1)
    children = [writer.child() for _ in range(2)]
    for number, child in enumerate(children):
        child.start(f"trial-{number}", None, {"a": number}, {"trial": str(number)}, f"key-8-{number}", 2)
        child.epoch(line(1))
        child.epoch(line(1), line(2))
        child.status("finished", 5)
    assert not any(child.taken for child in children) and not writer.taken
    server.thaw()
    assert writer.deliver(60) and writer.taken
    for number, child in enumerate(children):
        assert child.taken and runs_of(server, f"key-8-{number}") == [child.run_id]
        assert metrics_of(server, child.run_id) == expected([line(1), line(2)])
        run = mlflow.MlflowClient(server.uri).get_run(child.run_id)
        assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 2, 5)
        assert run.data.tags["mlflow.parentRunId"] == writer.run_id and run.data.params == {"a": str(number)}


def test_a_child_that_is_refused_or_dropped_holds_no_other_up(server, writers, monkeypatch):
    make, words = writers
    whole = StoredRun.start

    def refusing(run, name, *given):
        if name == "trial-1":
            raise mlflow.MlflowException("not this one", mlflow.protos.databricks_pb2.INVALID_PARAMETER_VALUE)
        return whole(run, name, *given)

    monkeypatch.setattr(StoredRun, "start", refusing)
    writer = make(server.uri, "refused")
    writer.start("sweep", None, {}, {}, "key-9", 1)
    refused, dropped, taken = (writer.child() for _ in range(3))
    refused.start("trial-1", None, {}, {}, "key-9-1")
    refused.epoch(line(1))
    taken.start("trial-3", None, {}, {}, "key-9-3")
    taken.epoch(line(1))
    assert not writer.deliver(60), "a part was refused"
    assert taken.taken and not refused.taken and refused.run_id is None and "refuses part of the run" in words[0]
    refused.epoch(line(2))
    server.freeze()
    dropped.start("trial-2", None, {}, {}, "key-9-2")
    dropped.epoch(line(1))
    writer.drop(dropped)
    server.thaw()
    taken.epoch(line(2))
    writer.deliver(60)
    assert metrics_of(server, taken.run_id) == expected([line(1), line(2)]) and len(words) == 1
    assert dropped.run_id is None or not metrics_of(server, dropped.run_id)


@pytest.mark.slow
def test_a_training_whose_server_never_comes_back_ends_well(ray_cluster, server, packed, tmp_path):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    flags += [f"--data={packed}", "--run-name=left", f"--storage-path={tmp_path}", f"--tracking-uri={server.uri}"]
    process = start_job(*flags, RAY_ADDRESS=ray_cluster.address_info["gcs_address"])
    wait_for(
        lambda: (tmp_path / "left" / "metrics.jsonl").exists() and (tmp_path / "left" / "metrics.jsonl").read_text()
    )
    server.kill()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "Traceback" not in output, output
    assert f"MLflow at {server.uri} does not answer" in output
    assert f"--sync left --storage-path {tmp_path} --tracking-uri {server.uri}" in output
    summary = read_json(tmp_path / "left" / "summary.json")
    assert summary["status"] == "finished" and summary["delivered"] is False
    server.start()
    assert command("train", "--sync=left", f"--storage-path={tmp_path}") == 0
    check_synced(tmp_path / "left", server)
