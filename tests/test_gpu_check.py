"""`make gpu-check` runs to its end with and without a GPU, and finds what differs."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from gpu_check import within


def checked(*flags) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def test_without_a_gpu_it_says_so():
    found = checked()
    assert found.returncode == 2 and found.stderr.startswith("error: TensorFlow sees no GPU: install the `gpu` extra")
    (row,) = [line for line in found.stdout.splitlines() if "TensorFlow sees a GPU" in line]
    assert "none" in row and row.rstrip("| ").endswith("NO") and len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize("found,passed", [(0.0, True), (1e-4, True), (1.1e-4, False), (float("nan"), False)])
def test_what_is_out_of_bounds_fails(found, passed):
    assert within("gradients differ by", found, 1e-4).passed is passed


@pytest.mark.slow
def test_on_the_cpu_all_of_it_passes():
    found = checked("--device=cpu")
    rows = [line.split("|") for line in found.stdout.splitlines() if line.rstrip().endswith(("yes |", "NO |"))]
    assert found.returncode == 0 and all("yes" in row[4] for row in rows), found.stdout + found.stderr
    told = " ".join(row[1] for row in rows)
    for what in (
        "float32",
        "mixed",
        "images counts otherwise",
        "images/s",
        "worker is killed",
        "same bits",
        "two workers",
    ):
        assert what in told
