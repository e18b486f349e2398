"""A run that begins with what there is, grows and shrinks, and ends with the weights of one that did neither."""

import threading

import numpy as np
import psutil
import pytest
import ray
from conftest import TINY, ray_processes, read_json, train, weights_of
from test_run import wait_for

from unet.supervise import supervisor

FIXED = TINY | {"grad_shards": 2, "threads": 1, "epochs": 40, "base_filters": 4}


@ray.remote
class Holder:
    """Somebody else's CPUs."""

    def pid(self):
        return psutil.Process().pid


def hold(cpus: float):
    return Holder.options(num_cpus=cpus).remote()


@pytest.mark.versions
@pytest.mark.slow
def test_an_elastic_run_grows_and_shrinks_to_the_same_weights(ray_cluster, storage, packed, monkeypatch):
    """One worker at first, two when somebody leaves, one again when a worker is lost and its place taken."""
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(supervisor, "SETTLE_SECONDS", 1.0)
    monkeypatch.setattr(supervisor, "GROW_SECONDS", 0.5)
    plain = train(storage, packed, as_trial=True, run_name="never-resized", num_workers=1, **FIXED)
    folder, others = storage / "resized", [hold(1.2)]
    ray.get(others[0].pid.remote())

    def log():
        return (read_json(folder / "summary.json").get("restart_log") or []) if folder.exists() else []

    def resize():
        wait_for(lambda: list(folder.glob("checkpoints/step_*/COMMIT")))
        ray.kill(others[0])
        wait_for(lambda: log() and log()[-1]["workers"] == 2)
        known = len(list(folder.glob("checkpoints/step_*")))
        saved = (folder / "metrics.jsonl").read_text().count("\n")
        wait_for(lambda: (folder / "metrics.jsonl").read_text().count("\n") > saved + 2)
        assert known
        others.append(hold(1.2))  # waits for the CPUs of the group that is lost now
        ray_processes("RayTrainWorker")[-1].kill()

    helper = threading.Thread(target=resize)
    helper.start()
    resized = train(storage, packed, run_name="resized", num_workers="1:2", **FIXED)
    helper.join()
    ray.kill(others[-1])
    assert [entry["workers"] for entry in resized["restart_log"]] == [2, 1]
    assert "room for 2 workers" in resized["restart_log"][0]["reason"]
    last = [
        sorted(p.name for p in (storage / name / "checkpoints").iterdir())[-1] for name in ("never-resized", "resized")
    ]
    assert last[0] == last[1]
    before, after = (weights_of(storage / name, last[0]) for name in ("never-resized", "resized"))
    for name in before:
        np.testing.assert_allclose(before[name], after[name], atol=1e-6)
    assert resized["val"]["mean_iou"] == plain["val"]["mean_iou"]
