"""Whether a long training grows or stalls: memory, threads, open handles and processes over 60 epochs.

    python benchmarks/soak.py [--epochs 60] [--ways kept streamed] [--samples 400]

Trains by `jobs/train.py` with two workers on a Ray of its own (64 px, 8 filters, batch 32), once with the data kept in
the object store and once streamed. After every epoch all its processes are measured by kind. At the end, for each
kind: medians of the first and the last third of the epochs, and the slope an epoch by least squares; and the longest
time between two steps, which holds the validation and the checkpoint between two epochs. The exit code is 1 if
anything exceeds its limit.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import psutil
from processes import Usage, slope, usage
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from watched import Watched

SETTINGS = {"image_size": 64, "base_filters": 8, "depth": 3, "batch_size": 32, "num_workers": 2, "threads": 1}
KINDS = {
    "TrainController": "controller",
    "RayTrainWorker": "workers",
    "ray::DriverLink": "driver link",
    "/raylet": "raylet",
    "gcs_server": "gcs",
    "SplitCoordinator": "Ray Data",
    "ray::MapBatches": "Ray Data",
    "ray::IDLE": "Ray Data",
}
"""By a piece of the title. Tasks of Ray Data run in processes that wait for the next one in between."""
MEASURES = {
    "processes": "processes",
    "private": "private MB",
    "resident": "resident MB",
    "threads": "threads",
    "handles": "handles",
}
LIMITS = {"processes": 0.5, "private": 10.0, "threads": 2.0, "handles": 2.0}
"""How much the median of the last third may lie above that of the first: of each kind, MB or a number."""
GROWTH = 0.05
"""The same, as a part of the first third; the larger one counts."""
STALL_SECONDS = 20.0
POLL_SECONDS = 0.2


def soak(way: str, options, folder: Path) -> tuple[list[dict[str, Usage]], list[float]]:
    """Train; what each kind used after each epoch, and the seconds between steps."""
    settings = SETTINGS | {"data": f"synthetic:{options.samples}", "epochs": options.epochs}
    if way == "streamed":
        settings |= {"memory_budget": "10kB"}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    job = Watched(flags, folder / "runs", way, folder / way)
    rows, root, metrics = [], None, job.run / "metrics.jsonl"
    job.start()
    try:
        root = psutil.Process(job.driver.pid)
        while not job.ended and len(rows) < options.epochs:
            epochs = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            if epochs > len(rows):
                rows.append(usage(root, KINDS, "other Ray"))
                shown = "  ".join(f"{kind} {used.private:.0f}" for kind, used in rows[-1].items())
                print(f"{way} epoch {epochs}: {shown} MB", flush=True)
            time.sleep(POLL_SECONDS)
        job.wait_until_end()
    finally:
        job.end()
    if job.driver.returncode or json.loads((job.run / "summary.json").read_text())["restarts"]:
        raise SystemExit(job.output)
    times = sorted(line["time"] for line in job.applied if line["rank"] == 0)
    return rows, [after - before for before, after in pairwise(times)]


def judge(rows: list[dict[str, Usage]], table: Table) -> list[str]:
    """Fill the table; what exceeds its limit."""
    third, exceeded = max(1, len(rows) // 3), []
    for kind in rows[0]:
        cells = []
        for measure in MEASURES:
            values = [getattr(row[kind], measure) for row in rows]
            first, last = statistics.median(values[:third]), statistics.median(values[-third:])
            cells.append(f"{first:.0f} → {last:.0f}  {slope(values):+.2f}")
            if measure in LIMITS and last - first > max(LIMITS[measure], GROWTH * first):
                exceeded.append(f"{measure} of {kind}: {first:.1f} → {last:.1f}")
        if any(row[kind].processes for row in rows):
            table.add_row(kind, *cells)
    return exceeded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--ways", nargs="+", choices=("kept", "streamed"), default=("kept", "streamed"))
    options = parser.parse_args()
    exceeded = []
    for way in options.ways:
        began = time.time()
        with tempfile.TemporaryDirectory() as folder:
            rows, gaps = soak(way, options, Path(folder))
        columns = (Column(name, justify="right") for name in MEASURES.values())
        title = (
            f"{way}, {len(rows)} epochs measured in {time.time() - began:.0f} s: median of the first third → of the "
            "last, and slope an epoch"
        )
        table = Table("", *columns, box=SIMPLE_HEAD, title=title, title_justify="left")
        exceeded += [f"{way}, {what}" for what in judge(rows, table)]
        Console(highlight=False, width=140).print(table)
        print(f"{len(gaps) + 1} steps; between two: median {statistics.median(gaps):.2f} s, longest {max(gaps):.2f} s")
        if max(gaps) > STALL_SECONDS:
            exceeded.append(f"{way}, the longest time between two steps: {max(gaps):.1f} s")
        if len(rows) < options.epochs * 0.9:
            exceeded.append(f"{way}, only {len(rows)} epochs were measured")
    print("Over the limit: " + "; ".join(exceeded) if exceeded else "Nothing grew over its limit, and nothing stalled.")
    sys.exit(bool(exceeded))


if __name__ == "__main__":
    main()
