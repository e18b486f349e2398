"""A sweep in MLflow without any training: outages and kills lose and double nothing of it or of its trials."""

import json
import threading
from collections import Counter
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import listening, read_json, words_of

from unet.config import TuneSettings, unflat
from unet.errors import RunFailed
from unet.storage import Folder
from unet.tracking import writer
from unet.tuning import sweep_runs
from unet.tuning.ledger import Ledger
from unet.tuning.runner import run_sweep
from unet.tuning.space import parse_space
from unet.tuning.sweep import Sweep
from unet.tuning.sweep_runs import SweepRuns

ENDS = {"finished": (0.3, 0.6), "pruned": (0.2,), "failed": ()}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(writer, "FIRST_PAUSE", 0.2)


@pytest.fixture
def sweep(server, tmp_path):
    """A sweep whose trials have ended, as its folder says, and which MLflow knows nothing of."""
    values = {"storage_path": str(tmp_path), "data": "synthetic:20", "tracking_uri": server.uri, "epochs": 2}
    settings = unflat(TuneSettings, values | {"experiment": tmp_path.name, "run_name": "s"})
    space = parse_space("dropout: {uniform: [0.0, 0.5]}", "x", settings)
    sweep = Sweep("s", settings, Folder(tmp_path) / "s", space)
    sweep.start(planned=3, extending=False, data_digest="digest", prepared=str(tmp_path / "gone"))
    ledger = Ledger(sweep.folder)
    for number, (end, scores) in enumerate(ENDS.items()):
        row = ledger.begin({"dropout": number / 10})
        lines = [{"epoch": e, "step": e, "time": 1000 + e, "val/mean_iou": s} for e, s in enumerate(scores, 1)]
        folder = sweep.folder / row["trial"]
        folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        folder.write_text("config.yaml", yaml.safe_dump(base_of(sweep) | row["settings"]))
        summary = {"status": "finished", "data_digest": "digest", "mlflow_run_id": None, "started": 1, "ended": 5000}
        folder.write_text("summary.json", json.dumps(summary | {"delivered": number != 0, "best_checkpoint": "x"}))
        ledger.update(row["trial"], end=end, reason=f"of {end}", started=1.0, ended=5.0)
        ledger.refresh(row["trial"], len(scores))
    ledger.write()
    return sweep


def base_of(sweep: Sweep) -> dict:
    return sweep.base("data", sweep.settings.run.tracking_uri)


def runs_of(sweep: Sweep, words: list | None = None) -> SweepRuns:
    """Those of a new start of the sweep."""
    runs = SweepRuns(sweep, Ledger(sweep.folder), [].append if words is None else words.append)
    runs.begin(base_of(sweep))
    return runs


def assert_mlflow_has_all(sweep: Sweep) -> None:
    client = mlflow.MlflowClient(sweep.settings.run.tracking_uri)
    experiment = client.get_experiment_by_name(sweep.settings.run.experiment).experiment_id
    found = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert len(client.search_runs([experiment])) == 4 and set(found) == {"s", "trial-001", "trial-002", "trial-003"}
    own = read_json(Path(sweep.folder.path) / "summary.json")["mlflow_run_id"]
    assert found["s"].info.run_id == own and "dropout" in found["s"].data.params["searched"]
    for row, (end, scores) in zip(Ledger(sweep.folder).rows, ENDS.items(), strict=True):
        run = found[row["trial"]]
        assert row["sent"] and row["mlflow_run_id"] == run.info.run_id and run.data.tags["end"] == end
        assert run.data.tags["mlflow.parentRunId"] == own
        assert run.info.status == {"failed": "FAILED"}.get(end, "FINISHED") and run.info.end_time == 5000
        assert run.data.params["dropout"] == str(row["settings"]["dropout"]) and "space" not in run.data.params
        metrics = client.get_metric_history(run.info.run_id, "val/mean_iou")
        assert Counter((m.value, m.step) for m in metrics) == Counter((s, e) for e, s in enumerate(scores, 1))
        told = read_json(Path(sweep.folder.path) / row["trial"] / "summary.json")
        assert (told["end"], told["mlflow_run_id"]) == (end, run.info.run_id)


def test_what_an_outage_keeps_back_is_sent_by_the_next_start(sweep, server, monkeypatch):
    words: list[str] = []
    server.freeze()
    with monkeypatch.context() as frozen:
        frozen.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        runs = runs_of(sweep, words)
        try:
            runs.send_missing()
            stop = threading.Event()
            stop.set()
            while not words:
                assert not runs.deliver(stop)
            assert not any(row.get("sent") for row in Ledger(sweep.folder).rows)
            assert "does not answer" in words[0] and words[0].endswith("the job goes on, and what it sends is queued.")
        finally:
            runs.close()
            server.thaw()
    runs = runs_of(sweep)
    runs.send_missing()
    assert runs.deliver()
    runs.close()
    assert_mlflow_has_all(sweep)


def test_a_kill_doubles_nothing(sweep):
    """It falls between what MLflow has taken and the ledger's word of it."""
    before = sweep.folder.read_bytes("trials.jsonl")
    for _ in range(2):
        runs = runs_of(sweep)
        runs.send_missing()
        assert runs.finish()
        runs.close()
        assert_mlflow_has_all(sweep)
        keys = [row["mlflow_key"] for row in Ledger(sweep.folder).rows]
        sweep.folder.write_bytes("trials.jsonl", before)
        ledger = Ledger(sweep.folder)
        for row, key in zip(ledger.rows, keys, strict=True):
            ledger.update(row["trial"], mlflow_key=key)
        sweep.write_summary(mlflow_run_id=None)


def test_a_finished_sweep_sends_what_mlflow_lacks(sweep, server, monkeypatch):
    """The same command again, as it says where MLflow was away at the end."""
    facts = {"trials": 3, "best_trial": "trial-001", "val/best_mean_iou": 0.6, "reason": "all trials ended"}
    sweep.write_summary(status="finished", delivered=False, ended=9, extending=False, **facts)
    server.kill()
    try:
        with monkeypatch.context() as away, pytest.raises(RunFailed, match="does not have all of the sweep"):
            away.setattr(sweep_runs, "PATIENCE", 2.0)
            run_sweep(sweep, listening())
    finally:
        server.start()
    display = listening()
    run_sweep(sweep, display)
    assert f"has all of the sweep {sweep.name}" in words_of(display)
    assert_mlflow_has_all(sweep)
    client = mlflow.MlflowClient(server.uri)
    run = client.get_run(sweep.summary["mlflow_run_id"])
    assert (run.info.status, run.info.end_time, run.data.metrics["val/best_mean_iou"]) == ("FINISHED", 9, 0.6)
    assert run.data.tags["best_trial"] == "trial-001" and sweep.summary["delivered"]
    display = listening()
    run_sweep(sweep, display)
    assert "has all of the sweep" not in words_of(display) and "is finished (3 trials" in words_of(display)
