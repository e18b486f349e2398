"""What a run asks and what a cluster has: pure arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet.cluster.placement import Node, Placement
from unet.cluster.planner import plan, plan_now, worker_bytes
from unet.cluster.room import refuse_held
from unet.config import TrainSettings, unflat
from unet.data.streaming import task_bytes
from unet.errors import InputError


def settings(**changes):
    return unflat(TrainSettings, {"base_filters": 8, "image_size": 64} | changes)


def laptop(cpus=2, **changes):
    return [Node(cpus, **({"memory": 16e9, "object_store": 6e9} | changes))]


def test_two_workers_run_on_two_cpus_beside_the_readers():
    found = plan(settings(num_workers=2), laptop(), 10**6)
    assert found.cpus_per_worker == 0.75 and found.threads == 1 and found.kept
    assert plan(settings(), laptop(), 10**6).threads == 2


@given(st.lists(st.integers(1, 16), min_size=1, max_size=4), st.integers(1, 12))
def test_what_is_planned_fits_every_node_and_leaves_room_to_read(cpus, workers):
    nodes = [Node(c, memory=1e12, object_store=1e11) for c in cpus]
    if workers > sum(cpus):
        with pytest.raises(InputError, match=f"at most {sum(cpus)}"):
            plan(settings(num_workers=workers), nodes, 0)
        return
    share = plan(settings(num_workers=workers), nodes, 0).cpus_per_worker
    assert sum(int((c - 0.5 + 1e-9) // share) for c in cpus) >= workers


def test_data_beyond_the_budget_or_the_object_store_are_streamed():
    assert plan(settings(), laptop(), int(3e9)).kept
    assert not plan(settings(), laptop(), int(5e9)).kept
    assert not plan(settings(memory_budget="1GB"), laptop(), int(3e9)).kept
    assert not plan(settings(memory_budget="10GB"), laptop(object_store=1e9), int(3e9)).kept


def test_too_little_memory_is_refused_with_a_batch_that_fits():
    with pytest.raises(InputError, match=r"try --batch-size (\d+)") as error:
        plan(settings(base_filters=64, image_size=128, batch_size=256), laptop(memory=8e9), 0)
    fitting = int(str(error.value).split("--batch-size ")[1].rstrip("."))
    plan(settings(base_filters=64, image_size=128, batch_size=fitting), laptop(memory=8e9), 0)


def test_what_streams_the_data_counts_in_the_memory_of_a_node():
    """At 512 px a window is a chunk of 268 MB; two tasks that read such are planned, or one, or the run is refused."""
    large = settings(image_size=512, batch_size=4, num_workers=2)
    workers, task = 2 * worker_bytes(large, 2), task_bytes(512, 4)
    assert 0.75e9 < task < 1e9 and 0.45e9 < task_bytes(128, 64) < 0.6e9
    found = [plan(large, laptop(memory=workers + room * task), 10**13).stream_tasks for room in (1.1, 2.1, 9)]
    assert found == [1, 2, 2]
    with pytest.raises(InputError, match=r"the task that streams the data to them 0\.8 GB, but the node has"):
        plan(large, laptop(memory=workers + 0.9 * task), 10**13)
    assert plan(large, laptop(memory=workers + 0.9 * task), 10**6).kept


def test_gpus_are_taken_when_there_is_one_for_each():
    assert plan(settings(num_workers=2), laptop(8, gpus=2), 0).use_gpu
    assert not plan(settings(num_workers=2), laptop(8, gpus=1), 0).use_gpu


def test_a_cluster_whose_workers_have_not_joined_is_refused():
    with pytest.raises(InputError, match="no CPUs yet"):
        plan(settings(), laptop(0), 0)


def test_busy_cpus_are_refused_with_what_would_fit():
    with pytest.raises(InputError, match=r"2 workers need 1.5 CPUs.*leave 1 free.*--num-workers 1\."):
        refuse_held(Placement(2, 0.75, 1, False), free(1.0))


def free(*cpus, each=2):
    return [Node(each, memory=16e9, object_store=6e9, free_cpus=c) for c in cpus]


def test_an_elastic_run_takes_what_there_is_and_leaves_room_to_grow():
    """A worker has the same CPUs and threads alone as beside the other, so that the other can join it."""
    elastic = settings(num_workers="1:2")
    whole, half = plan_now(elastic, free(2), 0), plan_now(elastic, free(0.8), 0)
    assert (whole.num_workers, half.num_workers) == (2, 1)
    assert half.cpus_per_worker == whole.cpus_per_worker == 0.75 and half.threads == whole.threads == 1
    assert plan_now(elastic, free(0.7), 0) is None
    assert plan_now(elastic, free(0.8), 0, held=1).num_workers == 2
    assert plan_now(settings(num_workers=2), free(0.8), 0) is None


def test_free_cpus_count_where_they_lie():
    """0.4 and 0.4 free CPUs of two nodes hold no worker of 0.75."""
    assert plan_now(settings(num_workers="1:4"), free(0.4, 0.4), 0) is None
    assert plan_now(settings(num_workers="1:4"), free(1.6, 0.4), 0).num_workers == 2


def test_a_small_node_keeps_its_reserve():
    """A node of one CPU holds one worker of 0.5 beside its readers, not two."""
    assert plan_now(settings(num_workers=2), free(1, 0, each=1), 0) is None
    assert plan_now(settings(num_workers=2), free(1, 1, each=1), 0).num_workers == 2


def test_an_elastic_run_counts_on_the_nodes_there_are():
    """At most as many workers as the nodes could ever hold, and with micro-shards only what divides them."""
    assert plan_now(settings(num_workers="1:8"), free(2), 0).num_workers == 2
    assert plan_now(settings(num_workers="1:4", grad_shards=4, batch_size=8), free(8, each=8), 0).num_workers == 4
    assert plan_now(settings(num_workers="1:4", grad_shards=4, batch_size=8), free(5.7, each=8), 0).num_workers == 2
    with pytest.raises(InputError, match="at most 2 fit"):
        plan_now(settings(num_workers="4:8"), free(2), 0)


@pytest.mark.parametrize("given", ["0", "2:1", "x", "1:", "-1", "1.5"])
def test_a_number_of_workers_that_is_none_is_refused(given):
    with pytest.raises(InputError, match="--num-workers"):
        settings(num_workers=given)
