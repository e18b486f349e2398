"""What a process and all below it use, by kind, for benchmarks that watch whether something grows."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import psutil

MB = 2**20


@dataclass
class Usage:
    """Of some processes together.

    Attributes:
        processes: their number.
        private: MB that would be free without them (USS).
        resident: MB with what they share, counted for each (RSS).
        threads, handles: their number; open files, sockets and pipes.
    """

    processes: int = 0
    private: float = 0.0
    resident: float = 0.0
    threads: int = 0
    handles: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Usage)))


def usage(root: psutil.Process, kinds: Mapping[str, str], rest: str) -> dict[str, Usage]:
    """By kind, what the processes below `root` use, and the root itself as "driver".

    `kinds` gives the kind by a piece of the title, the first that fits; what fits none is of the kind `rest`.
    """
    found = {kind: Usage() for kind in ("driver", *kinds.values(), rest)}
    for process in [root, *root.children(recursive=True)]:
        try:
            title = " ".join(process.cmdline())
            kind = next((kind for piece, kind in kinds.items() if piece in title), rest)
            memory = process.memory_full_info()
            own = Usage(1, memory.uss / MB, memory.rss / MB, process.num_threads(), process.num_fds())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        kind = "driver" if process.pid == root.pid else kind
        found[kind] += own
    return found


def slope(values: list[float]) -> float:
    """By least squares, a step of one."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) if len(values) > 1 else float("nan")
