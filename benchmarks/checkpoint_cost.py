"""What a checkpoint in the middle of an epoch costs, and how often it may come to slow a training by 2 %.

    python benchmarks/checkpoint_cost.py [--filters 16 64] [--saves 6]

For each width a training by `jobs/train.py` (128 px, two workers) saves after every fifth step. All workers wait until
a checkpoint is written, so what it costs is how much longer it is to the step after it than between two others:
the difference of their medians.
"""

import argparse
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from watched import Watched

SETTINGS = {"data": "synthetic:1000", "image_size": 128, "num_workers": 2, "epochs": 1}
BATCH = {16: 16}
"""By filters; else 4: a step of the reference network is long."""
EVERY = 5
SHARE = 0.02


def intervals(filters: int, saves: int, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds from a step to the next one of rank 0: those with a checkpoint between them, and the others."""
    settings = SETTINGS | {"base_filters": filters, "batch_size": BATCH.get(filters, 4), "checkpoint_every": EVERY}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    job = Watched(flags, folder / "runs", f"filters-{filters}", folder / f"filters-{filters}")
    job.start()
    try:
        if not job.wait_for_step(EVERY * (saves + 1) + 1):
            raise SystemExit(job.output)
        job.interrupt()
        job.wait_until_end()
    finally:
        job.end()
    with_save, without = [], []
    lines = [line for line in job.applied if line["rank"] == 0]
    for before, after in pairwise(sorted(lines, key=lambda line: line["step"])[1:]):  # the first traces the graph
        (without if before["step"] % EVERY else with_save).append(after["time"] - before["time"])
    return with_save[:saves], without


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, nargs="+", default=(16, 64))
    parser.add_argument("--saves", type=int, default=6)
    options = parser.parse_args()
    names = ("filters", "a step", "a checkpoint", "2 % at one every", "at one every ten minutes")
    table = Table(*(Column(name, justify="right") for name in names), box=SIMPLE_HEAD)
    with tempfile.TemporaryDirectory() as folder:
        for filters in options.filters:
            with_save, without = intervals(filters, options.saves, Path(folder))
            step = statistics.median(without)
            cost = statistics.median(with_save) - step
            table.add_row(
                *(str(filters), f"{step:.2f} s", f"{cost:.2f} s", f"{cost / SHARE:.0f} s", f"{cost / 600:.2%}")
            )
    Console(highlight=False, width=100).print(table)


if __name__ == "__main__":
    main()
