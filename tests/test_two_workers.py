"""One worker and two do the same: gradients, fifty steps, clipping, and numbers that are not finite."""

import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_run import wait_for

REAL_SIZE = {"image_size": 128, "base_filters": 16, "batch_size": 8}
SMALL = {"image_size": 32, "base_filters": 4, "depth": 2, "batch_size": 8, "learning_rate": 0.01}


class Peers:
    """Processes of one thread each, joined as workers, that make any number of trainings one after the other."""

    def __init__(self, world, devices=1, deterministic=False):
        sockets = [socket.socket() for _ in range(world)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        script, env = ROOT / "tests" / "peers.py", os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
        told = [[json.dumps(value) for value in (rank, ports, devices, deterministic)] for rank in range(world)]
        self.processes = [
            subprocess.Popen([sys.executable, script, *own], stdin=subprocess.PIPE, text=True, env=env) for own in told
        ]

    def begin(self, folder, values, steps, poison=-1):
        """Begin a training; what waits for it, and gives the results of every rank."""
        world = len(self.processes)
        outputs = [folder / f"world{world}-rank{rank}.npz" for rank in range(world)]
        for process, output in zip(self.processes, outputs, strict=True):
            told = {"output": str(output), "values": values, "steps": steps, "poison": poison}
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()

        def results():
            wait_for(lambda: all(map(Path.exists, outputs)) or any(p.poll() is not None for p in self.processes), 500)
            return [dict(np.load(output)) for output in outputs]

        return results

    def close(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def peers():
    """One alone and two, which start when a test first asks for so many."""
    made = {}

    def of(world):
        if world not in made:
            made[world] = Peers(world)
        return made[world]

    yield of
    for found in made.values():
        found.close()


def one_and_two(one, two, *training):
    """The results of one peer and of both ranks of two, which train at the same time."""
    waiting = [peers.begin(*training) for peers in (one, two)]
    (alone,), both = (results() for results in waiting)
    return alone, both


def part(result, prefix):
    return [v for k, v in sorted(result.items()) if k.startswith(prefix)]


@pytest.mark.slow
def test_fifty_steps_with_grad_shards_agree_at_real_size(peers, tmp_path):
    """Dropout on, real size; the two halves of a batch are summed alike by one worker and by two."""
    values = REAL_SIZE | {"grad_shards": 2}
    one, two = one_and_two(peers(1), peers(2), tmp_path, values, 50)
    for rank in two:
        np.testing.assert_allclose(one["losses"], rank["losses"], rtol=1e-6)
        for a, b in zip(part(one, "weight/"), part(rank, "weight/"), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert one["losses"][-1] < 0.95 * one["losses"][0]  # it did learn, so equality says something


def test_first_gradients_agree_without_grad_shards(tmp_path):
    """Also where workers see more devices than they were given (each is one replica), and with op determinism."""
    values = REAL_SIZE | {"image_size": 64}
    with closing(Peers(1, deterministic=True)) as alone, closing(Peers(2, devices=2)) as both:
        one, two = one_and_two(alone, both, tmp_path, values, 0)
    for a, b in zip(part(one, "gradient/"), part(two[0], "gradient/"), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * max(np.abs(a).max(), 1e-3)
    assert max(np.abs(g).max() for g in part(one, "gradient/")) > 1e-3
    assert [r["counted"].tolist() for r in two] == [[2**54 + 2, 1]] * 2  # counts are summed as integers


def test_terms_of_global_sums_moving_averages_and_augmentation_agree(peers, tmp_path):
    """One worker makes the sums by a pass of their own, two in the pass that gives the gradient."""
    values = SMALL | {"toys": True, "grad_shards": 2, "class_weights": "1,0.5,3", "label_smoothing": 0.1}
    values |= {"loss": "cross_entropy+0.5*jaccard+0.5*lovasz", "augment": 1.0, "mix": 0.5}
    one, two = one_and_two(peers(1), peers(2), tmp_path, values, 5)
    for rank in two:
        np.testing.assert_allclose(one["losses"], rank["losses"], rtol=1e-6)
        for a, b in zip(part(one, "weight/"), part(rank, "weight/"), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.parametrize(
    "optimizer", ["muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "sgd"))]
)
def test_the_optimizers_and_the_average_agree(peers, tmp_path, optimizer):
    values = SMALL | {
        "optimizer": optimizer,
        "weight_decay": 0.1,
        "ema_decay": 0.9,
        "base_filters": 8,
        "grad_shards": 2,
        "freeze": "encoder:1",  # the first two steps here
        "encoder_rate": 0.5,
    }
    one, two = one_and_two(peers(1), peers(2), tmp_path, values, 5)
    assert part(one, "weight/average/") and len(part(one, "weight/optimizer/")) > 2
    for rank in two:
        for a, b in zip(part(one, "weight/"), part(rank, "weight/"), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.slow
def test_clipping_acts_on_the_summed_gradient(peers, tmp_path):
    values = SMALL | {"clip_norm": 1e-3, "grad_shards": 2}
    one, two = one_and_two(peers(1), peers(2), tmp_path, values, 5)
    assert (one["norms"] > 10 * values["clip_norm"]).all()  # the norm is told before clipping, and clipping bites
    np.testing.assert_allclose(one["norms"], two[0]["norms"], rtol=1e-5)
    for a, b in zip(part(one, "weight/"), part(two[1], "weight/"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_a_nan_of_one_worker_is_seen_by_both_and_updates_nothing(peers, tmp_path, precision):
    first, second = peers(2).begin(tmp_path, SMALL | {"precision": precision}, 4, poison=2)()
    assert first["finite"].tolist() == second["finite"].tolist() == [True, True, False, True]
    assert second["unchanged"]
    for a, b in zip(part(first, "weight/"), part(second, "weight/"), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()
