"""What a run tells Prometheus: the loop's meters, what Ray exports of them, and the dashboard that asks for it."""

import json
import re
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from dataclasses import fields

import pytest
from conftest import ROOT, free_ports, tiny_settings
from test_loop import WorkerLink, loop_of, reading  # noqa: F401  # `reading` is a fixture
from test_run import wait_for

from unet.supervise import driver
from unet.supervise.preflight import open_run
from unet.training.meters import Meters, exported

DASHBOARD = ROOT / "clusters" / "grafana.json"
NEEDED = {
    "prometheus": "Debian's prometheus is not installed",
    "grafana_foundation_sdk": 'grafana_foundation_sdk is not installed: pip install -e ".[cluster]"',
}


def queries() -> list[str]:
    """What the dashboard asks of Prometheus."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def series() -> list[tuple[str, dict[str, str], float]]:
    """What Ray's agent of this node exports: names, labels, values."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=30) as answer:
        lines = re.findall(r"^(\w+)(?:{(.*)})? (\S+)$", answer.read().decode(), re.MULTILINE)
    return [(name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for name, labels, value in lines]


def of_run(run: str) -> dict[tuple[str, str], float]:
    """Its metrics, by name and rank."""
    return {(name, labels["rank"]): value for name, labels, value in series() if labels.get("run") == run}


def test_a_loop_counts_its_steps_but_for_the_first(reading, storage):  # noqa: F811
    loop = loop_of(storage, "metered", reading, WorkerLink(), epochs=1, checkpoint_every="5")
    assert loop.train(lambda record: None)
    meters, (record,) = loop.meters, loop.state.history
    assert meters.steps == loop.plan.steps - 1
    assert meters.images == loop.plan.samples - loop.plan.batch_size
    assert meters.checkpoints == (loop.plan.steps - 1) // 5 + 1
    assert meters.checkpoint_seconds > 0 and meters.step_cpu_seconds > 0
    seconds = meters.step_seconds + meters.data_wait_seconds
    assert meters.images / seconds == pytest.approx(record["speed/images_per_second"])
    assert meters.data_wait_seconds / seconds == pytest.approx(record["speed/data_wait_fraction"])
    assert meters.loss == pytest.approx(record["train/loss"], abs=1) and meters.loss != record["train/loss"]


def test_ray_exports_every_metric_that_the_dashboard_asks_for(trained):
    """What the two workers of a training have counted is there after their end; gauges only while they are set."""
    asked = set(re.findall(r"ray_\w+", " ".join(queries())))
    own = {f"ray_unet_{each.name}" + ("" if each.default is None else "_total") for each in fields(Meters)}
    assert own <= asked, "what nobody looks at is not exported"
    with exported(Meters(*[2.0] * len(own)), "shown", "7"):
        wait_for(lambda: asked <= {name for name, _, _ in series()} and len(of_run("shown")) == len(own))
    assert of_run("shown") == {(name, "7"): 2.0 for name in own}
    found, (_, summary) = of_run("trained"), trained
    assert all(found["ray_unet_steps_total", rank] >= summary["steps"] - 1 for rank in "01")
    assert found["ray_unet_images_total", "0"] > found["ray_unet_images_total", "1"] > 0  # short batches end with it


@pytest.mark.cluster
def test_grafana_knows_every_field_of_the_dashboard():
    """Its types for Python leave out what they do not know."""
    pytest.importorskip("grafana_foundation_sdk", reason=NEEDED["grafana_foundation_sdk"])
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    def lost(given, known, place: str) -> list[str]:
        if isinstance(given, dict):
            return [name for key in given for name in lost(given[key], (known or {}).get(key), f"{place}/{key}")]
        if isinstance(given, list) and given:
            assert len(given) == len(known)
            return [name for i in range(len(given)) for name in lost(given[i], known[i], f"{place}/{i}")]
        return [] if given in (known, {}, []) else [place]

    register_default_plugins()
    given = json.loads(DASHBOARD.read_text())
    assert lost(given, json.loads(JSONEncoder().encode(Dashboard.from_json(given))), "") == []


@pytest.mark.cluster
def test_prometheus_answers_every_question_of_the_dashboard(ray_cluster, storage, packed, tmp_path):
    """With the configuration that Ray writes for it, and a training of two workers."""
    program = shutil.which("prometheus") or pytest.skip(NEEDED["prometheus"])
    port = free_ports()[0]
    configuration = f"{ray_cluster.address_info['session_dir']}/metrics/prometheus/prometheus.yml"
    command = [program, f"--config.file={configuration}"]
    command += [f"--storage.tsdb.path={tmp_path}", f"--web.listen-address=127.0.0.1:{port}"]

    def answer(query: str) -> list:
        query = query.replace("$run", "watched").replace("$__rate_interval", "1m")
        address = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(address, timeout=30) as reply:
            return json.load(reply)["data"]["result"]

    def all_answered() -> bool:
        try:
            return all(answer(query) for query in queries())
        except OSError:  # it is not there yet
            return False

    stop, changes = threading.Event(), {"epochs": 100_000, "checkpoint_every": "20", "run_name": "watched"}
    run = open_run(tiny_settings(storage, packed, **changes))
    training = threading.Thread(target=driver.train, args=(run,), kwargs={"stop_signal": stop})
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as prometheus:
        try:
            training.start()
            wait_for(all_answered, 400)
            found = {query: answer(query) for query in queries()}
        finally:
            stop.set()
            training.join()
            prometheus.terminate()
    by_rank = [result for query, result in found.items() if "run, rank" in query]
    assert len(by_rank) == 3 and all({one["metric"]["rank"] for one in result} == {"0", "1"} for result in by_rank)
