"""What `jobs/train.py` makes of a finished run: a page of scores, and exports."""

import json
import shutil

import pytest
import yaml
from conftest import command, read_json

from unet.commands.cli import parse
from unet.config import TrainSettings, TuneSettings, flat
from unet.errors import InputError
from unet.packaging.export import Disagreement


@pytest.fixture
def finished(trained, storage, monkeypatch):
    """A copy of the trained run, which MLflow does not know: `--resume` only answers, and makes what is asked for."""
    monkeypatch.setattr("unet.cluster.devices.start_tensorflow", lambda threads: None)  # it has begun here
    without = shutil.ignore_patterns("evaluations", "export")  # of other tests
    copy = shutil.copytree(trained[0], storage / "copy", ignore=without)
    (copy / "summary.json").write_text(json.dumps(trained[1] | {"run_name": "copy", "mlflow_run_id": None}))
    yield copy
    shutil.rmtree(copy)


def test_a_report_and_exports_come_with_a_run(finished, trained, storage, capsys):
    flags = ["--resume=copy", f"--storage-path={storage}", "--report", "--export", "tflite"]
    assert command("train", *flags) == 0
    scored, made = finished / "evaluations" / "test", read_json(finished / "export" / "export.json")
    assert read_json(scored / "metrics.json")["images"] == trained[1]["test"]["images"]
    assert (scored / "report.html").stat().st_size > 10_000
    # Compared on the run's own photos, not on others'.
    assert list(made["formats"]) == ["tflite"] and made["compared_on"]["source"].startswith("val and train of ")
    shown = capsys.readouterr().out
    last = shown[shown.rindex("Run copy is finished") :]
    assert f"  report    {scored}/report.html" in last and f"  export    {finished}/export" in last


def test_what_cannot_be_made_loses_no_run(finished, storage, capsys):
    """Neither the page, which has no place, nor the export, whose folder holds something else."""
    (finished / "evaluations").touch()
    (finished / "export").mkdir()
    (finished / "export" / "mine.txt").touch()
    before = (finished / "summary.json").read_bytes()
    flags = ["--resume=copy", f"--storage-path={storage}", "--report", "--export"]
    assert command("train", *flags) == 1
    shown = capsys.readouterr().out
    where = f"--model copy --storage-path {storage}"
    assert f"later: python jobs/evaluate.py --split test {where}\n" in shown
    assert f"later: python jobs/export.py --formats saved_model tflite onnx {where}\n" in shown
    assert "has no export yet: " in shown and "holds something else" in shown
    assert (finished / "summary.json").read_bytes() == before and "Run copy is finished" in shown


def test_a_form_that_disagrees_is_not_asked_for_again(finished, storage, capsys, monkeypatch):
    def refuse(*_):
        raise Disagreement("model_int8.tflite is another", ("tflite", "onnx"))

    monkeypatch.setattr("unet.commands.export.write", refuse)
    assert (
        command("train", "--resume=copy", f"--storage-path={storage}", "--export", "tflite", "onnx", "tflite_int8") == 1
    )
    assert f"later: python jobs/export.py --formats tflite onnx --model copy --storage-path {storage}\n" in (
        capsys.readouterr().out
    )


def test_a_sweep_makes_neither(tmp_path):
    with pytest.raises(InputError, match=r"--report and --export are for `jobs/train.py`"):
        TuneSettings(run={"report": True})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(saved("--report", "--export")))
    found = parse(TuneSettings, "", [f"--config={tmp_path / 'run.yaml'}"])
    assert (found.run.report, found.run.export) == (False, None)


def test_an_export_alone_is_the_usual_forms():
    assert saved("--export")["export"] == ["saved_model", "tflite", "onnx"]
    assert saved("--export", "onnx", "onnx", "tflite")["export"] == ["onnx", "tflite"]
    assert saved()["export"] is None


def saved(*flags: str) -> dict:
    """The settings of a run with these flags, as its config.yaml has them."""
    return flat(parse(TrainSettings, "", list(flags)))
