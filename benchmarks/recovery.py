"""From the death of a worker, of the controller of Ray Train or of the driver to the next step of the training.

    python benchmarks/recovery.py [--rounds 3] [--workers 2] [--checkpoint-every 10]

A round is one training (16 filters, 128 px, batch 16) by `jobs/train.py` on a Ray of its own. One after another, a
worker, the controller and the driver are killed by SIGKILL, each some steps after a checkpoint; after the driver the
same command is given again at once. With such a driver its Ray dies too; so a second training, on a Ray that stays,
loses its driver as well. Measured is from the kill to the moment when the first step after it was applied on all
workers, and how many steps were done again.

TensorFlow's import is measured in each round on the same machine: fresh processes, as many at once as there are
workers, until the last has loaded it. What goes beyond it is the job's own part.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ray.cluster_utils import Cluster
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from watched import Watched

SETTINGS = {"data": "synthetic:400", "image_size": 128, "base_filters": 16, "batch_size": 16, "epochs": 1000}
STAYING = "driver, its Ray stays"
KINDS = ("worker", "controller", "driver", STAYING)
AIM_SECONDS = 10
"""Beyond the import."""


def import_seconds(processes: int) -> float:
    """Until as many fresh processes, started at once, have imported TensorFlow."""
    began = time.perf_counter()
    started = [
        subprocess.Popen([sys.executable, "-c", "import tensorflow"], stderr=subprocess.DEVNULL)
        for _ in range(processes)
    ]
    if any(process.wait() for process in started):
        raise SystemExit("TensorFlow cannot be imported.")
    return time.perf_counter() - began


def recover(job: Watched, kind: str, steps: int, draws: random.Random) -> dict | None:
    """Kill when `steps` more steps are done; seconds to the next one and steps repeated, None if the job ended."""
    job.wait_for_step(job.step + steps)
    kind = "driver" if kind == STAYING else kind
    kill = job.kill(kind, draws.randrange(2))
    known = {line["start"] for line in job.applied}
    if kind == "driver":
        job.start()
    first = job.wait_for_start(known)
    if first is None:
        return None
    # A line is of one worker: the others may be a little later.
    job.wait(lambda: sum(line["start"] == first["start"] for line in job.applied) >= first["world"])
    lines = [line for line in job.applied if line["start"] == first["start"]][: first["world"]]
    before = max(line["step"] for line in job.applied if line["start"] in known)
    return {"seconds": max(line["time"] for line in lines) - kill.time, "repeated": before + 1 - first["step"]}


def run_round(options, folder: Path, number: int, draws: random.Random) -> dict:
    """The measurements by kind, and TensorFlow's import."""
    found = {"import": import_seconds(options.workers)}
    found |= hurt(options, KINDS[:-1], folder, f"own-{number}", "local", draws)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": os.cpu_count(), "include_dashboard": False})
    try:
        return found | hurt(options, (STAYING,), folder, f"staying-{number}", cluster.address, draws)
    finally:
        cluster.shutdown()


def hurt(options, kinds: tuple[str, ...], folder: Path, name: str, address: str, draws: random.Random) -> dict:
    """A training on that Ray through these kills, one after another."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    flags += [f"--num-workers={options.workers}", f"--checkpoint-every={options.checkpoint_every}"]
    job, found = Watched(flags, folder / "runs", name, folder / name, address), {}
    job.start()
    try:
        if job.wait_for_start(set()) is None:
            raise SystemExit(job.output)
        for kind in kinds:
            steps = options.checkpoint_every + draws.randrange(options.checkpoint_every)
            found[kind] = recover(job, kind, steps, draws)
            if job.ended:  # it gave up, and is started again for what follows
                known = {line["start"] for line in job.applied}
                job.start()
                job.wait_for_start(known)
        job.interrupt()
        job.wait_until_end()
    finally:
        job.end()
    return found


def shown(kind: str, found: dict | None) -> str:
    if found is None:
        return f"{kind}: the job ended"
    return f"{kind} {found['seconds']:.1f} s, {found['repeated']} steps again"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps")
    parser.add_argument("--seed", type=int, default=0, help="of how many steps pass before a kill, and of the rank")
    options = parser.parse_args()
    draws, rounds = random.Random(options.seed), []
    import_seconds(1)  # brings its files into memory
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            rounds.append(run_round(options, Path(folder), number, draws))
            parts = [shown(kind, rounds[-1][kind]) for kind in KINDS]
            print(f"round {number + 1}: import {rounds[-1]['import']:.1f} s; " + "; ".join(parts), flush=True)
    loading = statistics.median(found["import"] for found in rounds)
    table = Table(
        *("killed", *(Column(name, justify="right") for name in ("to the next step", "beyond the import", "at most"))),
        *(Column(name, justify="right") for name in ("steps again, at most", "went on")),
        box=SIMPLE_HEAD,
    )
    reached = True
    for kind in KINDS:
        results = [found[kind] for found in rounds if found[kind]]
        if results:
            seconds = [result["seconds"] for result in results]
            beyond = [found[kind]["seconds"] - found["import"] for found in rounds if found[kind]]
            repeated = max(result["repeated"] for result in results)
            cells = [
                f"{statistics.median(seconds):.1f} s",
                f"{statistics.median(beyond):.1f} s",
                f"{max(beyond):.1f} s",
            ]
            table.add_row(kind, *cells, str(repeated), f"{len(results)} of {len(rounds)}")
            reached &= statistics.median(beyond) < AIM_SECONDS and repeated <= options.checkpoint_every
        else:
            table.add_row(kind, "", "", "", "", f"0 of {len(rounds)}")
        reached &= len(results) == len(rounds)
    print(
        f"\n{options.workers} worker(s), a checkpoint every {options.checkpoint_every} steps: medians of "
        f"{options.rounds} round(s). TensorFlow's import takes {loading:.1f} s."
    )
    Console(highlight=False, width=100).print(table)
    print(f"The aim, {AIM_SECONDS} s beyond the import and one interval: {'reached' if reached else 'not reached'}.")


if __name__ == "__main__":
    main()
