"""The precision of a run's steps: one that every machine that may hold one of its workers computes fast.

bfloat16 is several times faster than float32 where oneDNN has instructions for it, and several times slower where it
does not, so the default (`--precision auto`) checks first. Tensor cores compute float16 from compute capability 7.0 on
and bfloat16 from 8.0 on (NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities").

Why: docs/decisions.md#precision-follows-the-machines
"""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from unet.cluster.nodes import live_nodes
from unet.config import TrainSettings
from unet.errors import InputError
from unet.recipe.recipe import AUTO

FLOAT32, BFLOAT16, FLOAT16 = "float32", "mixed_bfloat16", "mixed_float16"
INSTRUCTIONS = {BFLOAT16: {"avx512_bf16", "amx_bf16"}, FLOAT16: {"avx512_fp16", "amx_fp16"}}
"""Of x86 processors, by Linux' names; with any of a set the precision is fast."""
KERNELS_BY = INSTRUCTIONS | {BFLOAT16: {"avx512f"}}
"""With any of these TensorFlow takes oneDNN's kernels, fast or not (`tensorflow/core/graph/mkl_graph_util.h`)."""
ASKED = frozenset().union(*INSTRUCTIONS.values(), *KERNELS_BY.values())
"""The instruction sets that decide about a precision."""
NEEDED_NAMES = {BFLOAT16: "AVX512_BF16 and AMX", FLOAT16: "AVX512_FP16 and AMX"}
CAPABILITY = {BFLOAT16: 8.0, FLOAT16: 7.0}
"""Of GPUs: the lowest with which the precision is fast."""
BELOW_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of ONEDNN_MAX_CPU_ISA that leave oneDNN without 16-bit floats."""
SWITCH = "TF_ENABLE_ONEDNN_OPTS"
ANSWER_SECONDS = 30
"""How long a machine may take to report what it has."""


Settings = TypeVar("Settings", bound=TrainSettings)


@dataclass(frozen=True)
class Machine:
    """What TensorFlow can compute with on one machine.

    Attributes:
        instructions: instruction sets of its processor that oneDNN may use, by Linux' names.
        gpus: the compute capability of each.
        limited_by: the environment variable, with its value, that keeps oneDNN from 16-bit floats.
    """

    instructions: frozenset[str] = frozenset()
    gpus: tuple[float, ...] = ()
    limited_by: str | None = None

    def is_fast(self, precision: str, use_gpu: bool) -> bool:
        """Whether a step in this precision is faster here than one in float32 (float32 itself: True)."""
        if precision == FLOAT32:
            return True
        if use_gpu:
            return bool(self.gpus) and min(self.gpus) >= CAPABILITY[precision]
        return self.limited_by is None and bool(self.instructions & INSTRUCTIONS[precision])

    def fails(self, precision: str, use_gpu: bool) -> bool:
        """Whether TensorFlow would choose kernels that the limit then forbids: its steps would raise, not be slow."""
        if precision == FLOAT32 or use_gpu or self.limited_by is None or self.limited_by.startswith(SWITCH):
            return False
        return bool(self.instructions & KERNELS_BY[precision])


@dataclass(frozen=True)
class Choice:
    """A precision and why it was chosen; `warning` if one that was asked for is slow."""

    precision: str
    reason: str
    warning: str | None = None


def choose(asked: str, machines: Sequence[Machine], use_gpu: bool) -> Choice:
    """The precision for all workers, which may run on any of the machines.

    Raises:
        InputError: the one that is asked for cannot run.
    """
    if asked == AUTO:
        # On a processor float16 would need a loss scale, and gains nothing over bfloat16.
        candidates = (BFLOAT16, FLOAT16) if use_gpu else (BFLOAT16,)
        for precision in candidates:
            if machines and all(machine.is_fast(precision, use_gpu) for machine in machines):
                return Choice(
                    precision, "every GPU computes it" if use_gpu else "every processor has instructions for it"
                )
        return Choice(FLOAT32, _lack(candidates[-1], machines, use_gpu))
    if any(machine.fails(asked, use_gpu) for machine in machines):
        limit = next(machine.limited_by for machine in machines if machine.fails(asked, use_gpu))
        raise InputError(f"--precision {asked} fails with {limit}: unset that, or give --precision float32.")
    if all(machine.is_fast(asked, use_gpu) for machine in machines):
        return Choice(asked, "as asked")
    lack = _lack(asked, machines, use_gpu)
    return Choice(asked, "as asked", f"{asked} is slow here ({lack}): --precision float32 is faster.")


def _lack(precision: str, machines: Sequence[Machine], use_gpu: bool) -> str:
    """Why a precision is not fast everywhere."""
    slow = [machine for machine in machines if not machine.is_fast(precision, use_gpu)]
    if not slow:
        return "no machine reported what it has"
    where = "" if len(machines) == 1 else f" on {len(slow)} of {len(machines)} machines"
    if use_gpu and not all(machine.gpus for machine in slow):
        return f"a GPU whose compute capability nvidia-smi does not report{where}"
    if use_gpu:
        return f"a GPU of compute capability {min(gpu for machine in slow for gpu in machine.gpus):g}{where}"
    if slow[0].limited_by:
        return f"{slow[0].limited_by}{where}"
    return f"a processor without {NEEDED_NAMES[precision]}{where}"


def settled(settings: Settings, use_gpu: bool) -> tuple[Settings, Choice]:
    """The settings with the precision of all workers on the connected cluster, and why.

    Raises:
        InputError: the one that was asked for cannot run there.
    """
    choice = choose(settings.training.precision, machines(use_gpu), use_gpu)
    return settings.with_precision(choice.precision), choice


def machines(use_gpu: bool) -> list[Machine]:
    """What each node that may hold a worker has; one that does not answer counts as having nothing."""
    needed = "GPU" if use_gpu else "CPU"
    return _ask([name for name, node in live_nodes().items() if node["Resources"].get(needed)])


def _ask(node_ids: Sequence[str]) -> list[Machine]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(this_machine)
    asked = [ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)) for node in node_ids]
    answers = [task.remote() for task in asked]
    done, _ = ray.wait(answers, num_returns=len(answers), timeout=ANSWER_SECONDS) if answers else ([], [])
    return [_answer(answer) if answer in done else Machine() for answer in answers]


def _answer(answer) -> Machine:
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayError:
        return Machine()


def this_machine() -> Machine:
    """What this machine has, as far as its system reports it."""
    return Machine(instructions() & ASKED, _gpus(), _limit(os.environ))


def _limit(environment: Mapping[str, str]) -> str | None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if environment.get(name, "").upper() in BELOW_BFLOAT16:
            return f"{name}={environment[name]}"
    if environment.get(SWITCH, "1").strip().lower() in ("0", "false"):
        return f"{SWITCH}={environment[SWITCH]}"
    return None


def instructions() -> frozenset[str]:
    """Every instruction set of this x86 processor, by Linux' names; none on others."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return frozenset(flags)


def _gpus() -> tuple[float, ...]:
    """Compute capabilities from NVIDIA's own tool, which comes with the driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS / 2, check=True).stdout
        return tuple(float(line) for line in said.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
