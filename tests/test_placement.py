"""CPUs and GPUs of a cluster: what is planned can be placed, and what can be placed is planned. Pure arithmetic."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet.cluster import planner, room
from unet.cluster.demand import Needs
from unet.cluster.placement import Node, Placement, in_words
from unet.cluster.planner import plan, plan_now, plan_prediction, plan_scoring, plan_trials
from unet.config import TrainSettings, unflat
from unet.errors import InputError


def settings(**changes):
    return unflat(TrainSettings, {"base_filters": 8, "image_size": 64} | changes)


def node(cpus, gpus=0, **changes):
    """A node that nobody uses."""
    return Node(cpus, gpus, 1e12, 1e11, cpus, gpus, **changes)


def cluster(*nodes):
    return [node(*of) for of in nodes]


def placed(nodes, cpus, use_gpu):
    """How many bundles {CPU: cpus, GPU: 1} Ray's nodes hold, in its ten-thousandths."""
    each = round(cpus * 1e4)
    places = [round(n.cpus * 1e4) // each for n in nodes]
    return sum(min(p, int(n.gpus)) if use_gpu else p for p, n in zip(places, nodes, strict=True))


NODES = st.lists(
    st.builds(node, st.sampled_from([0, 0.5, 1, 2, 3, 4, 8, 32, 48, 64]), st.sampled_from([0, 0, 1, 2, 4, 8])),
    min_size=1,
    max_size=4,
)


@given(NODES, st.integers(1, 12), st.sampled_from(["auto", "cpu", "gpu"]))
def test_what_is_accepted_can_be_placed_and_what_can_be_placed_is_accepted(nodes, workers, device):
    on_cpus = any(n.cpus for n in nodes) and workers <= max(1, int(sum(n.cpus for n in nodes)))
    on_gpus = sum(n.gpus for n in nodes if n.cpus) >= workers
    possible = {"cpu": on_cpus, "gpu": on_gpus, "auto": on_cpus or on_gpus}[device]
    values = settings(num_workers=workers, device=device)
    ways = [
        lambda: plan(values, nodes, 0),
        lambda: plan_scoring(nodes, workers, 1e9, device),
        lambda: plan_prediction(nodes, workers, device),
    ]
    if not possible:
        for way in ways:
            with pytest.raises(InputError):
                way()
        return
    found, scoring, predicting = (way() for way in ways)
    for one in (found, scoring, predicting):
        assert one.use_gpu == (device != "cpu" and on_gpus) and one.cpus_per_worker > 0
        assert placed(nodes, one.cpus_per_worker, one.use_gpu) >= workers and one.num_workers == workers
    assert found.threads >= 1 and predicting.threads >= 1
    # Nobody uses the nodes: all of them find room at once, with the nodes' reserves left alone.
    assert plan_now(values, nodes, 0) == found
    assert scoring.room(nodes) >= workers and scoring.room(nodes, beside=0.2) >= 1
    assert predicting.room(nodes) >= workers
    spare = [replace(n, cpus=n.cpus - min(0.5, n.cpus / 2)) for n in nodes]
    assert placed(spare, found.cpus_per_worker, found.use_gpu) >= workers


@given(NODES, st.integers(1, 3), st.sampled_from(["auto", "cpu"]))
def test_trials_beside_each_other_can_be_placed(nodes, workers, device):
    try:
        found, together = plan_trials(settings(num_workers=workers, device=device), nodes, 0)
    except InputError:
        assert workers > max(1, int(sum(n.cpus for n in nodes))) or not any(n.cpus for n in nodes)
        return
    assert together >= 1 and placed(nodes, found.cpus_per_worker, found.use_gpu) >= together * workers
    assert found.use_gpu == (device == "auto" and sum(n.gpus for n in nodes if n.cpus) >= workers)


GPU_CLUSTERS = [
    cluster((8, 0), (4, 1), (4, 1)),
    cluster((32, 0), (8, 4)),
    cluster((32, 1), (8, 1)),
    cluster((64, 0), (48, 4), (48, 4)),
]


@pytest.mark.parametrize("workers", [1, 2, "1:2"])
@pytest.mark.parametrize("nodes", GPU_CLUSTERS)
def test_nodes_without_gpus_do_not_count_for_workers_on_gpus(nodes, workers):
    values = settings(num_workers=workers)
    found = plan_now(values, nodes, 0)
    assert found.use_gpu and found.num_workers == int(str(workers)[-1])
    # What the small node with a GPU has: its CPUs, memory and store, not those of the large one without.
    small = [n if n.gpus else replace(n, memory=1e9, object_store=1e7) for n in nodes]
    assert plan(values, small, 10**9) == plan(values, nodes, 10**9)
    assert found.threads <= max(n.cpus for n in nodes if n.gpus)


def test_threads_and_cpus_are_those_of_the_nodes_with_gpus():
    eight, large = GPU_CLUSTERS[0], GPU_CLUSTERS[3]
    assert (
        plan(settings(num_workers=2), eight, 0).cpus_per_worker,
        plan(settings(num_workers=2), eight, 0).threads,
    ) == (
        3.5,
        4,
    )
    assert plan(settings(num_workers=8), large, 0).threads == 12
    assert plan(settings(num_workers=2, device="cpu"), eight, 0).cpus_per_worker == 3.75  # both on the large node
    assert plan_scoring(eight, None, 1e9).num_workers == 2 and plan_scoring(eight, None, 1e9, "cpu").num_workers == 16
    assert plan_prediction(eight, None) == Placement(2, 2.0, 4, True, reserved=0)
    found, together = plan_trials(settings(), large, 0)
    assert (found.use_gpu, together) == (True, 8)


def test_auto_takes_cpus_where_there_are_too_few_gpus_and_says_why():
    nodes = cluster((8, 1))
    for found in (plan(settings(num_workers=2), nodes, 0), plan_now(settings(num_workers=2), nodes, 0)):
        assert not found.use_gpu
        assert in_words(found.use_gpu, found.why_cpus) == "CPUs (2 worker(s) need a GPU each, and the cluster has 1)"
    assert plan_scoring(nodes, 2, 1e9).why_cpus and plan_prediction(nodes, 2).why_cpus
    assert plan_trials(settings(num_workers=2), nodes, 0)[0].why_cpus
    assert in_words(*[getattr(plan(settings(), cluster((8,)), 0), name) for name in ("use_gpu", "why_cpus")]) == "CPUs"
    assert not plan(settings(num_workers=2, device="cpu"), nodes, 0).why_cpus  # it was asked for


@pytest.mark.parametrize(
    "nodes,words",
    [(cluster((8,)), "has none: give --device cpu"), (cluster((8, 1)), "has 1: give --num-workers 1, or")],
)
def test_gpus_that_are_not_there_are_refused(nodes, words):
    asked = settings(num_workers=2, device="gpu")
    for refused in (
        lambda: plan(asked, nodes, 0),
        lambda: plan_now(settings(num_workers="2:4", device="gpu"), nodes, 0),
        lambda: plan_trials(asked, nodes, 0),
        lambda: plan_scoring(nodes, 2, 1e9, "gpu"),
        lambda: plan_prediction(nodes, 2, "gpu"),
    ):
        with pytest.raises(InputError, match=words):
            refused()


def test_an_elastic_run_counts_gpus_and_not_cpus():
    """With two GPUs one to four workers are one or two, and never some on CPUs beside them."""
    two, one_free = cluster((8, 0), (8, 2)), [node(8), replace(node(8, 2), free_gpus=1)]
    elastic = settings(num_workers="1:4")
    assert (plan_now(elastic, two, 0).num_workers, plan_now(elastic, one_free, 0).num_workers) == (2, 1)
    assert plan_now(elastic, one_free, 0).cpus_per_worker == plan_now(elastic, two, 0).cpus_per_worker
    assert plan_now(elastic, [node(8), replace(node(8, 2), free_gpus=0)], 0) is None
    assert plan_now(elastic, one_free, 0, held=1).num_workers == 2
    assert plan_now(settings(num_workers="1:4", device="cpu"), two, 0).num_workers == 4
    on_cpus = plan_now(settings(num_workers="3:4"), two, 0)
    assert not on_cpus.use_gpu and "3 worker(s) need a GPU each" in on_cpus.why_cpus


def test_an_elastic_run_adds_no_workers_whose_threads_would_share_cores():
    one, two = cluster((8,)), cluster((8,), (8,))
    whole = settings(num_workers="1:4", threads=8)
    assert [plan_now(whole, nodes, 0).num_workers for nodes in (one, two)] == [1, 2]
    assert plan_now(settings(num_workers="1:4"), one, 0).num_workers == 4
    assert plan_now(settings(num_workers="2:4", threads=8), one, 0).num_workers == 2  # as asked


def test_a_run_stays_on_what_it_began_on():
    """Where a node with a GPU is lost, two workers wait for it; the CPUs of the rest do not take their place."""
    with pytest.raises(InputError, match="need a GPU each, and the cluster has 1"):
        plan_now(settings(num_workers=2), cluster((8, 0), (8, 1)), 0, device="gpu")
    assert not plan_now(settings(num_workers=2), cluster((8, 0), (8, 2)), 0, device="cpu").use_gpu


def test_the_memory_of_a_gpu_is_not_that_of_its_node():
    large = {"base_filters": 64, "image_size": 128, "batch_size": 256}
    nodes = [Node(4, 1, memory=11e9)]
    assert plan(settings(**large), nodes, 0).use_gpu
    with pytest.raises(InputError, match="try --batch-size"):
        plan(settings(**large, device="cpu"), nodes, 0)


def test_a_large_node_and_a_small_one_have_memory_of_their_own():
    """Workers are many where there is much memory, and few where there is little."""
    nodes = [Node(8, memory=64e9), Node(2, memory=3e9)]
    assert plan(settings(num_workers=9, batch_size=90), nodes, 0).num_workers == 9


def test_a_prediction_counts_free_cpus_on_the_node_of_the_free_gpu():
    """8 free CPUs beside a node whose GPU is free and whose CPUs are not hold no process on a GPU."""
    held = [Node(8, free_cpus=8), Node(4, 1, free_cpus=0.5, free_gpus=1)]
    fitted = plan_prediction(held, 1, "gpu")
    assert fitted.use_gpu and fitted.room(held) == 0
    assert fitted.room([held[0], Node(4, 1, free_cpus=4, free_gpus=1)]) == 1
    with pytest.raises(InputError, match=r"no node with a free GPU and 2 free CPUs for the worker"):
        room.refuse_held(fitted, held, beside=0.5)


def test_trials_on_a_large_cluster_are_planned_in_few_steps(monkeypatch):
    """As many as memory allows, of hundreds that the CPUs would hold."""
    asked, whole = [], planner._plan
    monkeypatch.setattr(planner, "_plan", lambda *given: asked.append(given[3]) or whole(*given))
    nodes = [Node(64, memory=32e9, object_store=10e9) for _ in range(4)]
    large = settings(base_filters=64, image_size=128, batch_size=64)
    _, together = plan_trials(large, nodes, 0)
    assert max(asked) > 200 and len(asked) < 12
    whole(large, nodes, 0, together, 1, False)
    with pytest.raises(InputError):
        whole(large, nodes, 0, together + 1, 1, False)


def test_held_gpus_are_refused_with_what_would_fit(monkeypatch):
    nodes = [replace(node(8, 4), free_gpus=1)]
    monkeypatch.setattr(room, "cluster_nodes", lambda: nodes)
    monkeypatch.setattr(room, "LOOKS", 1)
    assert room.take(lambda found: plan_prediction(found, 1, "gpu"), beside=0.5).num_workers == 1
    with pytest.raises(InputError, match=r"leave 1 free.*--num-workers 1, or give --device cpu"):
        room.take(lambda found: plan_prediction(found, 2, "gpu"), beside=0.5)


def test_room_that_is_handed_back_in_a_moment_is_taken(monkeypatch):
    """What just ended still holds its CPUs at the first look; a job takes what it planned as soon as it is there."""
    looks = iter([[replace(node(2), free_cpus=free)] for free in (0, 0.8, 2)] * 4)
    monkeypatch.setattr(room, "cluster_nodes", lambda: next(looks))
    monkeypatch.setattr(room, "LOOK_SECONDS", 0)
    assert room.take_room(settings(num_workers=2), 0, print).num_workers == 2
    assert room.take_places(plan(settings(), [node(2)], 0, together=2), 2, Needs(1), print) == 2
    assert room.take(lambda found: plan_scoring(found, None, 1e9), beside=0.2, least=1).num_workers == 2
    assert room.take(lambda found: plan_prediction(found, 2), beside=0.5).num_workers == 2


def test_fewer_workers_score_and_sweep_beside_other_jobs_and_a_sentence_says_so(monkeypatch):
    said, nodes = [], [replace(node(2), free_cpus=1.5)]
    monkeypatch.setattr(room, "cluster_nodes", lambda: nodes)
    monkeypatch.setattr(room, "LOOKS", 1)
    assert room.take(lambda found: plan_scoring(found, 2, 1e9), 0.2, 1, said.append).num_workers == 1
    assert said == ["Other jobs leave 1.5 CPUs free: 1 of 2 workers start."]
    nodes = [replace(node(2), free_cpus=0.8)]
    assert room.take_places(plan(settings(), nodes, 0, together=2), 2, Needs(1), print) == 1
    with pytest.raises(InputError, match=r"1 worker needs 0.75 CPUs and 0.2 for tasks.*leave 0.8 free.*ray job stop"):
        room.take(lambda found: plan_scoring(found, 2, 1e9), 0.2, 1)
