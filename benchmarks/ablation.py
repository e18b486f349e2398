"""What each line of the recipe is worth: trainings of equal length that differ from `best` by one line each.

    python benchmarks/ablation.py --data FOLDER [--image-size 64] [--epochs 12] [--only PATTERN] [--output NAME]

Every row is a training by the job itself over the same number of images, seed 0, and is compared with the base image by
image on the validation split: the difference in mean IoU and its 95 % interval by a paired bootstrap over images
(`jobs/evaluate.py --model BASE,ROW --split val`). The first row is the base with other seeds, whose spread is the noise
that every other row stands in. It prints a Markdown table and writes what it knows to NAME.json after each row.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    "another seed": ["--seed=1"],
    "a third seed": ["--seed=2"],
    "optimizer: AdamW": ["--optimizer=adamw"],
    "optimizer: SGD": ["--optimizer=sgd", "--learning-rate=0.1", "--weight-decay=0.0005"],
    "schedule: cosine": ["--schedule=cosine"],
    "schedule: linear": ["--schedule=linear"],
    "no average of the weights": ["--ema-decay=0"],
    "loss: cross-entropy alone": ["--loss=cross_entropy"],
    "loss: with Dice": ["--loss=cross_entropy+dice"],
    "loss: with Lovász": ["--loss=cross_entropy+lovasz"],
    "class weights by frequency": ["--class-weights=auto"],
    "label smoothing 0.05": ["--label-smoothing=0.05"],
    "augmentation: mirrored only": ["--augment=0"],
    "augmentation: strength 0.25": ["--augment=0.25"],
    "augmentation: strength 1": ["--augment=1"],
    "augmentation: with blur and cut-out": ["--augment-with=scale+rotate+shift+colour+blur+cutout"],
    "augmentation: half of the samples mixed": ["--mix=0.5"],
    "norm: group": ["--norm=group"],
    "norm: none": ["--norm=none"],
    "dropout 0.1": ["--dropout=0.1"],
    "batch 16": ["--batch-size=16"],
    "batch 64": ["--batch-size=64"],
    "rate 0.002": ["--learning-rate=0.002"],
    "rate 0.008": ["--learning-rate=0.008"],
    "network: reference U-Net, 16 filters": ["--network=unet", "--base-filters=16"],
    "recipe: reference, 16 filters": ["--recipe=reference", "--base-filters=16"],
}
"""What differs from the base, by what a reader calls it."""


class Ablation:
    """Trainings in one storage path, and their comparison with the base."""

    def __init__(self, args: argparse.Namespace, storage: str):
        self._store, self._data = [f"--storage-path={storage}"], str(Path(args.data).absolute())
        self._storage, self._workers = Path(storage), args.num_workers
        self._length = [f"--image-size={args.image_size}", f"--epochs={args.epochs}"]

    def train(self, name: str, *flags: str) -> dict:
        """The summary of a run, which a run of this name that has ended keeps."""
        common = [f"--data={self._data}", f"--run-name={name}", f"--num-workers={self._workers}", *self._length]
        self._job("train", *common, *self._store, *flags)
        return json.loads((self._storage / name / "summary.json").read_text())

    def compared(self, name: str) -> dict:
        """The difference in mean IoU on val, with its interval: name minus base."""
        self._job("evaluate", f"--model=base,{name}", "--split=val", *self._store)
        metrics = json.loads((self._storage / name / "evaluations" / "val" / "metrics.json").read_text())
        return metrics["comparison"]["pairs"][0]["network_size"]["mean_iou"]

    def _job(self, name: str, *flags: str) -> None:
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *flags]
        subprocess.run(command, check=True, stdout=sys.stderr)


def line(name: str, summary: dict, difference: dict | None) -> str:
    words = (
        ""
        if difference is None
        else "{:+.4f} ({:+.4f} to {:+.4f})".format(difference["value"], *difference["interval"])
    )
    score, speed = summary["val"]["mean_iou"], summary["images_per_second"]
    return f"| {name} | {score:.4f} | {words} | {speed:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name this pattern finds")
    parser.add_argument("--storage-path", help="where runs are kept; the same again continues. None: a temporary one")
    parser.add_argument("--output", default="ablation")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        ablation, found = Ablation(args, args.storage_path or temporary), {}
        base = ablation.train("base")
        print("| | val mean IoU | difference (95 %) | images/s |\n|---|---|---|---|")
        print(line("recipe `best`", base, None), flush=True)
        for number, (name, flags) in enumerate(ROWS.items()):
            if re.search(args.only, name):
                summary = ablation.train(f"row-{number}", *flags)
                difference = ablation.compared(f"row-{number}")
                print(line(name, summary, difference), flush=True)
                found[name] = {"flags": flags, "val": summary["val"], "difference": difference}
                Path(f"{args.output}.json").write_text(json.dumps({"base": base["val"], "rows": found}, indent=1))


if __name__ == "__main__":
    main()
