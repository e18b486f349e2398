"""Which precision a run takes: what all of its machines compute fast, asked once and kept."""

import os
import subprocess

import pytest
from conftest import tiny_settings

from unet.cluster.precision import Machine, choose, settled, this_machine
from unet.errors import InputError
from unet.supervise.preflight import open_run
from unet.tuning.space import parse_space

ZEN5 = Machine(frozenset({"avx512f", "avx512_bf16"}))
SAPPHIRE_RAPIDS = Machine(frozenset({"avx512f", "avx512_bf16", "amx_bf16", "avx512_fp16"}))
SKYLAKE, OLDER, ARM = Machine(frozenset({"avx512f"})), Machine(), Machine()
T4, A10G, P100, BROKEN = (Machine(gpus=gpus) for gpus in ((7.5,), (8.6, 8.6), (6.0,), ()))


@pytest.mark.parametrize(
    ("machines", "use_gpu", "expected"),
    [
        ([ZEN5], False, "mixed_bfloat16"),
        ([ZEN5, SAPPHIRE_RAPIDS], False, "mixed_bfloat16"),
        ([SKYLAKE], False, "float32"),
        ([OLDER], False, "float32"),
        ([ZEN5, ARM], False, "float32"),
        ([Machine(ZEN5.instructions, limited_by="ONEDNN_MAX_CPU_ISA=AVX2")], False, "float32"),
        ([A10G], True, "mixed_bfloat16"),
        ([T4], True, "mixed_float16"),
        ([A10G, T4], True, "mixed_float16"),
        ([A10G, P100], True, "float32"),
        ([BROKEN], True, "float32"),
        ([Machine(ZEN5.instructions, P100.gpus)], True, "float32"),
        ([], False, "float32"),
    ],
)
def test_all_machines_must_compute_it_fast(machines, use_gpu, expected):
    choice = choose("auto", machines, use_gpu)
    assert choice.precision == expected and choice.warning is None
    for asked in ("float32", "mixed_bfloat16", "mixed_float16"):
        if asked != "float32" and any(machine.limited_by for machine in machines):
            continue
        told = choose(asked, machines, use_gpu)
        fast = all(machine.is_fast(asked, use_gpu) for machine in machines)
        assert told.precision == asked and (told.warning is None) == fast
    assert choose("float32", machines, use_gpu).warning is None


def test_what_is_slow_or_fails_is_said_with_the_remedy():
    assert (
        "without AVX512_BF16 and AMX on 1 of 2 machines): --precision float32"
        in choose("mixed_bfloat16", [ZEN5, SKYLAKE], False).warning
    )
    assert "nvidia-smi does not report" in choose("auto", [BROKEN], True).reason
    assert "compute capability 7.5" in choose("mixed_bfloat16", [T4], True).warning
    limited = Machine(ZEN5.instructions, limited_by="ONEDNN_MAX_CPU_ISA=AVX2")
    with pytest.raises(InputError, match=r"fails with ONEDNN_MAX_CPU_ISA=AVX2: unset"):
        choose("mixed_bfloat16", [limited], False)
    slow = Machine(ZEN5.instructions, limited_by="TF_ENABLE_ONEDNN_OPTS=0")  # runs, by Eigen's kernels
    assert "TF_ENABLE_ONEDNN_OPTS=0" in choose("mixed_bfloat16", [slow], False).warning


def test_a_machine_tells_what_it_has(monkeypatch, tmp_path):
    lscpu = subprocess.run(["lscpu"], capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"}).stdout.split()
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "TF_ENABLE_ONEDNN_OPTS"):
        monkeypatch.delenv(name, raising=False)
    has = bool({"avx512_bf16", "amx_bf16"} & set(lscpu))
    assert this_machine().is_fast("mixed_bfloat16", use_gpu=False) == has
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\n[ "$1" = --query-gpu=compute_cap ] && printf "8.0\\n7.5\\n"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert this_machine().gpus == (8.0, 7.5)
    for name, value, limit in (
        ("ONEDNN_MAX_CPU_ISA", "avx2", True),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", False),
        ("TF_ENABLE_ONEDNN_OPTS", "0", True),
        ("TF_ENABLE_ONEDNN_OPTS", "1", False),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            assert this_machine().limited_by == (f"{name}={value}" if limit else None)


def test_a_run_keeps_what_it_chose(ray_cluster, tmp_path):
    """Also where the machine that goes on would choose another, until somebody names one."""
    chosen, choice = settled(tiny_settings(tmp_path, "synthetic", run_name="kept", precision="auto"), use_gpu=False)
    fast = this_machine().is_fast("mixed_bfloat16", use_gpu=False)  # a task on the node says what this process sees
    assert chosen.training.precision == choice.precision == ("mixed_bfloat16" if fast else "float32")
    for here, other in (("float32", "mixed_float16"), ("mixed_bfloat16", "float32")):
        open_run(chosen.with_precision(here)).start()
        for asked, expected in (("auto", here), (other, other)):
            assert open_run(chosen.with_precision(asked)).settings.training.precision == expected


def test_trials_are_compared_in_one_precision(tmp_path):
    settings = tiny_settings(tmp_path, "synthetic", precision="auto")
    assert set(parse_space("precision: {choice: [float32, mixed_float16]}", "s", settings).draws) == {"precision"}
    with pytest.raises(InputError, match="draws precision auto"):
        parse_space("precision: {choice: [auto, float32]}", "s", settings)
