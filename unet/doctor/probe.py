"""What a process can say of its machine by itself, within a tenth of a second: nothing heavy is imported."""

import hashlib
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

import unet
from unet import versions
from unet.cluster.precision import instructions, this_machine
from unet.disk import _existing
from unet.doctor.facts import Machine
from unet.storage import Folder

PROCESSORS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 with bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "avx": "AVX",
}
"""The instruction sets, by Linux' names, by which oneDNN and Eigen choose their kernels; the best first."""
SHARED_MEMORY = "/dev/shm"
GROUPS = Path("/sys/fs/cgroup")


def examine(storage: Folder | None = None, in_cluster: bool = False) -> Machine:
    """This process and its machine; without a storage, which may not answer, nothing of that."""
    computes, (ray_folder, ray_disk) = this_machine(), _ray_disk(in_cluster)
    own = Path("/proc/self/cgroup")
    groups = own.read_text() if own.exists() else ""
    memory, system = memory_limit(GROUPS, groups), psutil.virtual_memory()
    total = min(system.total, memory or system.total)
    cpus = len(os.sched_getaffinity(0))
    return Machine(
        versions=versions.installed(),
        code=_code(),
        architecture=platform.machine(),
        instructions=known & frozenset(PROCESSORS) if (known := instructions()) else None,
        limited_by=computes.limited_by,
        cpus=min(cpus, cpu_limit(GROUPS, groups) or cpus),
        memory=total,
        free_memory=min(system.available, total),
        shared_memory=shutil.disk_usage(SHARED_MEMORY).total if os.path.isdir(SHARED_MEMORY) else None,
        ray_folder=ray_folder,
        ray_disk=ray_disk,
        storage_free=shutil.disk_usage(folder).free if storage and (folder := _existing(storage)) else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        token=os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
        gpus=computes.gpus,
    )


def memory_limit(groups: Path, own: str) -> int | None:
    """The bytes that a process may use by its control groups, whose tree is at `groups`; None: as many as there are.

    Args:
        own: the content of its `/proc/PID/cgroup`. There are two versions of control groups, in different files
            (https://docs.kernel.org/admin-guide/cgroup-v2.html, …/cgroup-v1/memory.html).
    """
    second = (folder / "memory.max" for folder in _folders(groups, own, ""))
    first = (folder / "memory.limit_in_bytes" for folder in _folders(groups / "memory", own, "memory"))
    limits = [int(words[0]) for file in (*second, *first) if (words := _words(file)) and words[0].isdigit()]
    return min((limit for limit in limits if limit < 2**60), default=None)  # the first version's for none is 2**63


def cpu_limit(groups: Path, own: str) -> float | None:
    """The same for CPUs (microseconds of computing in each period)."""
    first, second = _folders(groups / "cpu", own, "cpu"), _folders(groups, own, "")
    quotas = [_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us") for folder in first]
    quotas += [_words(folder / "cpu.max") for folder in second]
    return min((int(q[0]) / int(q[1]) for q in quotas if len(q) == 2 and q[0].isdigit()), default=None)


def _folders(root: Path, own: str, controller: str) -> Iterator[Path]:
    """The folders of a process's group and of those above it. In a container only the root may be there."""
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = root / path.strip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _code() -> str:
    """A digest of the project's modules: its version is the same for a checkout and what it was changed into."""
    package, digest = Path(unet.__file__).resolve().parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _ray_disk(in_cluster: bool) -> tuple[str, tuple[float, int] | None]:
    """Ray's folder, where its logs and spilled objects go, and how full its disk is."""
    if in_cluster:
        folder = sys.modules["ray"].get_runtime_context().get_temp_dir()
    else:
        folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return folder, None
    return folder, (1 - usage.free / usage.total, usage.free)
