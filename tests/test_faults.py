"""What ended the workers in words, and whether they are started again."""

import os
import signal
import subprocess
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, ray_processes, read_json, tiny_settings, train, weights_of
from hypothesis import given
from hypothesis import strategies as st
from ray.train import WorkerGroupError
from test_run import start_job, wait_for

from unet.cluster.planner import Node, Plan
from unet.errors import Diverged, StepFailed
from unet.runs.run import Run
from unet.storage import Folder
from unet.supervise import supervisor
from unet.supervise.faults import LONGEST_WAIT, Fault, Tries, fault_of, with_nodes
from unet.terminal import Display

DIED = RuntimeError(
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tpid: 4711"
)
MEMORY = RuntimeError("Task was killed due to the node running low on memory; memory usage threshold was exceeded")
AWAY = RuntimeError("The actor 4e is unavailable: The actor is temporarily unavailable: RpcError: Socket closed")
BROKEN = StepFailed("UnavailableError: Connection reset by peer")
LINK = RuntimeError("The actor died unexpectedly.\n\tclass_name: DriverLink\n\tpid: 4711")
NODE = RuntimeError("The actor died because its node has died. Node Id: 4e")
WRAPPED = RuntimeError("a page of Ray's\nKeyError: 'another line'")
WRAPPED.cause = KeyError("width")
OF_KERAS = TypeError(
    "Exception encountered when calling Norm.call().\n\n\x1b[1mCould not infer\na shape.\n\nmust be float32\x1b[0m\n\n"
    "Arguments received by Norm.call():\n  • training=True"
)


@pytest.mark.parametrize(
    ("failures", "kind", "words"),
    [
        ({0: BROKEN, 1: DIED}, "lost", "worker 1 on h3 (process 4711) was killed or has crashed"),
        ({0: BROKEN}, "lost", "the connection of worker 0 to the others broke"),
        ({1: MEMORY}, "lost", "ran out of memory"),
        ({0: BROKEN, 1: AWAY}, "lost", "worker 1 on h3 cannot be reached"),
        ({0: LINK}, "lost", "the link between driver and workers was lost"),
        ({0: BROKEN, 1: NODE}, "lost", "worker 1 on h3 was lost with its node"),
        ({0: DIED, 1: ValueError("of its own\nno such layer")}, "raised", "worker 1: ValueError: no such layer"),
        ({0: OF_KERAS}, "raised", "worker 0: TypeError: must be float32"),
        ({0: ValueError("")}, "raised", "worker 0: ValueError"),
        ({0: WRAPPED}, "raised", "worker 0: KeyError: 'width'"),
        ({0: ValueError("no such layer"), 1: BROKEN}, "raised", "worker 0: ValueError: no such layer"),
        ({0: Diverged("The numbers stopped.")}, "final", "The numbers stopped."),
        ({0: RuntimeError("a task failed\nunet.errors.InputError: train-0 is damaged")}, "final", "train-0 is damaged"),
    ],
)
def test_the_cause_is_told_and_not_its_consequences(failures, kind, words):
    fault = fault_of(WorkerGroupError("all of it", failures), {1: "h3"})
    assert fault.kind == kind and words in fault.reason


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("unet.errors.StorageFailed: the disk is full", Fault("the disk is full", "final")),
        ("Worker group startup timed out after 30 s", Fault("there was no room for the workers")),
        ("The actor died.\n\tclass_name: TrainController", Fault("the controller of Ray Train was lost")),
        (
            "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR. If the process was "
            "killed by the kernel OOM killer, see a page of advice.",
            Fault("a worker was killed or has crashed while it started"),
        ),
        ("of its own\nno such thing", Fault("RuntimeError: no such thing", "raised")),
        ("", Fault("RuntimeError", "raised")),
    ],
)
def test_what_ends_a_group_without_one_of_its_workers(text, fault):
    assert fault_of(RuntimeError(text), {}) == fault


def test_what_is_raised_where_a_node_is_lost_is_not_the_workers_error():
    raised = Fault("worker 0: OwnerDiedError: x", "raised")
    lost = ["node_1 (h2)"]
    assert with_nodes(raised, lost, 2) == Fault("worker 0: OwnerDiedError: x; 1 of 2 nodes lost: node_1 (h2)")
    assert with_nodes(raised, [], 2) == raised and with_nodes(Fault("disk", "final"), lost, 2) == Fault("disk", "final")


@given(st.integers(0, 8), st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=30))
def test_tries_are_bounded_where_nothing_is_won(most, checkpoints):
    """At most so many in a row without a new checkpoint; the first at once, the later ones after growing waits."""
    tries, row, before, last = Tries(most), 0, "none", 0.0
    for checkpoint in checkpoints:
        row = row + 1 if checkpoint == before else 1
        wait = tries.failed(Fault("lost"), checkpoint)
        if before == "none" and checkpoint is None:
            row = 1
        before = checkpoint
        if row > most:
            assert wait is None
            return
        assert (wait == 0) if row == 1 else (last <= wait <= LONGEST_WAIT)
        last = wait


def test_waits_grow_to_a_minute_and_a_new_checkpoint_begins_anew():
    tries = Tries(20)
    assert [tries.failed(Fault("lost"), None) for _ in range(8)] == [0, 2, 4, 8, 16, 32, 60, 60]
    assert [tries.failed(Fault("lost"), "step_00000010") for _ in range(2)] == [0, 2] and tries.failures == 2
    assert [Tries(1).failed(Fault("lost"), None), Tries(0).failed(Fault("lost"), None)] == [0, None]


def test_an_error_that_comes_again_is_not_tried_a_third_time():
    tries, same = Tries(5), Fault("worker 0: ValueError: x", "raised")
    assert tries.failed(same, "step_00000010") == 0
    assert tries.failed(same, "step_00000010") is None
    tries = Tries(5)
    assert tries.failed(same, "step_00000010") == 0 and tries.failed(same, "step_00000020") == 0
    assert Tries(5).failed(Fault("disk", "final"), None) is None


def test_a_run_that_finds_no_room_ends_in_a_sentence(ray_cluster, monkeypatch, tmp_path):
    """Others hold the CPUs for longer than a run waits; an elastic one is content with what is left after a moment."""
    monkeypatch.setattr(supervisor, "ROOM_SECONDS", 0.5)
    monkeypatch.setattr(supervisor, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(supervisor, "cluster_nodes", lambda: [Node(2, memory=16e9, object_store=6e9, free_cpus=0.8)])

    def find_room(num_workers) -> supervisor.Supervisor:
        run = Run("crowded", tiny_settings(tmp_path, tmp_path, num_workers=num_workers), Folder(tmp_path))
        prepared = SimpleNamespace(folder=Folder(tmp_path))
        recorder = SimpleNamespace(run=run, display=Display(quiet=True), prepared=prepared)
        plan = Plan(2, 0.75, 1, False, True, 0, 0)
        found = supervisor.Supervisor(recorder, {"train": 8, "val": 8}, plan, (), 1, None)
        found._find_room(threading.Event())
        return found

    failure = str(find_room(2).reports.failure)
    assert "no room for the workers" in failure and "2 workers need 0.75 free CPUs each" in failure
    assert "--resume crowded; --num-workers 1:2 continues" in failure
    elastic = find_room("1:2")
    assert elastic.reports.failure is None and elastic.plan.num_workers == 1


def stop_processes(folder, kind: str) -> None:
    """Stop all of a kind, as a frozen machine does, once the run has saved twice."""
    wait_for(lambda: len(list(folder.glob("checkpoints/step_*/COMMIT"))) >= 2)
    for process in ray_processes(kind):
        process.send_signal(signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RayTrainWorker", "TrainController", "ray::DriverLink"])
def test_processes_that_hang_are_replaced(kind, trained, storage, packed):
    """All workers are stopped, so that none can notice, or their controller, or the link between driver and workers;
    the run ends bit-equal to the unbroken one."""
    folder, summary = trained
    name = f"frozen-{kind.rpartition(':')[2]}"
    helper = threading.Thread(target=stop_processes, args=(storage / name, kind))
    helper.start()
    frozen = train(storage, packed, run_name=name, checkpoint_every="3", step_timeout="1m")
    helper.join()
    assert "no progress for 1 minutes" in frozen["restart_log"][0]["reason"]
    assert frozen["val"] == summary["val"] and frozen["best_checkpoint"] == summary["best_checkpoint"]
    last = sorted(p.name for p in (folder / "checkpoints").iterdir())[-1]
    before, after = weights_of(folder, last), weights_of(storage / name, last)
    assert all(np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_in_any_case(ray_cluster, storage, packed):
    """The workers are stopped, so that the checkpoint of the first one never comes."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | {"epochs": 1000, "checkpoint_every": 3}).items()]
    flags += ["--num-workers=2", "--threads=1", f"--data={packed}", f"--storage-path={storage}"]
    process = start_job(*flags, "--run-name=impatient", RAY_ADDRESS=ray_cluster.address_info["gcs_address"])
    folder = storage / "impatient"
    stop_processes(folder, "RayTrainWorker")
    os.killpg(process.pid, signal.SIGINT)
    wait_for(lambda: read_json(folder / "summary.json")["status"] == "stopped")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in output, output
    wait_for(lambda: not ray_processes("RayTrainWorker") and not ray_processes("TrainController"))
    done = train(storage, packed, run_name="impatient", epochs=read_last_epoch(folder) + 1)
    assert done["status"] == "finished"


def read_last_epoch(folder) -> int:
    return (folder / "metrics.jsonl").read_text().count("\n")
