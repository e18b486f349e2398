"""The test score that a time gives: the job's default recipe, the notebook's in plain Keras, a good one in PyTorch.

    python benchmarks/time_to_quality.py --data FOLDER [--shares 0.1 1] [--seeds 0] [--torch PYTHON] [--also RUN_FOLDER]

The time is that of 48 epochs of the reference network with 16 filters on this machine, measured first with the job
itself (its images/s and the time of a validation), and the shares of it that are asked for. Each row is a training of
its own, whose schedule knows its time; all have the same prepared data, cores and precision, one after another. The
job's minutes hold the start of its workers, TensorFlow's import, validation, test and packaging; those of the others
hold their training only. PYTHON has PyTorch (`pip install '.[benchmarks]'`); without it that row is left out.
RUN_FOLDER is a run of the job with `--minutes` on this machine that has ended; it becomes a row. It writes
`time_to_quality.json` and `.png`.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
JOB, KERAS, TORCH = "this job, --recipe best", "Keras fit, the notebook's recipe", "PyTorch U-Net, a good recipe"
EPOCHS = 48


def train(data: str, storage: str, name: str, *flags: str) -> tuple[dict, list[dict]]:
    """The summary and the epochs of a run of the job."""
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--data", data, "--storage-path", storage]
    subprocess.run([*command, "--run-name", name, *flags], check=True, stdout=sys.stderr)
    folder = Path(storage) / name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "summary.json").read_text()), lines


def reference_minutes(data: str, storage: str, workers: str) -> tuple[float, str]:
    """The minutes of 48 epochs of the reference network with 16 filters, and the precision that was chosen."""
    flags = ("--recipe", "reference", "--base-filters", "16", "--epochs", "3", "--num-workers", workers)
    _, lines = train(data, storage, "reference", *flags)
    a_pass = statistics.median(after["time"] - before["time"] for before, after in itertools.pairwise(lines))
    config = yaml.safe_load((Path(storage) / "reference" / "config.yaml").read_text())
    return EPOCHS * a_pass / 60_000, config["precision"]


def row_of_job(data: str, storage: str, workers: str, minutes: float, seed: int) -> dict:
    flags = ("--minutes", f"{minutes:.3f}", "--seed", str(seed), "--num-workers", workers)
    begun, name = time.time(), f"job-{minutes:.1f}-{seed}"
    train(data, storage, name, *flags)
    return row_of_run(Path(storage) / name) | {"wall_minutes": (time.time() - begun) / 60}


def row_of_run(folder: Path) -> dict:
    """Of a run of the job that has ended."""
    summary, config = (
        json.loads((folder / "summary.json").read_text()),
        yaml.safe_load((folder / "config.yaml").read_text()),
    )
    return {
        "score": summary["test"]["mean_iou"],
        "minutes": config["minutes"],
        "wall_minutes": (summary["ended"] - summary["started"]) / 60_000,
        "parameters": summary["parameters"],
        "seed": config["seed"],
    }


def row_of_peer(python: str, script: str, data: str, minutes: float, seed: int, precision: str) -> dict:
    command = [python, str(PEERS / script), data, str(minutes), "--seed", str(seed), "--precision", precision]
    begun = time.time()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "score": found["mean_iou"],
        "minutes": found["minutes"],
        "wall_minutes": (time.time() - begun) / 60,
        "parameters": found["parameters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a prepared folder")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 1.0], help="of the reference's time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num-workers", default="2")
    parser.add_argument("--torch", help="a Python that has PyTorch")
    parser.add_argument("--also", nargs="*", default=[], help="folders of runs of the job")
    parser.add_argument("--output", default="time_to_quality", help="name of the JSON and the picture")
    args = parser.parse_args()
    data = str(Path(args.data).absolute())
    with tempfile.TemporaryDirectory() as storage:
        minutes, precision = reference_minutes(data, storage, args.num_workers)
        print(f"{EPOCHS} epochs of the reference with 16 filters: {minutes:.1f} minutes, {precision}", flush=True)
        rows = [{"trainer": JOB, "share": None, **row_of_run(Path(folder))} for folder in args.also]
        for row in rows:
            print(_line(row), flush=True)
        for share in args.shares:
            for seed in args.seeds:
                for name, run in _trainers(args, data, storage, precision).items():
                    rows.append({"trainer": name, "share": share, "seed": seed, **run(share * minutes, seed)})
                    print(_line(rows[-1]), flush=True)
                    Path(f"{args.output}.json").write_text(json.dumps({"minutes": minutes, "rows": rows}, indent=1))
    draw(minutes, rows, f"{args.output}.png")


def _trainers(args: argparse.Namespace, data: str, storage: str, precision: str) -> dict:
    found = {
        JOB: lambda minutes, seed: row_of_job(data, storage, args.num_workers, minutes, seed),
        KERAS: lambda minutes, seed: row_of_peer(sys.executable, "keras_notebook.py", data, minutes, seed, precision),
    }
    if args.torch:
        found[TORCH] = lambda minutes, seed: row_of_peer(args.torch, "torch_unet.py", data, minutes, seed, precision)
    return found


def _line(row: dict) -> str:
    return (
        f"{row['trainer']:34s} seed {row['seed']}  {row['parameters']:>12,} parameters  {row['minutes']:5.1f} min "
        f"({row['wall_minutes']:.1f} with start and test)  test mean IoU {row['score']:.4f}"
    )


def draw(minutes: float, rows: list[dict], path: str) -> None:
    """Test scores over minutes: a line a trainer, a point a training."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name in dict.fromkeys(row["trainer"] for row in rows):
        own = sorted((row["minutes"], row["score"]) for row in rows if row["trainer"] == name)
        axes.plot(*zip(*own, strict=True), "o-", label=name)
    for x, score in ((row["minutes"], row["score"]) for row in rows):
        axes.annotate(f"{score:.3f}", (x, score), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axes.axhline(0.633, color="grey", lw=0.8, ls="--")
    axes.text(
        0.99, 0.633, "published, 34.5 M parameters", transform=axes.get_yaxis_transform(), ha="right", va="bottom"
    )
    times = sorted({round(row["minutes"], 1) for row in rows})
    axes.set(xscale="log", xlabel="minutes of training on this machine", ylabel="test mean IoU, 128 px")
    axes.set_title("The score that a time gives, each point a training of its own", fontsize=10)
    axes.set_xticks(times, [f"{time:g}" for time in times])
    axes.minorticks_off()
    axes.legend(loc="lower right", fontsize=8)
    axes.margins(y=0.15)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
