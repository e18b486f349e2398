"""`make gpu-check` runs to its end with and without a GPU, and finds what differs."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
from conftest import ROOT
from gpu_check import within


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    def here(output: Path, **task) -> Path:
        gpu_check.see(task | {"output": output})
        return output

    monkeypatch.setattr(gpu_check, "in_process", here)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    told = capsys.readouterr()
    (row,) = [line for line in told.out.splitlines() if "TensorFlow sees a GPU" in line]
    assert "none" in row and row.rstrip("| ").endswith("NO") and told.err.count("\n") == 1
    assert told.err.startswith("error: TensorFlow sees no GPU: install the `gpu` extra")


@pytest.mark.parametrize("found,passed", [(0.0, True), (1e-4, True), (1.1e-4, False), (float("nan"), False)])
def test_what_is_out_of_bounds_fails(found, passed):
    assert within("gradients differ by", found, 1e-4).passed is passed


@pytest.mark.slow
def test_on_the_cpu_all_of_it_passes():
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--device=cpu"]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
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
