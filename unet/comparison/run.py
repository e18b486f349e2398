"""A comparison from its settings to its results."""

import hashlib
import re
from dataclasses import dataclass

from unet.comparison.pairs import Pairs, data_of, paired
from unet.comparison.runs import ComparedRun
from unet.comparison.sweep import ComparedSweep, read_sweep
from unet.config import folder_of, read_config
from unet.config.compare import CompareSettings
from unet.disk import check_writable
from unet.errors import InputError
from unet.storage import Folder
from unet.terminal import Display

FOLDER = "comparisons"
MOST = 12
"""More runs could not be told apart on one page."""


@dataclass(frozen=True)
class Comparison:
    """Runs, and what sets them apart.

    Attributes:
        name: of the comparison, in files and MLflow.
        folder: where its page goes.
        split: whose images the runs are compared on in pairs.
        runs: in the order in which they were named; of a sweep the best trials, the best first.
        data_digest: of their data.
        pairs: their differences.
        sweep: the one that was named.
    """

    name: str
    folder: Folder
    split: str
    runs: list[ComparedRun]
    data_digest: str
    pairs: Pairs
    sweep: ComparedSweep | None


def compare_runs(settings: CompareSettings, display: Display) -> Comparison:
    """Compare the runs of the settings.

    Raises:
        InputError: a run is missing or damaged, they do not compare, or the results cannot be written.
        RunFailed: scoring failed.
    """
    part, storage = settings.compare, Folder(settings.store.storage_path)
    folders = {name: folder_of(name, storage) for name in _named(part.runs)}
    name = _name_of(part.runs)
    folder = Folder(part.output) if part.output else storage / FOLDER / name
    check_writable(folder, "--output")
    sweeps = [name for name, folder in folders.items() if "space" in read_config(folder)]
    if sweeps and len(folders) > 1:
        raise InputError(f"{sweeps[0]} is a sweep: compare it alone, or name its trials, as {sweeps[0]}/trial-001.")
    sweep = None
    if sweeps:
        sweep, runs = read_sweep(sweeps[0], folders[sweeps[0]], MOST, display)
    else:
        runs = [ComparedRun.of_folder(name, name, folder) for name, folder in folders.items()]
    if len(runs) < 2:
        what = "a sweep with fewer than two trials" if sweep else "a single run"
        raise InputError(f"{part.runs[0]} is {what}: name two runs to compare, or another sweep.")
    digest = data_of(runs)
    return Comparison(name, folder, part.split, runs, digest, paired(runs, digest, settings, display), sweep)


def _named(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, checked. Raises InputError."""
    if not names:
        raise InputError("Say which runs: python jobs/compare.py RUN RUN, or the name of a sweep.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{twice} is named twice.")
    if len(names) > MOST:
        raise InputError(f"{len(names)} runs cannot be told apart on one page: name {MOST} at most.")
    return names


def _name_of(names: tuple[str, ...]) -> str:
    """A name for the folder of a comparison, which differs from that of other runs."""
    joined = "-vs-".join(names)
    plain = re.sub(r"[^\w.@-]+", "-", joined)
    return plain if len(plain) <= 100 else f"{plain[:90]}-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"
