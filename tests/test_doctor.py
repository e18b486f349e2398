"""The doctor: what it says of odd clusters, and that it sees what is odd about real ones."""

import json
import socket
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT, command, job
from hosts import Hosts

from unet import locks
from unet.doctor import examination, examiner, probe
from unet.doctor.facts import Examination, Link, Machine, Node, RayNode, Trouble
from unet.doctor.report import fails, findings
from unet.storage import Folder

VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "tensorflow": "2.21.0", "keras": "3.15.1"}
VERSIONS |= {"numpy": "2.4.6", "pyarrow": "25.0.1", "mlflow": "3.17.2"}
TAKES = {"python": ">=3.11,<3.14", "ray": ">=2.60,<2.61", "tensorflow": ">=2.21,<2.22"}
GOOD = Machine(
    versions=VERSIONS,
    code="c0de",
    instructions=frozenset({"avx", "avx2", "avx512f", "avx512_bf16"}),
    cpus=8,
    memory=32 * 10**9,
    free_memory=20 * 10**9,
    shared_memory=12 * 10**9,
    ray_folder="/tmp/ray",
    ray_disk=(0.4, 10**11),
    storage_free=10**12,
    open_files=(65536, 65536),
    token=True,
)
SIZES = {"cpus": 8, "memory": 2 * 10**10, "object_store": 9 * 10**9, "free_cpus": 8}
NAMES = tuple(f"h{i}" for i in range(1, 8))


def cluster(**examination) -> Examination:
    """A head without training work and six workers, on which all is well."""
    peers = {name: {other: Link(0.001, 0.0) for other in NAMES if other != name} for name in NAMES}
    usual = {"written": 0.0, "seen": frozenset(NAMES), "removed": True, "lease": True, "tracking": True, "data": "d"}
    nodes = [
        Node(name, RayNode(name, f"10.0.0.{i}", **SIZES), GOOD, **usual, links=peers[name])
        for i, name in enumerate(NAMES, 1)
    ]
    head = replace(nodes[0], ray=RayNode("h1", "10.0.0.1", object_store=10**9))
    return Examination((head, *nodes[1:]), driver=GOOD, requirements=TAKES, data="/pets", **examination)


def changed(found: Examination, name: str, **values) -> Examination:
    """With other values of one node; a dictionary changes parts of what its machine or Ray says."""

    def change(node: Node) -> Node:
        parts = {
            k: replace(getattr(node, k), **v) for k, v in values.items() if k in ("ray", "machine") and type(v) is dict
        }
        return replace(node, **(values | parts))

    return replace(found, nodes=tuple(change(node) if node.name == name else node for node in found.nodes))


def test_nothing_is_said_of_a_cluster_on_which_all_is_well():
    said = findings(cluster())
    assert {one.level for one in said} == {"ok"} and not fails(said)
    assert len({one.check for one in said}) == len(said) == 16


def test_a_cluster_that_grows_may_have_no_worker_yet():
    idle = replace(cluster(), nodes=cluster().nodes[:1])
    (said,) = [one for one in findings(idle) if one.check == "room"]
    assert said.level == "warning" and "add a worker node" in said.remedy
    (said,) = [one for one in findings(replace(idle, grows=True)) if one.check == "room"]
    assert said.level == "skipped" and "nodes come when a job asks" in said.text and "only those" in said.text


def versions(**other: str) -> dict:
    return {"machine": {"versions": VERSIONS | other}}


ODD = [
    # what is odd about h3, which check says so, how severely, and in which words
    ({"machine": Trouble("no answer in time")}, "cluster", "failure", "h3: no answer in time"),
    ({"machine": Trouble("ModuleNotFoundError: No module named 'unet'")}, "cluster", "failure", "is not on h3"),
    ({"ray": {"leaving": True}}, "cluster", "warning", "h3: about to be shut down"),
    (versions(ray="2.59.0"), "versions", "failure", "ray 2.59.0 on h3, and the project takes"),
    (versions(python="3.10.1"), "versions", "failure", "python 3.10.1 on h3, and the project"),
    (versions(python="3.11.9"), "versions", "warning", "h5 and 3 more; 3.11.9 on h3"),
    (versions(tensorflow="2.21.1"), "versions", "failure", "; 2.21.1 on h3"),
    (versions(numpy="2.4.7"), "versions", "warning", "; 2.4.7 on h3"),
    (versions(numpy="2.3.0"), "versions", "failure", "; 2.3.0 on h3"),
    ({"machine": {"versions": {"python": "3.11.7"}}}, "versions", "failure", "no tensorflow on h3"),
    ({"machine": {"code": "0ther"}}, "versions", "failure", "files differ: h1, h2, h4, h5 and 3 more | h3"),
    ({"machine": {"instructions": frozenset({"avx", "avx2"})}}, "processors", "warning", "; AVX2 on h3"),
    ({"machine": {"instructions": None, "architecture": "aarch64"}}, "processors", "warning", "; aarch64 on h3"),
    (
        {"machine": {"limited_by": "ONEDNN_MAX_CPU_ISA=AVX2"}},
        "processors",
        "warning",
        "(ONEDNN_MAX_CPU_ISA=AVX2) on h3",
    ),
    ({"machine": {"instructions": frozenset()}}, "processors", "failure", "no AVX on h3"),
    ({"ray": {"cpus": 64}}, "cpus", "warning", "than it may use: 64 for 8 on h3"),
    ({"ray": {"memory": 64 * 10**9}}, "memory", "warning", "than it may use: 73.0 GB for 32.0 GB on h3"),
    ({"machine": {"free_memory": 10**9}}, "memory", "warning", "takes about 2.0 GB: 1.0 GB on h3"),
    ({"machine": {"shared_memory": 64 * 2**20}}, "shared memory", "warning", "0.1 GB for 9.0 GB on h3"),
    ({"machine": {"ray_disk": (0.97, 10**9)}}, "disk", "failure", "97.0\N{NO-BREAK SPACE}% of /tmp/ray on h3"),
    ({"machine": {"storage_free": 0}}, "disk", "warning", "little is free at /storage: 0.0 GB on h3"),
    ({"machine": {"open_files": (1024, 4096)}}, "open files", "warning", "only 1024 on h3"),
    ({"ray": {"gpus": 2}, "visible_gpus": 0}, "gpus", "failure", "than Ray counts: 0 of 2 on h3"),
    ({"ray": {"gpus": 1}, "visible_gpus": Trouble("broken")}, "gpus", "failure", "none of 1 (broken) on h3"),
    ({"machine": {"gpus": (8.0,)}}, "gpus", "warning", "Ray knows nothing: 1 on h3"),
    ({"machine": {"token": False}}, "token", "warning", "no token on h3"),
    ({"written": Trouble("No space"), "seen": None}, "storage", "failure", "h3 cannot write to /storage: No space"),
    ({"removed": Trouble("AccessDenied")}, "storage", "failure", "h3 cannot remove from /storage: AccessDenied"),
    ({"seen": frozenset({"h3"})}, "storage", "failure", "h5 and 2 more | h3"),
    ({"lease": False}, "lease", "failure", "do not hold on h3"),
    ({"lease": Trouble("No locks available")}, "lease", "failure", "on h3: No locks available"),
    ({"tracking": Trouble("timed out")}, "mlflow", "warning", "cannot be used from h3"),
    ({"data": Trouble("There is no data at /pets")}, "data", "failure", "There is no data at /pets on h3"),
    ({"data": "other"}, "data", "failure", "holds other data: h1, h2, h4, h5 and 2 more | h3"),
    ({"links": {"h2": Trouble("timed out")}}, "ports", "failure", "from h3 to h2 (timed out)"),
    ({"links": Trouble("no answer in time")}, "ports", "failure", "h3 could not look for the others"),
    ({"written": -30.0}, "clocks", "warning", "beside the storage's clock: h3 is 30.0 s behind"),
]


@pytest.mark.parametrize(("odd", "check", "level", "words"), ODD, ids=[f"{row[1]}-{i}" for i, row in enumerate(ODD)])
def test_an_odd_node_is_named_with_what_to_do(odd, check, level, words):
    said = findings(changed(cluster(), "h3", **odd))
    found = [one for one in said if one.check == check and one.level == level and words in one.text]
    assert len(found) == 1 and found[0].remedy, [one for one in said if one.level != "ok"]
    assert fails(said) == any(one.level == "failure" for one in said)
    others = {one.check for one in said if one.level not in ("ok", "skipped")} - {check}
    assert not others


def test_a_clock_beside_the_others_is_named_whoever_looks():
    """Also where it is the one that the rest is compared with."""
    for odd in ("h1", "h5"):
        found = cluster()
        for name in NAMES:
            links = {n: Link(0.001, 90.0 * ((n == odd) - (name == odd))) for n in NAMES if n != name}
            found = changed(found, name, links=links)
        said = [one.text for one in findings(found) if one.check == "clocks"]
        assert said == [f"beside the other nodes' clocks: {odd} is 90.0 s ahead"]


def test_of_many_nodes_few_are_named_and_what_they_share_is_said_once():
    found = cluster()
    for name in NAMES[1:]:
        found = changed(
            found, name, tracking=Trouble("timed out"), seen=frozenset({name}), machine={"open_files": (1024, 1024)}
        )
    said = {one.check: one.text for one in findings(found) if one.level != "ok"}
    assert said.keys() == {"mlflow", "storage", "open files"}
    assert "from h2, h3, h4, h5 and 2 more" in said["mlflow"]
    assert said["storage"].endswith("everywhere: h1 | h2 | h3 | h4 | h5 | h6 | h7")


def test_mlflow_that_nobody_reaches_fails_and_so_does_a_wrong_password():
    found = cluster(tracking="http://server:5000", logged_in=Trouble("API request failed with error code 401"))
    (said,) = [one for one in findings(found) if one.check == "mlflow"]
    assert said.level == "failure" and "does not take this user" in said.text
    for name in NAMES:
        found = changed(found, name, tracking=Trouble("The tracking server does not answer: start it"))
    assert [one.level for one in findings(found) if one.check == "mlflow"] == ["failure"]


def test_a_cluster_without_room_without_a_node_and_without_an_answer():
    full = cluster()
    for name in NAMES[1:]:
        full = changed(full, name, ray={"free_cpus": 0})
    (said,) = [one for one in findings(full) if one.level != "ok"]
    assert (said.check, said.level) == ("room", "warning") and "other jobs hold 48 of 48 CPUs" in said.text
    (said,) = [one for one in findings(cluster(lost={"h8": "health check failed"})) if one.level != "ok"]
    assert said.level == "warning" and said.text == "h8: lost (health check failed)"
    lost = Examination(
        (Node("here", machine=GOOD),), GOOD, Trouble("The cluster at h:1 does not answer"), requirements=TAKES
    )
    assert [one.text for one in findings(lost) if one.level == "failure"] == ["The cluster at h:1 does not answer"]


def test_control_groups_of_both_versions_bound_memory_and_cpus(tmp_path):
    """The smallest limit of a process's group and of those above it; in a container only the root may be there."""
    second, first, bare = tmp_path / "second", tmp_path / "first", tmp_path / "bare"
    for folder in (second / "pod" / "one", first / "memory" / "docker", first / "cpu", bare):
        folder.mkdir(parents=True)
    (second / "pod" / "memory.max").write_text("4000\n")
    (second / "pod" / "one" / "memory.max").write_text("max\n")
    (second / "pod" / "one" / "cpu.max").write_text("150000 100000\n")
    (second / "pod" / "cpu.max").write_text("max 100000\n")
    own = "0::/pod/one\n"
    assert (probe.memory_limit(second, own), probe.cpu_limit(second, own)) == (4000, 1.5)
    (first / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    (first / "memory" / "docker" / "memory.limit_in_bytes").write_text("7000\n")
    (first / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (first / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    own = "5:memory:/docker\n3:cpu,cpuacct:/elsewhere\n0::/\n"
    assert (probe.memory_limit(first, own), probe.cpu_limit(first, own)) == (7000, 0.5)
    assert probe.memory_limit(bare, own) is None and probe.cpu_limit(bare, own) is None


def test_a_link_tells_the_other_clock_and_what_does_not_answer():
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=examiner.tell_time, args=(server, lambda: time.time() + 90), daemon=True).start()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        places = {"ahead": server.getsockname(), "closed": closed.getsockname()}
        links = examiner.Examiner("/nowhere", "s", False).reach(places)
    assert links["ahead"].ahead == pytest.approx(90, abs=1) and links["closed"] == Trouble("Connection refused")


@pytest.mark.parametrize("ahead", [90, -90])
def test_a_clock_is_compared_with_the_storage(tmp_path, monkeypatch, ahead):
    here = examiner.Examiner(str(tmp_path / "runs"), "s", False)
    assert here.write("one") == 0
    monkeypatch.setattr(examiner, "time", SimpleNamespace(time=lambda: time.time() + ahead))
    assert here.write("two") == pytest.approx(ahead, abs=30)


def test_without_a_cluster_this_machine_is_examined_without_ray_and_left_as_it_was(tmp_path):
    place = tmp_path / "not" / "yet"
    flags = ["--storage-path", place, "--data", tmp_path / "none"]
    done = job("doctor", *flags, env={"RAY_ADDRESS": "local", "RAY_TMPDIR": str(tmp_path)}, cwd=ROOT)
    assert done.returncode == 1, done.stdout
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert lines["cluster"].startswith("–") and "Not examined" in lines["cluster"]
    assert lines["storage"].startswith("ok") and lines["lease"].startswith("ok")
    assert lines["data"].startswith("failure") and "There is no data at" in lines["data"]
    assert not list(tmp_path.iterdir())  # no Ray has begun there, either


@pytest.fixture
def unhurried(monkeypatch):
    """A machine may be slow."""
    for limit in ("ANSWER_SECONDS", "MEETING_SECONDS", "REMOVAL_SECONDS"):
        monkeypatch.setattr(examination, limit, 300)


@pytest.mark.versions
def test_a_full_cluster_is_examined_and_nothing_is_left_behind(ray_cluster, packed, tmp_path, unhurried, capsys):
    from ray.util import placement_group, remove_placement_group

    every = placement_group([{"CPU": 2}])
    assert every.wait(60)
    flags = ["--storage-path", tmp_path / "runs", "--data", packed, "--json"]
    assert command("doctor", *flags) == 0
    told = json.loads(capsys.readouterr().out)
    remove_placement_group(every)
    levels = {one["check"]: one["level"] for one in told["findings"]}
    assert told["ok"] and levels["room"] == "warning"
    assert all(levels[check] == "ok" for check in ("cluster", "versions", "storage", "lease", "mlflow", "data"))
    (node,) = told["measured"]["nodes"]
    assert node["machine"]["versions"] == told["measured"]["driver"]["versions"]
    assert node["machine"]["code"] == told["measured"]["driver"]["code"]
    assert not list(tmp_path.iterdir())


def test_an_object_store_and_a_server_are_used(ray_cluster, s3, server, unhurried, monkeypatch, capsys):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.5)  # the holder is seen to be alive when it renews its lock
    assert command("doctor", "--storage-path", s3("doctor"), "--tracking-uri", server.uri) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert all(lines[check].startswith("ok") for check in ("storage", "lease", "mlflow", "clocks"))
    assert "word" not in "".join(lines.values()) and Folder(s3("doctor")).files() == []


@pytest.mark.cluster
def test_what_is_odd_about_real_hosts_is_found(tmp_path):
    """Each finding with the others beside it: nothing that is well is blamed."""
    with Hosts(tmp_path, cpus=(0, 1)) as hosts:

        def problems(*flags) -> dict[str, str]:
            told = hosts[0].run(sys.executable, "jobs/doctor.py", "--json", *flags, env=hosts.joined)
            said = json.loads(told.stdout[told.stdout.index("{") :])
            assert told.returncode == (0 if said["ok"] else 1)
            found: dict[str, str] = {}
            for one in (one for one in said["findings"] if one["level"] != "ok"):
                kind = f"{one['check']} {one['level']}"
                found[kind] = "; ".join(filter(None, [found.get(kind), one["text"]]))
            return found

        def of_quick_hosts(*flags) -> dict[str, str]:
            """Asked again if this machine was so busy that a host seemed to be silent."""
            for _ in range(10):
                found = problems(*flags)
                if not any(words in str(found) for words in ("in time", "does not let this process in")):
                    break
            return found

        shared = ["--storage-path", tmp_path / "runs", "--data", "synthetic"]
        assert of_quick_hosts(*shared) == {}
        assert not (tmp_path / "runs").exists()

        package = tmp_path / "packages" / "pyarrow-22.0.0.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text("Name: pyarrow\nVersion: 22.0.0\n")
        other = {"PYTHONPATH": f"{package.parent}:{ROOT}", "ONEDNN_MAX_CPU_ISA": "AVX2"}
        hosts.add().start_ray(limits=["--nofile=1024"], env=other)
        hosts.nodes(3)
        found = of_quick_hosts()  # a home is a host's own
        assert found.keys() == {"versions failure", "processors warning", "open files warning", "storage failure"}
        assert found["versions failure"].endswith("22.0.0 on h3") and found["open files warning"].endswith("on h3")
        assert found["storage failure"].endswith("everywhere: h1 | h2 | h3")

        hosts[1].block(hosts[2])
        found = of_quick_hosts(*shared)
        assert "from h2 to h3 (Permission denied), h3 to h2" in found["ports failure"]
        (raylet,) = hosts[1].processes("raylet/raylet")
        raylet.suspend()
        assert "h2: no answer in time" in problems(*shared)["cluster failure"]
        raylet.resume()
        hosts[2].cut()
        found = problems(*shared)
        assert "h3: it accepts no connections" in str(found) or "h3: lost" in str(found)  # after a while Ray knows
        (head,) = hosts[0].processes("gcs_server")
        head.suspend()
        assert "does not let this process in" in problems(*shared)["cluster failure"]
        head.resume()
