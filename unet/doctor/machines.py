"""What the machines of a cluster are, each by itself and side by side: from facts to findings."""

from collections.abc import Callable, Iterable, Iterator

from packaging.specifiers import SpecifierSet

from unet.cluster.nodes import named
from unet.cluster.placement import RESERVED_CPUS
from unet.doctor.facts import Examination, Finding, Level, Machine, RayNode, Trouble
from unet.doctor.probe import PROCESSORS, SHARED_MEMORY
from unet.doctor.words import compared, counted, grouped
from unet.pages.numbers import gigabytes, percent
from unet.versions import PACKAGES

NO_AVX = "no AVX"
WORKER_MEMORY = 2e9
"""Bytes that one training process takes, with TensorFlow loaded."""
LEAST_SHARED_MEMORY = 1e9
"""For a Ray without a size of its own; Docker gives 64 MB."""
FULL_DISK = 0.95
"""From there on Ray writes nothing to the disk of its folder (`local_fs_capacity_threshold`)."""
STORAGE_ROOM = 1e9
"""Some checkpoints of the default recipe."""
OPEN_FILES = 8192
"""Ray asks for as many (`ray.init`); each worker and each node takes some of another's."""
BREAKING = {"ray", "tensorflow", "keras"}
"""Packages of which two versions in one run fail or compute something else."""


def nodes(found: Examination) -> Iterator[Finding]:
    if isinstance(found.cluster, Trouble):
        yield Finding("cluster", "failure", found.cluster.words)
        return
    if not found.cluster:
        text = "there is none: a job starts Ray on this machine. Not examined: Ray itself, other nodes, ports, clocks"
        yield Finding("cluster", "skipped", text, "RAY_ADDRESS=HEAD:6379 examines a cluster")
        return
    silent = {node.name: node.machine.words for node in found.nodes if isinstance(node.machine, Trouble)}
    for words, names in grouped(silent).items():
        if "No module named 'unet" in words or "No module named 'packaging" in words:
            remedy = "submit the job with --working-dir, or install the project with its requirements there"
            yield Finding("cluster", "failure", f"the project is not on {named(names)} ({words})", remedy)
        else:
            remedy = "see the logs in its Ray folder, mend its network, or stop Ray there"
            yield Finding("cluster", "failure", f"{named(names)}: {words}", remedy)
    for words, names in grouped(found.lost).items():
        remedy = "start Ray there again, unless it is gone for good"
        yield Finding("cluster", "warning", f"{named(names)}: lost ({words})", remedy)
    if leaving := [node.name for node in found.nodes if node.ray and node.ray.leaving]:
        yield Finding("cluster", "warning", f"{named(leaving)}: about to be shut down", "its workers will move")
    names = [node.name for node in found.nodes]
    yield Finding("cluster", "ok", f"{counted(len(names), 'node')} answered: {named(names)}")


def room(found: Examination) -> Iterator[Finding]:
    known = [node.ray for node in found.nodes if node.ray]
    if not known:
        return
    cpus, free, gpus = (sum(getattr(node, name) for node in known) for name in ("cpus", "free_cpus", "gpus"))
    has = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    if not cpus and found.grows:
        text = "no worker is there: nodes come when a job asks for them. Examined were only those that are there"
        yield Finding("room", "skipped", text, "examine again while a job runs")
        return
    if not cpus:
        yield Finding("room", "warning", "Ray counts no CPU on any node", "add a worker node: ray start --address=…")
    if cpus and free < min(1, cpus) - RESERVED_CPUS:
        text = f"the cluster is full: other jobs hold {cpus - free:g} of {cpus:g} CPUs"
        yield Finding("room", "warning", text, "wait for them, or add a node")
    yield Finding("room", "ok", f"{free:g} of {has} are free")


def versions(found: Examination) -> Iterator[Finding]:
    """Of what is installed: within what the project takes, and the same everywhere."""
    places = {name: machine for name, machine in _machines(found)} | {"this process": found.driver}
    for package in ("python", *PACKAGES):
        has = {name: machine.versions[package] for name, machine in places.items() if package in machine.versions}
        if lacking := [name for name in places if name not in has]:
            yield Finding("versions", "failure", f"no {package} on {named(lacking)}", INSTALL)
        takes = found.requirements.get(package, "")
        for version, names in grouped(has).items():
            if not SpecifierSet(takes).contains(version, prereleases=True):
                text = f"{package} {version} on {named(names)}, and the project takes {takes}"
                yield Finding("versions", "failure", text, INSTALL)
        if len(set(has.values())) > 1:
            near = {version.rpartition(".")[0] for version in has.values()}
            level: Level = "failure" if package in BREAKING or len(near) > 1 else "warning"
            yield Finding("versions", level, f"{package} {compared(has)}", INSTALL)
    code = {name: machine.code for name, machine in places.items() if machine.code}
    if len(set(code.values())) > 1:
        apart = " | ".join(named(names) for names in grouped(code).values())
        remedy = "submit the job with --working-dir, which brings one copy everywhere, or install the same everywhere"
        yield Finding("versions", "failure", f"the project's own files differ: {apart}", remedy)
    if not found.requirements:
        yield Finding("versions", "warning", "which versions the project takes is not known here", INSTALL)
    text = ", ".join(f"{package} {version}" for package, version in found.driver.versions.items())
    where = f" on {counted(len(found.answered), 'node')}" if found.cluster is True else ""
    yield Finding("versions", "ok", text + where)


INSTALL = "install requirements.txt there (make setup), or use one container image"


def processors(found: Examination) -> Iterator[Finding]:
    kinds = {name: kind(machine) for name, machine in _machines(found, working=True)}
    if old := [name for name, words in kinds.items() if words.startswith(NO_AVX)]:
        text = f"{NO_AVX} on {named(old)}: TensorFlow's wheels do not run there"
        yield Finding("processors", "failure", text, "take newer machines")
    if len(set(kinds.values())) > 1:
        text = f"kinds differ: {compared(kinds)}. A run that moves computes other bits, and the slowest sets its pace"
        yield Finding("processors", "warning", text, "keep workers on one kind, where bits have to repeat")
    if kinds:
        yield Finding("processors", "ok", f"{next(iter(kinds.values()))} on {named(kinds)}")


def kind(machine: Machine) -> str:
    """What decides which bits a processor computes, in words."""
    known = machine.instructions
    level = machine.architecture
    if known is not None:
        level = next((words for name, words in PROCESSORS.items() if name in known), NO_AVX)
    return f"{level} ({machine.limited_by})" if machine.limited_by else level


def cpus(found: Examination) -> Iterator[Finding]:
    """That Ray counts what the system gives it."""
    wrong = {
        node.name: f"{node.ray.cpus:g} for {machine.cpus:g}"
        for node, machine in found.answered
        if node.ray and machine.cpus and node.ray.cpus > machine.cpus + 0.5
    }
    if wrong:
        text = f"Ray counts more CPUs than it may use: {compared(wrong)}. Workers would wait for each other"
        yield Finding("cpus", "warning", text, "start Ray there with --num-cpus")


def memory(found: Examination) -> Iterator[Finding]:
    """That Ray counts what there is, and that there is enough for a worker."""
    wrong, little = {}, {}
    for node, machine in found.answered:
        if machine.memory is None or machine.free_memory is None:
            continue
        of_ray = node.ray.memory + node.ray.object_store if node.ray else 0
        if of_ray > 1.05 * machine.memory:
            wrong[node.name] = f"{gigabytes(of_ray)} for {gigabytes(machine.memory)}"
        if machine.free_memory < WORKER_MEMORY and _works(node.ray):
            little[node.name] = f"{gigabytes(machine.free_memory)}"
    if wrong:
        text = f"Ray counts more than it may use: {compared(wrong)}. Its processes would be killed"
        yield Finding("memory", "warning", text, "start Ray there with --memory and --object-store-memory")
    if little:
        text = f"too little is free for a worker, which takes about {gigabytes(WORKER_MEMORY)}: {compared(little)}"
        yield Finding("memory", "warning", text, "end what else runs there, or take a larger machine")
    yield from _least("memory", [machine.free_memory for _, machine in found.answered], "free")


def shared_memory(found: Examination) -> Iterator[Finding]:
    small = {}
    for node, machine in found.answered:
        needed = node.ray.object_store if node.ray else LEAST_SHARED_MEMORY
        if machine.shared_memory is not None and machine.shared_memory < needed:
            small[node.name] = f"{gigabytes(machine.shared_memory)} for {gigabytes(needed)}"
    if small:
        text = f"{SHARED_MEMORY} is too small for Ray's objects, which then go to a disk: {compared(small)}"
        yield Finding("shared memory", "warning", text, "--shm-size of docker run, or a larger emptyDir (Memory)")
    yield from _least("shared memory", [machine.shared_memory for _, machine in found.answered], f"at {SHARED_MEMORY}")


def disks(found: Examination) -> Iterator[Finding]:
    full, small = {}, {}
    for node, machine in found.answered:
        if machine.ray_disk and machine.ray_disk[0] > FULL_DISK:
            full[node.name] = f"{percent(machine.ray_disk[0])} of {machine.ray_folder}"
        if machine.storage_free is not None and machine.storage_free < STORAGE_ROOM:
            small[node.name] = f"{gigabytes(machine.storage_free)}"
    if full:
        text = f"the disk of Ray's folder is so full that Ray writes no more: {compared(full)}"
        yield Finding("disk", "failure", text, "make room, or start Ray with --temp-dir elsewhere")
    if small:
        text = f"little is free at {found.storage}: {compared(small)}"
        yield Finding("disk", "warning", text, "make room for checkpoints, or give another --storage-path")
    rooms = [machine.ray_disk[1] for _, machine in found.answered if machine.ray_disk]
    yield from _least("disk", rooms, "free for Ray's folder")


def open_files(found: Examination) -> Iterator[Finding]:
    limits = {}
    for node, machine in found.answered:
        if machine.open_files:
            limits[node.name] = machine.open_files[0 if node.ray else 1]  # a Ray that starts here raises it
    if few := {name: limit for name, limit in limits.items() if 0 <= limit < OPEN_FILES}:
        remedy = "ulimit -n 65536 before ray start (LimitNOFILE= of a service, --ulimit of docker run)"
        yield Finding("open files", "warning", f"processes may open only {compared(few)}", remedy)
    if known := [limit for limit in limits.values() if limit >= 0]:  # below 0 there is none
        yield Finding("open files", "ok", f"up to {min(known):,} at a time")


def gpus(found: Examination) -> Iterator[Finding]:
    hidden, idle, seen = {}, {}, 0
    for node, machine in found.answered:
        of_ray, visible = int(node.ray.gpus) if node.ray else 0, node.visible_gpus
        if isinstance(visible, Trouble):
            hidden[node.name] = f"none of {of_ray} ({visible.words})"
        elif visible is not None and visible < of_ray:
            hidden[node.name] = f"{visible} of {of_ray}"
        elif node.ray and machine.gpus and not of_ray:
            idle[node.name] = f"{len(machine.gpus)}"
        seen += visible if isinstance(visible, int) else len(machine.gpus)
    if hidden:
        text = f"TensorFlow sees fewer than Ray counts: {compared(hidden)}"
        remedy = "install the gpu extra with its dependencies there, and NVIDIA's driver: make gpu-check"
        yield Finding("gpus", "failure", text, remedy)
    if idle:
        text = f"there are some of which Ray knows nothing: {compared(idle)}"
        yield Finding("gpus", "warning", text, "start Ray there with --num-gpus")
    yield Finding("gpus", "ok", counted(seen, "GPU") if seen else "there are none")


def token(found: Examination) -> Iterator[Finding]:
    """Whether whoever reaches the cluster can run code on it."""
    asks = {n.name: m.token for n, m in found.answered if n.ray and not n.ray.address.startswith("127.")}
    if open_to_all := [name for name, does in asks.items() if does is False]:
        text = f"Ray asks for no token on {named(open_to_all)}: whoever reaches its ports can run code there"
        remedy = "export RAY_AUTH_MODE=token where Ray is started, and for clients: docs/security.md"
        yield Finding("token", "warning", text, remedy)
    if any(asks.values()):
        yield Finding("token", "ok", "Ray asks for one on every node")


def _machines(found: Examination, working: bool = False) -> list[tuple[str, Machine]]:
    """By name; `working`: those that may hold a worker."""
    return [(node.name, machine) for node, machine in found.answered if not working or _works(node.ray)]


def _works(ray: RayNode | None) -> bool:
    return ray is None or ray.cpus > 0


def _least(check: str, sizes: Iterable[int | None], words: str) -> Iterator[Finding]:
    """A finding that all is well, with the least of the sizes that are known."""
    if known := [size for size in sizes if size is not None]:
        at_least = "at least " if len(known) > 1 else ""
        yield Finding(check, "ok", f"{at_least}{gigabytes(min(known))} {words}")


Check = Callable[[Examination], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    *(nodes, room, versions, processors, cpus, memory, shared_memory, disks, open_files, gpus, token),
)
