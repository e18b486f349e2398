"""Whether a run that trains an earlier one again comes to the same numbers: `--reproduce`."""

import math
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from unet.config import TrainSettings, flat
from unet.tracking.original import LOCAL, Original, numbers
from unet.training.equality import processor

CLOSE = 1e-6
"""The greatest relative difference of numbers that are called equal but for rounding."""


@dataclass
class Reproduction:
    """A comparison of the epochs of a run with those of an earlier one, as they come.

    Attributes:
        greatest: the greatest relative difference so far.
        parted: where the numbers first differed by more than `CLOSE`, in words; "" while they do not.
    """

    original: Original
    epochs: set[int] = field(default_factory=set)
    exact: set[int] = field(default_factory=set)
    greatest: float = 0.0
    parted: str = ""

    def epoch(self, record: dict) -> str:
        """How the numbers of an epoch compare, as a sentence."""
        epoch = record["epoch"]
        there = next((line for line in self.original.history if line["epoch"] == epoch), None)
        if there is None:
            return f"epoch {epoch}: {self.original.name} has none to compare with"
        words = self._compared(f"epoch {epoch}", numbers(there), numbers(record))
        self.epochs.add(epoch)
        if words == "the same bits":
            self.exact.add(epoch)
        return f"epoch {epoch}: {words} as {self.original.name}" if epoch in self.exact else f"epoch {epoch}: {words}"

    def _compared(self, where: str, there: dict, here: dict) -> str:
        names = sorted(there.keys() | here.keys())
        differences = {name: _difference(there.get(name), here.get(name)) for name in names}
        name = max(names, key=lambda name: differences[name], default=None)
        if name is None or differences[name] == 0:
            return "the same bits"
        self.greatest = max(self.greatest, differences[name])
        if differences[name] <= CLOSE:
            return f"within {CLOSE:g} of {self.original.name} (at most {differences[name]:.1e}, {name})"
        pair = f"{name} {there.get(name)} there, {here.get(name)} here"
        self.parted = self.parted or f"{where} ({pair})"
        return f"other numbers than {self.original.name} ({pair})"

    def verdict(self, summary: dict[str, Any], equality: dict[str, Any]) -> str:
        """One line on the whole, which can be quoted; `summary` and `equality` are this run's."""
        name, count = self.original.name, len(self.epochs)
        test = [(found or {}).get("mean_iou") for found in (self.original.summary.get("test"), summary.get("test"))]
        if None not in test:
            self._compared("the test split", {"test/mean_iou": test[0]}, {"test/mean_iou": test[1]})
        if not count:
            words = f"Nothing of {name} could be compared"
        elif self.parted:
            words = f"Not reproduced: {name} and this run parted in {self.parted}"
        elif self.greatest:
            words = f"Reproduced: {name} within {self.greatest:.1e} over {count} epoch(s)"
        else:
            words = f"Reproduced: {name} bit for bit over {count} epoch(s)"
        facts = [f"data {summary['data_digest'][:12]}", f"code {str(summary.get('code'))[:12]}"]
        if None not in test:
            facts.insert(0, f"test mean IoU {test[1]:.4f}" + (f" against {test[0]:.4f}" if test[0] != test[1] else ""))
        known = ("tensorflow", "python", "num_workers", "threads", "precision", "device", "processor")
        facts += [f"{key.replace('_', ' ')} {equality[key]}" for key in known if key in equality]
        return f"{words}; {', '.join(facts)}."


def differences(original: Original, settings: TrainSettings, data_digest: str, code: str) -> list[str]:
    """What differs here from the earlier run, a line each, as far as it is known before the first step."""
    found = []
    here = flat(settings)
    for name, value in original.settings.items():
        if name in here and name not in LOCAL and here[name] != value:
            found.append(f"--{name.replace('_', '-')}: {value} there, {here[name]} here")
    known: dict[str, tuple] = {
        "data": (original.summary.get("data_digest"), data_digest),
        "code": (original.summary.get("code"), code),
    }
    known |= {key: (original.equality.get(key), value) for key, value in _machine().items()}
    found += [f"{name}: {a} there, {b} here" for name, (a, b) in known.items() if a and b and a != b]
    if original.settings.get("minutes"):
        found.append("--minutes: its rate followed the speed that was measured then")
    return found


def _machine() -> dict[str, str | None]:
    """What this process knows of what a worker's numbers depend on, without TensorFlow."""
    packages = {"tensorflow": ("tensorflow", "tensorflow-cpu"), "keras": ("keras",), "numpy": ("numpy",)}
    found = {name: next(filter(None, map(_version, names)), None) for name, names in packages.items()}
    return {"python": platform.python_version(), "processor": processor()} | found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _difference(a: float | None, b: float | None) -> float:
    """The relative difference of two numbers; infinite where only one is there."""
    if a == b:
        return 0.0
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))
