"""Golden numbers: what a few short trainings come to, to the last bit, for refactorings that may change no number.

Prints a digest of the weights and the losses of five configurations, beside what `golden.json` holds for this kind of
processor and these versions; `--record` writes them there. The digests read the checkpoints' files themselves, and
depend neither on the names nor on the order of the arrays in them.

    python benchmarks/golden.py
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_suffix(".json")
BASE = {
    "data": "synthetic:96",
    "image-size": 64,
    "base-filters": 16,
    "batch-size": 12,
    "epochs": 2,
    "threads": 1,
    "precision": "float32",
    "seed": 7,
    "learning-rate": 0.002,
}
CONFIGURATIONS = {
    "precision": {"precision": "mixed_float16"},
    "clip": {"clip-norm": 0.5},
    "shards": {"grad-shards": 4},
    "streamed": {"memory-budget": "1MB"},
    "two workers": {"num-workers": 2},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write what is printed to golden.json")
    parser.add_argument("--only", choices=CONFIGURATIONS, help="run one configuration")
    options = parser.parse_args()
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    found, machine = {}, ""
    with tempfile.TemporaryDirectory() as storage:
        for name, changes in CONFIGURATIONS.items():
            if options.only in (None, name):
                machine, found[name] = train(Path(storage), name.replace(" ", "-"), BASE | changes)
    expected = known.get(machine, {})
    table = Table("configuration", "weights", "train loss", "val loss", "val mean IoU", "", title=machine)
    for name, numbers in found.items():
        verdict = "not recorded" if name not in expected else "same" if expected[name] == numbers else "DIFFERS"
        losses = (str(numbers[key]) for key in ("train/loss", "val/loss", "val/mean_iou"))
        table.add_row(name, numbers["weights"][:16], *losses, verdict)
    Console(width=160).print(table)
    if not expected:
        print("Nothing is recorded for this processor and these versions: run it with --record before a change.")
    if options.record:
        known[machine] = expected | found
        RECORD.write_text(json.dumps(known, indent=2) + "\n")
        return 0
    return any(name in expected and expected[name] != numbers for name, numbers in found.items())


def train(storage: Path, name: str, settings: dict) -> tuple[str, dict]:
    """A training by the job itself: what its bits depend on, and what it came to."""
    flags = [f"--{key}={value}" for key, value in settings.items()]
    flags.append("--recipe=reference")
    command = [sys.executable, f"{ROOT}/jobs/train.py", *flags, f"--storage-path={storage}", f"--run-name={name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    run = storage / name
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    checkpoint = sorted((run / "checkpoints").glob("step_*"))[-1]
    equality = json.loads((checkpoint / "state.json").read_text())["equality"]
    about = " | ".join(str(equality[key]) for key in ("processor", "device", "tensorflow", "keras", "numpy"))
    numbers = {key: last[key] for key in ("train/loss", "val/loss", "val/mean_iou")}
    return about, {"weights": digest(checkpoint / "model.weights.h5"), **numbers}


def digest(file: Path) -> str:
    """sha256 over the sorted sha256 of the arrays of an HDF5 file."""
    each = []

    def visit(_, item) -> None:
        if isinstance(item, h5py.Dataset):
            array = np.ascontiguousarray(item[()])
            each.append(hashlib.sha256(repr((array.shape, array.dtype.str)).encode() + array.tobytes()).hexdigest())

    with h5py.File(file) as content:
        content.visititems(visit)
    return hashlib.sha256("".join(sorted(each)).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
