"""A training started as a user starts it, watched and hurt from outside: for benchmarks and tests.

`ledger/sitecustomize.py` has the workers write down what enters their steps, and every process say that it belongs
to this training, so that nobody else's are ever killed.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
TITLES = {"worker": "RayTrainWorker", "controller": "TrainController"}
"""What the title of such a process holds."""
POLL_SECONDS = 0.03
HANG_SECONDS = 300
"""So long without any sign of life, a training is taken for one that hangs."""


@dataclass(frozen=True)
class Kill:
    """A process that was killed.

    Attributes:
        kind: "worker", "controller" or "driver".
        time: seconds since 1970.
        rank: of a worker that had begun a step, else None.
        start: the start whose workers were alive and had applied a step, else None.
        step: the last step that any worker of it had applied, else None.
        files: what lay in the folder of checkpoints at that time.
    """

    kind: str
    time: float
    rank: int | None
    start: str | None
    step: int | None
    files: frozenset[str]


@dataclass
class Watched:
    """A training by `jobs/train.py`.

    Attributes:
        flags: of the job, without name and storage path.
        storage, name: where the run lies.
        folder: for its ledger and its output.
        address: of a Ray cluster, or "local": its own.
        lines: of the ledger so far, in the order of their reading (see `ledger/sitecustomize.py`).
        step: the highest that was applied.
        committed: when each checkpoint was first seen, by its step.
        kills: so far.
    """

    flags: list[str]
    storage: Path
    name: str
    folder: Path
    address: str = "local"
    lines: list[dict] = field(default_factory=list)
    step: int = 0
    committed: dict[int, float] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.driver: subprocess.Popen | None = None
        self._read: dict[Path, int] = {}
        self._news = time.monotonic()

    @property
    def run(self) -> Path:
        return self.storage / self.name

    def start(self, *more: str, resume: bool = False) -> None:
        """Start the job, in a process group of its own; its output is appended to `output.txt`."""
        own = f"--resume={self.name}" if resume else f"--run-name={self.name}"
        command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--recipe=reference", *self.flags, *more]
        command += [f"--storage-path={self.storage}", own]
        environment = {"PYTHONPATH": f"{ROOT / 'benchmarks' / 'ledger'}:{ROOT}", "UNET_LEDGER": str(self.folder)}
        if self.address != "local":
            # The cluster's processes do not inherit from this one; this is how Ray hands such things to a job's.
            job = {"runtime_env": {"env_vars": environment}}
            environment = environment | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}
        environment |= {"RAY_ADDRESS": self.address, "TF_CPP_MIN_LOG_LEVEL": "3"}
        with open(self.folder / "output.txt", "ab") as output:
            self.driver = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True
            )
        self._news = time.monotonic()

    @property
    def output(self) -> str:
        path = self.folder / "output.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def poll(self) -> None:
        """Take in what is new in the ledger and the folder of checkpoints."""
        found = len(self.lines)
        for path in sorted(self.folder.glob("*.jsonl")):
            with open(path, "rb") as stream:
                stream.seek(self._read.get(path, 0))
                # A line without its end is being written, or was torn by a kill: then its step is in no checkpoint.
                whole = stream.read().rpartition(b"\n")[0]
            if whole:
                lines = [json.loads(line) for line in whole.splitlines()]
                self.lines += lines
                self.step = max([self.step, *(line["step"] for line in lines if "loss" in line)])
                self._read[path] = self._read.get(path, 0) + len(whole) + 1
        for name in self._files():
            step = re.fullmatch(r"step_(\d+)", name)
            if step and int(step[1]) not in self.committed and (self.checkpoints / name / "COMMIT").exists():
                self.committed[int(step[1])] = time.time()
        if len(self.lines) > found:
            self._news = time.monotonic()

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def _files(self) -> frozenset[str]:
        return frozenset(os.listdir(self.checkpoints)) if self.checkpoints.exists() else frozenset()

    @property
    def applied(self) -> list[dict]:
        """The lines of applied steps so far."""
        return [line for line in self.lines if "loss" in line]

    @property
    def ended(self) -> bool:
        return self.driver.poll() is not None

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Watch until the condition holds or the job ends; whether it holds.

        Raises:
            RuntimeError: nothing happened for a long time.
        """
        while True:
            ended = self.ended  # asked first, so that its last lines are taken in
            self.poll()
            if condition():
                return True
            if ended:
                return False
            if time.monotonic() - self._news > HANG_SECONDS:
                raise RuntimeError(f"The training hangs; its output ends:\n{self.output[-3000:]}")
            time.sleep(POLL_SECONDS)

    def wait_until(self, moment: float) -> None:
        """Watch until that time (in seconds since 1970); to the job's end at the latest."""
        self.wait(lambda: time.time() >= moment)

    def wait_until_end(self) -> None:
        self.wait(lambda: False)

    def wait_for_step(self, step: int) -> bool:
        """Watch until so many steps are done; False if the job ends before."""
        return self.wait(lambda: self.step >= step)

    def wait_for_start(self, but: set[str]) -> dict | None:
        """The first line of an applied step of another start than these; None if the job ends before."""
        seen = 0

        def is_there() -> bool:
            nonlocal seen, found
            new, seen = self.lines[seen:], len(self.lines)
            found = next((line for line in new if "loss" in line and line["start"] not in but), None)
            return found is not None

        found = None
        self.wait(is_there)
        return found

    def processes(self, kind: str | None = None) -> list[psutil.Process]:
        """Those of this training (and of a Ray of its own) that live: all, or the workers or controllers."""
        found = []
        for path in (self.folder / "processes").glob("*"):
            try:
                process = psutil.Process(int(path.name))
                # The number may be another's by now.
                is_ours = process.create_time() <= path.stat().st_mtime + 1
                if is_ours and process.status() != psutil.STATUS_ZOMBIE and kind in (None, _kind(process)):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self, kind: str, rank: int | None = None) -> Kill | None:
        """Kill the driver, the controller or a worker (of that rank, where it has begun a step) as soon as there is
        one; None if the job ends before."""
        found = []

        def is_there() -> bool:
            found[:] = [] if kind == "driver" else self._of_this_start(kind)
            return kind == "driver" or bool(found)

        if not self.wait(is_there):
            return None
        workers = {process.pid for process in self._of_this_start("worker")}
        alive = [line for line in self.lines if line["pid"] in workers]
        ranks = {line["pid"]: line["rank"] for line in alive}
        victim = self.driver if kind == "driver" else found[0]
        if rank is not None:
            victim = next((process for process in found if ranks.get(process.pid) == rank), victim)
        start = next((line["start"] for line in reversed(alive) if "loss" in line), None)
        files, now = self._files(), time.time()
        victim.kill()
        if kind == "driver":
            self.driver.wait()
        self.poll()
        steps = [line["step"] for line in self.applied if line["start"] == start and line["time"] <= now]
        self.kills.append(Kill(kind, now, ranks.get(victim.pid), start, max(steps, default=None), files))
        return self.kills[-1]

    def _of_this_start(self, kind: str) -> list[psutil.Process]:
        """Those that the driver has that runs now: workers whose whole Ray was killed with theirs may live on for a
        minute, and write nothing. On a cluster that is there processes are older than a driver."""
        began = psutil.Process(self.driver.pid).create_time() if self.address == "local" and not self.ended else 0
        return [process for process in self.processes(kind) if process.create_time() >= began]

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.killpg(self.driver.pid, signal.SIGINT)

    def end(self) -> None:
        """Kill what is left of it; on a shared cluster not the actors that Ray keeps for all jobs."""
        if self.driver is not None and not self.ended:
            self.driver.kill()
            self.driver.wait()
        for process in self.processes():
            if self.address == "local" or _kind(process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def _kind(process: psutil.Process) -> str | None:
    title = " ".join(process.cmdline())
    return next((kind for kind, text in TITLES.items() if text in title), None)
