"""What an autoscaler is asked for, and what follows from its answers: a simulated one, and Ray's words for it."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import ray

from unet.cluster import demand, internals, room
from unet.cluster.demand import Demand, Needs, needs_of, when_grown
from unet.cluster.placement import Node
from unet.config import TrainSettings, unflat
from unet.errors import InputError
from unet.supervise.supervisor import Supervisor


def settings(**changes):
    return unflat(TrainSettings, changes)


class Autoscaler:
    """Brings pods of 8 CPUs and 17.2 GB, up to a number, for what fits onto them.

    Attributes:
        pods: how many are there.
        lines: what was said while waiting.
    """

    def __init__(self, most: int, pods: int = 0):
        self.most, self.pods, self.lines = most, pods, []

    def nodes(self) -> list[Node]:
        return [Node(0, memory=4e9), *[Node(8, 0, 17.2e9, 4.8e9, free_cpus=8)] * self.pods]

    def demand(self, needs: Needs, apart: bool = False):
        left: list[Counter] = []
        for bundle in needs.bundles:
            fitting = [pod for pod in left if all(pod[name] >= amount for name, amount in bundle.items())]
            left += [] if fitting else [Counter(CPU=8, memory=17.2e9)]
            (fitting or left[-1:])[0].subtract(bundle)
        possible = len(left) <= self.most and all(min(pod.values()) >= 0 for pod in left)

        class Asked(Demand):
            def __init__(self):
                self._groups = []

            def is_met(asked):
                if possible and self.lines:
                    self.pods = max(self.pods, len(left))
                return len(left) <= self.pods

            def is_out_of_reach(self):
                return not possible

        return Asked()


@pytest.fixture
def scaled(monkeypatch):
    """Puts an `Autoscaler` in the place of Ray's."""

    def made(most: int, pods: int = 0) -> Autoscaler:
        of = Autoscaler(most, pods)
        monkeypatch.setattr(internals, "autoscales", lambda: True)
        monkeypatch.setattr(demand, "Demand", of.demand)
        monkeypatch.setattr(demand, "LOOK_SECONDS", 0)
        monkeypatch.setattr(room, "cluster_nodes", of.nodes)
        return of

    return made


def test_each_worker_is_asked_for_with_its_memory_and_threads():
    (eight,) = {tuple(bundle.items()) for bundle in needs_of(settings(num_workers=8)).bundles}
    assert dict(eight)["CPU"] == 1 and 2e9 < dict(eight)["memory"] < 3e9
    assert needs_of(settings(num_workers="2:4", threads=8)).bundles[0]["CPU"] == 8
    alone, on_gpu = needs_of(settings()), needs_of(settings(device="gpu"))
    assert len(alone.bundles) == 1 and alone.memory > 2 * on_gpu.memory  # it has the whole batch, a GPU's is its own
    assert "1 CPU, a GPU and 1." in str(on_gpu) and str(Needs(2)) == "2 workers with 1 CPU each"


@pytest.mark.parametrize("pods", [0, 1])
def test_workers_that_one_node_cannot_hold_get_more_nodes(scaled, pods):
    """By memory: eight on one pod would need 20 GB."""
    of = scaled(8, pods)
    found = room.take_room(settings(num_workers=8), 10**8, of.lines.append)
    assert (found.num_workers, of.pods) == (8, 2)
    assert "for the autoscaler to bring room for 8 workers with 1 CPU and 2.5 GB each" in of.lines[0]


def test_workers_with_threads_get_nodes_of_their_own(scaled):
    """Also where an earlier job has left a node that would hold them all, with shared cores."""
    of = scaled(8, pods=1)
    found = room.take_room(settings(num_workers=4, threads=8), 10**8, of.lines.append)
    assert (found.num_workers, found.cpus_per_worker, of.pods) == (4, 7.5, 4)
    of = scaled(1, pods=1)  # it may bring no more: what is there is taken
    assert room.take_room(settings(num_workers=4, threads=8), 10**8, of.lines.append).num_workers == 4


def test_what_can_never_come_is_refused(scaled):
    of = scaled(1, pods=1)
    with pytest.raises(InputError, match=r"need about 20.4 GB.*may start hold 8 workers with 1 CPU and 2.5 GB each"):
        room.take_room(settings(num_workers=8), 10**8, of.lines.append)


def test_where_what_has_come_does_not_do_more_is_asked_for(scaled):
    of = scaled(4, pods=1)

    def take():
        if of.pods < 3:
            raise InputError("Too small.")
        return of.pods

    assert when_grown(take, Needs(1, 8), of.lines.append) == 3


def test_a_head_that_is_slow_to_answer_is_asked_again(monkeypatch):
    """Neither is a demand out of reach for it, nor is there no autoscaler."""

    class Slow:
        def get_cluster_status(self, timeout_s):
            raise ray.exceptions.RpcError("Deadline Exceeded", 4)

    monkeypatch.setattr("ray.experimental.internal_kv.internal_kv_get_gcs_client", Slow)
    assert not internals.is_out_of_reach("0" * 36)
    named(monkeypatch, "cpu")
    assert internals.autoscales() is None


def named(monkeypatch, group: str, report: dict | None = None) -> None:
    """A cluster whose node has the name of a group, and what the older autoscaler writes down."""
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"Alive": True, "Labels": {"ray.io/node-group": group} if group else {}}]
    )
    written = json.dumps(report).encode() if report else None
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", lambda key: written)


@pytest.mark.parametrize("told,grows", [(0, None), (7, True)])
def test_the_name_of_a_group_is_no_autoscaler(monkeypatch, told, grows):
    """KubeRay gives it to every pod, whether it has an autoscaler or not."""
    state = SimpleNamespace(last_seen_cluster_resource_state_version=told)
    monkeypatch.setattr(internals, "_autoscaling_state", lambda: state)
    named(monkeypatch, "cpu")
    assert internals.autoscales() is grows
    named(monkeypatch, "local.cluster.node")
    assert internals.autoscales() is False
    named(monkeypatch, "")
    assert internals.autoscales() is False


@pytest.mark.parametrize("kind,grows", [("ray.worker", True), ("local.cluster.node", False), ("node_1f", False)])
def test_the_older_autoscaler_brings_no_machines_that_are_there_already(monkeypatch, kind, grows):
    named(monkeypatch, "", {"autoscaler_report": {"active_nodes": {kind: 2}}})
    assert internals.autoscales() is grows


def test_an_autoscaler_that_starts_is_waited_for(scaled, monkeypatch):
    of, said = scaled(2), iter([None, None, True])
    monkeypatch.setattr(internals, "autoscales", lambda: next(said))
    assert room.take_room(settings(), 0, of.lines.append).num_workers == 1
    assert of.lines[0] == "waiting for the autoscaler to start"
    monkeypatch.setattr(internals, "autoscales", lambda: None)
    monkeypatch.setattr(demand, "START_SECONDS", 0)
    of.pods = 0
    with pytest.raises(InputError, match="no CPUs yet"):
        room.take_room(settings(), 0, of.lines.append)
    of.pods, of.lines = 1, []
    assert room.take_room(settings(threads=8), 0, of.lines.append).num_workers == 1
    assert not of.lines  # what is there does


def test_an_elastic_run_asks_for_the_workers_that_it_lacks(scaled, monkeypatch):
    """One at a time, so that some may come without the others."""
    asked = []

    class Asked:
        def __init__(self, needs, apart):
            asked.append((needs, apart))

        def held(self):
            return 1

    of = scaled(8, pods=1)
    monkeypatch.setattr("unet.supervise.supervisor.autoscales", lambda: True)
    monkeypatch.setattr("unet.supervise.supervisor.Demand", Asked)
    elastic = settings(num_workers="1:4", threads=8)
    run = SimpleNamespace(settings=elastic, plan=room.plan_now(elastic, of.nodes(), 0), _more=None)
    run._like_these = lambda workers, of: Supervisor._like_these(run, workers, of)
    assert run.plan.num_workers == 1  # four would share the cores of one pod
    assert [Supervisor._ask_for_more(run) for _ in range(2)] == [1, 1]
    ((needs, apart),) = asked
    assert apart and (needs.workers, needs.cpus) == (3, 8)
    assert needs.memory < needs_of(elastic).memory
