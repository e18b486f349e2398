"""What ended a group of workers, as a sentence, and whether starting them again can help."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from unet.cluster.nodes import named
from unet.errors import first_line, own_words

FIRST_WAIT, LONGEST_WAIT = 2.0, 60.0
OF_PEERS = ("UnavailableError", "AbortedError", "CancelledError", "InternalError", "DeadlineExceededError")
"""What TensorFlow raises in a worker whose peer is gone."""


@dataclass(frozen=True)
class Fault:
    """Why a group ended.

    Attributes:
        reason: a sentence without its full stop.
        kind: "lost" is a process, node or connection that is gone, or hangs; "raised" an error of a worker, which
            may come again; "final" one that says itself that it will.
    """

    reason: str
    kind: Literal["lost", "raised", "final"] = "lost"


def fault_of(error: BaseException, hosts: Mapping[int, str]) -> Fault:
    """What a trainer of Ray Train failed with; `hosts`: where each worker was, by its rank, as far as that is known."""
    failures = dict(getattr(error, "worker_failures", None) or {})
    # A peer's broken connection only says that somebody else is gone.
    faults = [_of_worker(rank, hosts.get(rank), failure) for rank, failure in sorted(failures.items())]
    for kind in ("final", "raised", "lost"):
        if found := [fault for fault in faults if fault.kind == kind]:
            return max(found, key=lambda fault: "connection" not in fault.reason)
    text = str(error)
    if own := own_words(text):
        return Fault(own, "final")
    if "startup timed out" in text:
        return Fault("there was no room for the workers")
    if "TrainController" in text:
        return Fault("the controller of Ray Train was lost")
    if _died(text):  # the controller reports one that it had not started yet as an error of its own
        return Fault("a worker was killed or has crashed while it started")
    return Fault(_last_line(error), "raised")


def with_nodes(fault: Fault, lost: Sequence[str], nodes: int) -> Fault:
    """The fault of a group on so many nodes, of which those with these names are gone: whatever its workers raised,
    that was why.
    """
    if not lost or fault.kind == "final":
        return fault
    return Fault(f"{fault.reason}; {len(lost)} of {nodes} nodes lost: {named(lost)}")


def _of_worker(rank: int, host: str | None, error: BaseException) -> Fault:
    text, worker = str(error), f"worker {rank} on {host}" if host else f"worker {rank}"
    if own := own_words(f"{type(error).__module__}.{type(error).__qualname__}: {text}"):
        return Fault(own, "final")
    if "OutOfMemory" in text or "memory usage threshold" in text:
        return Fault(f"{worker} was killed because its node ran out of memory (a smaller --batch-size needs less)")
    if "node" in text and ("node has died" in text or "node was terminated" in text or "node failure" in text):
        return Fault(f"{worker} was lost with its node")
    if "class_name: DriverLink" in text:
        return Fault("the link between driver and workers was lost")
    if _died(text):
        pid = re.search(r"pid[:=]\s*(\d+)", text)
        return Fault(f"{worker}{f' (process {pid[1]})' if pid else ''} was killed or has crashed")
    if "HealthCheck" in type(error).__name__ or "temporarily unavailable" in text:
        return Fault(f"{worker} cannot be reached")
    if type(error).__name__ == "StepFailed" and text.startswith(OF_PEERS):
        return Fault(f"the connection of {worker} to the others broke")
    # Without the host: the same error on another one is the same error.
    return Fault(f"worker {rank}: {_last_line(error)}", "raised")


def _died(text: str) -> bool:
    """Whether Ray says of an actor that its process is gone."""
    return any(words in text.lower() for words in ("actor died", "actordied", "actorunavailable", "actor is dead"))


def _last_line(error: BaseException) -> str:
    """What went wrong, which Python says last; Keras says it last in bold, before the arguments of the layer's call."""
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip()
    bold = re.search(r"\x1b\[1m(.+?)\x1b\[0m", text, re.DOTALL)
    line = (bold[1].strip() if bold else text).rpartition("\n")[2]
    return f"{type(cause).__name__}: {line}" if line else first_line(cause)


class Tries:
    """How often in a row, without a new checkpoint between, workers are started again, and after what wait."""

    def __init__(self, most: int):
        self.most, self.failures = most, 0
        self._last: tuple[Fault, str | None] | None = None
        self._checkpoint: str | None = None

    def failed(self, fault: Fault, checkpoint: str | None) -> float | None:
        """Seconds to wait before the next start, none at first; None to give up.

        `checkpoint` is the run's last one now.
        """
        if checkpoint != self._checkpoint:
            self.failures = 0
        again = (fault, checkpoint) == self._last
        self._last, self._checkpoint = (fault, checkpoint), checkpoint
        self.failures += 1
        if fault.kind == "final" or self.failures > self.most or (fault.kind == "raised" and again):
            return None
        return 0.0 if self.failures == 1 else min(FIRST_WAIT * 2 ** (self.failures - 2), LONGEST_WAIT)
