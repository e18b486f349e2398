"""The registry: versions by run and checkpoint, one champion by val on the same data; a model found by every name."""

from pathlib import Path

import mlflow
import numpy as np
import pytest
import yaml
from conftest import job, read_json, tiny_settings, weights_of
from mlflow.entities import Metric

from unet.config import ExportSettings, TrainSettings, flat, unflat
from unet.errors import InputError, RunFailed
from unet.models.trained import TrainedModel, tracking_uri_of
from unet.secrets import MASK
from unet.storage import Folder
from unet.terminal import Display
from unet.tracking.registry import Version, judge, register, register_run

OLD = Version("pets", "1", 0.6, "data")


class Said(Display):
    """A display that keeps what it was told."""

    def __init__(self):
        super().__init__(quiet=True)
        self.words = []

    def say(self, text, style=None):
        self.words.append(text)


@pytest.mark.parametrize(
    ("new", "champion", "becomes", "words"),
    [
        (Version("pets", "1", 0.1, "data"), None, True, "the first one"),
        (Version("pets", "2", 0.61, "data"), OLD, True, "0.6100 against 0.6000 of models:/pets/1"),
        (Version("pets", "2", 0.6, "data"), OLD, False, "is not the champion: its val mean IoU is 0.6000 against"),
        (Version("pets", "2", 0.59, "data"), OLD, False, "is not the champion"),
        (
            Version("pets", "2", 0.99, "other"),
            OLD,
            False,
            "--model models:/pets/2,models:/pets/1 --data DATA --split val",
        ),
        (Version("pets", "2", None, "data"), OLD, False, "there is no val score of models:/pets/2."),
        (OLD, Version("pets", "3", None, "data"), False, "there is no val score of models:/pets/3."),
        (Version("pets", "2", 0.99, ""), Version("pets", "1", 0.6, ""), False, "cannot be compared"),
        (OLD, OLD, True, "already"),
    ],
)
def test_who_is_champion(new, champion, becomes, words):
    found, sentence = judge(new, champion)
    assert found == becomes and words in sentence


def packaged_run(client, experiment: str, folder, name: str, val: float, test: float, digest="data", step=1) -> str:
    """A finished run with as much of a packaged model as the registry reads; its id."""
    run_id = client.create_run(experiment).info.run_id
    pack(client, run_id, folder, name, {"val/mean_iou": val, "test/mean_iou": test}, digest, step)
    return run_id


def pack(client, run_id: str, folder, name: str, scores: dict, digest: str, step: int) -> None:
    tags = {"run_name": name, "checkpoint": f"step_{step:08d}", "data_digest": digest}
    model = client.create_logged_model(client.get_run(run_id).info.experiment_id, "model", run_id, tags)
    client.log_batch(run_id, [Metric(*item, step, step, model_id=model.model_id) for item in scores.items()])
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "MLmodel").write_text(yaml.safe_dump({"metadata": tags | scores}))
    client.log_model_artifacts(model.model_id, str(folder / name))
    client.finalize_logged_model(model.model_id, "READY")


def test_the_champion_is_the_best_on_val_whatever_test_says(trained, storage, tmp_path):
    _, summary = trained
    uri, said = f"sqlite:///{storage}/mlflow.db", Said()
    client = mlflow.MlflowClient(uri)
    experiment = client.get_run(summary["mlflow_run_id"]).info.experiment_id
    run = lambda *what, **more: packaged_run(client, experiment, tmp_path, *what, **more)  # noqa: E731
    champion = lambda: str(client.get_model_version_by_alias("contest", "champion").version)  # noqa: E731
    first = run("first", 0.5, 0.5)
    assert register(uri, "contest", first, said) == "models:/contest/1" and champion() == "1"
    assert register(uri, "contest", run("worse", 0.4, 0.9), said) == "models:/contest/2" and champion() == "1"
    better = run("better", 0.6, 0.1)
    assert register(uri, "contest", better, said) == "models:/contest/3" and champion() == "3"
    assert register(uri, "contest", run("elsewhere", 0.9, 0.9, digest="x"), said) == "models:/contest/4"
    assert champion() == "3" and "--split val" in said.words[-1]
    tags = client.get_model_version("contest", "3").tags
    assert tags == {
        **{"run": "better", "checkpoint": "step_00000001", "data_digest": "data"},
        **{"val_mean_iou": "0.6", "test_mean_iou": "0.1"},
    }
    # The same once more, and what was broken off before the alias was given.
    client.delete_registered_model_alias("contest", "champion")
    assert register(uri, "contest", better, said) == "models:/contest/3" and champion() == "3"
    # A run that goes on: another version, and the older one keeps its content.
    pack(client, better, tmp_path, "better", {"val/mean_iou": 0.7}, "data", step=2)
    assert register(uri, "contest", better, said, "step_00000002") == "models:/contest/5" and champion() == "5"
    mlflow.set_tracking_uri(uri)
    kept = mlflow.artifacts.download_artifacts("models:/contest/3", dst_path=str(tmp_path / "kept"))
    mlflow.set_tracking_uri(None)  # the project's own calls say which store they mean
    assert "val/mean_iou: 0.6" in Path(kept, "MLmodel").read_text()
    assert len(client.search_model_versions("name = 'contest'")) == 5
    with pytest.raises(InputError, match="is of its checkpoint step_00000002, not of step_00000001"):
        register(uri, "contest", better, said, "step_00000001")
    with pytest.raises(RunFailed, match="has no packaged model in MLflow"):
        register(uri, "contest", client.create_run(experiment).info.run_id, said)


@pytest.mark.versions
def test_a_model_is_found_by_every_name_exported_and_registered(trained, storage, tmp_path):
    """Through `jobs/export.py` without Ray, by its URI; then in a process with Ray by each name: the same weights."""
    folder, summary = trained
    flags = [f"--model={summary['model_uri']}", f"--storage-path={storage}", f"--output={tmp_path}", "--threads=1"]
    done = job("export", *flags, "--formats", "tflite", "--register=handed")
    assert done.returncode == 0, done.stdout
    assert "model.tflite" in done.stdout and "models:/handed/1 is the champion" in done.stdout
    told = read_json(tmp_path / "export.json")
    assert told["formats"].keys() == {"tflite"} and told["formats"]["tflite"]["equal_classes"] > 0.9999
    assert told["model"]["val_mean_iou"] == summary["val"]["mean_iou"] and told["threads"] == 1
    expected = weights_of(folder, summary["best_checkpoint"].split("/")[1])
    shapes = sorted(str(w.shape) for w in expected.values())
    for name in (
        folder.name,
        summary["model_uri"],
        "models:/handed/1",
        "models:/handed@champion",
        str(folder / "model"),
        str(folder),
    ):
        found = TrainedModel.find(name, Folder(storage))
        assert sorted(str(w.shape) for w in found.weights.values()) == shapes
        assert all(any(np.array_equal(w, e) for e in expected.values()) for w in found.weights.values()), name
        assert found.val_mean_iou == summary["val"]["mean_iou"] and found.data_digest == summary["data_digest"]
        known = None if name == str(folder / "model") else summary["mlflow_run_id"]
        assert found.mlflow_run_id == known and f"step_{summary['best_checkpoint'][-8:]}" == found.checkpoint


def test_a_run_says_where_it_is_tracked(tmp_path):
    assert tracking_uri_of(None) is None and tracking_uri_of(Folder(tmp_path)) is None
    (tmp_path / "config.yaml").write_text("tracking_uri: http://somewhere:5000\n")
    assert tracking_uri_of(Folder(tmp_path)) == "http://somewhere:5000"
    (tmp_path / "config.yaml").write_text(f"tracking_uri: http://{MASK}@somewhere:5000\n")
    with pytest.raises(InputError, match="give --tracking-uri"):
        tracking_uri_of(Folder(tmp_path))


@pytest.mark.parametrize("name", ["bob's", " ", "", "a/b", "models:x", "a\nb"])
def test_names_that_no_registry_takes(name):
    for settings in (ExportSettings, TrainSettings):
        with pytest.raises(InputError, match="--register"):
            unflat(settings, {"register": name})
        assert flat(unflat(settings, {"register": "my pets-2.1"}))["register"] == "my pets-2.1"


def test_register_of_a_finished_training(trained, storage):
    _, summary = trained
    said, run = Said(), tiny_settings(storage, "synthetic", register="at-the-end").run
    register_run(summary, run, said)
    assert said.words == ["Registered: models:/at-the-end/1 is the champion: the first one."]
    with pytest.raises(RunFailed, match="not registered as at-the-end, since MLflow lacks it"):
        register_run(summary | {"delivered": False}, run, said)
