"""What an examination finds out: plain values, of which `unet.doctor.checks` makes sentences."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "skipped", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was found, and what to do about it."""

    check: str
    level: Level
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Trouble:
    """In the place of an answer: why there is none, in words."""

    words: str


@dataclass(frozen=True)
class Machine:
    """What one process says of itself and its machine; None is not known. Sizes in bytes.

    Attributes:
        versions: of Python and of packages, by name; what is not installed is not there.
        code: digest of the project's modules.
        architecture: as `uname -m` gives it.
        instructions: those of `unet.doctor.probe.PROCESSORS` that its processor has; None on others than x86.
        limited_by: the environment variable, with its value, that keeps oneDNN from some of them.
        cpus: how many this process may use, by affinity and control group.
        memory: of the machine, or of the control group if that allows less.
        ray_disk: share used and bytes free where Ray's folder is.
        storage_free: where a local storage path is.
        open_files: the limit of this process, and up to where it may raise that.
        token: whether Ray asks for a token here.
        gpus: the compute capability of each, as NVIDIA's driver reports it.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None
    architecture: str = "x86_64"
    instructions: frozenset[str] | None = None
    limited_by: str | None = None
    cpus: float | None = None
    memory: int | None = None
    free_memory: int | None = None
    shared_memory: int | None = None
    ray_folder: str = ""
    ray_disk: tuple[float, int] | None = None
    storage_free: int | None = None
    open_files: tuple[int, int] | None = None
    token: bool | None = None
    gpus: tuple[float, ...] = ()


@dataclass(frozen=True)
class RayNode:
    """What Ray says of a node. Sizes in bytes; `answers`: whether it accepts connections."""

    id: str = ""
    address: str = "127.0.0.1"
    answers: bool = True
    cpus: float = 0
    gpus: float = 0
    memory: float = 0
    object_store: float = 0
    free_cpus: float = 0
    leaving: bool = False


@dataclass(frozen=True)
class Link:
    """A connection to another node: seconds until it answered, and by how many its clock is ahead of ours."""

    seconds: float
    ahead: float


@dataclass(frozen=True)
class Node:
    """A node, or the machine of a doctor without a cluster; None is what was not asked.

    Attributes:
        written: by how many seconds its clock leads the storage's, seen when it wrote a file to the storage path.
        seen: which nodes' files it finds there, by name.
        removed: whether it could remove its own.
        lease: whether it was kept out of a folder that the driver held.
        tracking: whether MLflow answers there.
        data: a digest of what `--data` names there.
        visible_gpus: those that TensorFlow sees.
        links: to the other nodes, by name.
    """

    name: str
    ray: RayNode | None = None
    machine: Machine | Trouble = Trouble("it accepts no connections")
    written: float | Trouble | None = None
    seen: frozenset[str] | Trouble | None = None
    removed: bool | Trouble | None = None
    lease: bool | Trouble | None = None
    tracking: bool | Trouble | None = None
    data: str | Trouble | None = None
    visible_gpus: int | Trouble | None = None
    links: Mapping[str, Link | Trouble] | Trouble | None = None


@dataclass(frozen=True)
class Examination:
    """All that was found.

    Attributes:
        driver: of the process of this job, which is none of a node's.
        cluster: whether there is one: True, False, or why it cannot be used.
        grows: whether an autoscaler brings nodes as jobs ask for them.
        lost: nodes that ended without having been told to, and why.
        requirements: versions that the project takes, by package, as `>=2.21,<2.22`.
        storage, tracking, data: where they are, as they may be shown; None is what was not given.
        is_local: whether the storage path is on a disk.
        lease: whether the driver could take one: True, or why not.
        logged_in: whether an MLflow server takes the driver for a user.
        seconds: how long it took.
    """

    nodes: tuple[Node, ...]
    driver: Machine = Machine()
    cluster: bool | Trouble = True
    grows: bool = False
    lost: Mapping[str, str] = field(default_factory=dict)
    requirements: Mapping[str, str] = field(default_factory=dict)
    storage: str = "/storage"
    is_local: bool = True
    tracking: str | None = None
    data: str | None = None
    lease: bool | Trouble = True
    logged_in: bool | Trouble | None = None
    seconds: float = 0

    @property
    def answered(self) -> tuple[tuple[Node, Machine], ...]:
        """The nodes that said what they are."""
        return tuple((node, node.machine) for node in self.nodes if isinstance(node.machine, Machine))
