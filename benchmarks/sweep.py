"""A sweep against training all its trials to their end, one after another, in one plain process.

    python benchmarks/sweep.py [--trials 12] [--epochs 9] [--data synthetic] [--rounds 1]

Both use all cores, the same data, draws, seed and train step, and score validation after every epoch. The plain
process has the arrays in memory, imports TensorFlow once, traces one step for each width and writes nothing: no Ray,
no checkpoints, no MLflow. It trains every trial to its last epoch, so it also knows which was truly the best:
regret is how much worse, trained to its end, the sweep's choice is.

The overhead of a trial is the time from the end of the trial before it in the same process to its own end, less
what it trained and validated: its first step, which may trace a graph, and its checkpoints count as overhead. The first
trial of a process is shown apart.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"image_size": 64, "batch_size": 32, "precision": "float32", "limit_train": 640}


def plain(folder: str, epochs: int) -> None:
    """Train every trial of a sweep's folder to its end; print the best val mean IoU of each and the seconds."""
    import numpy as np
    import tensorflow as tf
    import yaml

    tf.config.threading.set_intra_op_parallelism_threads(os.cpu_count())
    tf.config.threading.set_inter_op_parallelism_threads(os.cpu_count())
    from unet import metrics
    from unet.config import TrainSettings, unflat
    from unet.data.shards import Prepared, pixels
    from unet.storage import Folder
    from unet.tuning.trial import Learners

    rows = [json.loads(line) for line in (Path(folder) / "trials.jsonl").read_text().splitlines()]
    config = yaml.safe_load((Path(folder) / rows[0]["trial"] / "config.yaml").read_text())
    prepared, arrays = Prepared(Folder(config["data"])), {}
    side, names = prepared.manifest.image_size, prepared.manifest.classes
    for split in ("train", "val"):
        tables = [prepared.read_chunk(split, i) for i in range(len(prepared.chunks[split]))]
        arrays[split] = (
            np.concatenate([pixels(t["image"], (side, side, 3)) for t in tables]),
            np.concatenate([pixels(t["mask"], (side, side)) for t in tables]),
        )
    batch, learners, scores = config["batch_size"], Learners(), {}
    images, masks = (a[: config["limit_train"]] for a in arrays["train"])
    for row in rows:
        learner = learners.get(unflat(TrainSettings, config | row["settings"]), len(names))
        order, best, step = np.random.default_rng(config["seed"]), 0.0, 0
        for _ in range(epochs):
            for chosen in np.split(order.permutation(len(images)), range(batch, len(images), batch)):
                if len(chosen) == batch:
                    step += 1
                    turn = order.random(batch) < 0.5
                    pair = [images[chosen], masks[chosen]]
                    for array in pair:
                        array[turn] = array[turn, :, ::-1]
                    learner.train_step(*pair, step)
            learner.refresh_float32()
            confusion = np.zeros((len(names), len(names)), np.int64)
            for at in range(0, len(arrays["val"][0]), batch):
                share = [a[at : at + batch] for a in arrays["val"]]
                missing = [(0, batch - len(share[0]))]
                photos = np.pad(share[0], missing + [(0, 0)] * 3)
                truth = np.pad(share[1], missing + [(0, 0)] * 2, constant_values=255)
                confusion += learner.evaluate(photos, truth)[0]
            best = max(best, metrics.scores(confusion, names)["mean_iou"])
        scores[row["trial"]] = best
    print(json.dumps(scores))


def measure(options, storage: str, number: int) -> dict:
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SETTINGS.items()]
    name = f"sweep-{number}"
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), "--recipe=reference", f"--data={options.data}", *flags]
    command += [f"--epochs={options.epochs}", f"--num-samples={options.trials}", f"--run-name={name}"]
    command += [f"--storage-path={storage}", f"--space={options.space}", f"--seed={options.seed + number}"]
    began = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment())
    swept, folder = time.time() - began, Path(storage) / name
    began = time.time()
    command = [sys.executable, __file__, f"--epochs={options.epochs}", f"--plain={folder}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_environment())
    alone, scores = time.time() - began, json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    chosen = json.loads((folder / "summary.json").read_text())["best_trial"]
    first, later = [], []
    for _, of_process in itertools.groupby(sorted(rows, key=lambda r: (r["pid"], r["ended"])), key=lambda r: r["pid"]):
        of_process = list(of_process)
        first.append(of_process[0]["ended"] - of_process[0]["started"] - of_process[0]["training_seconds"])
        later += [b["ended"] - a["ended"] - b["training_seconds"] for a, b in itertools.pairwise(of_process)]
    memory = [r["memory_mb"] for r in sorted(rows, key=lambda r: r["ended"])]
    return {
        "wall time of the sweep, s": swept,
        "wall time of the plain process, s": alone,
        "ratio": swept / alone,
        "trial-epochs saved": 1 - sum(r["epochs"] for r in rows) / (len(rows) * options.epochs),
        "regret in mean IoU": max(scores.values()) - scores[chosen],
        "processes": len(first),
        "overhead of a process' first trial, s": statistics.median(first),
        "overhead of a later trial, s": statistics.median(later) if later else float("nan"),
        "memory after the first trial, MB": memory[0],
        "memory after the last trial, MB": memory[-1],
    }


def _environment() -> dict:
    return os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--data", default="synthetic")
    parser.add_argument("--space", default="default")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        plain(options.plain, options.epochs)
        return
    with tempfile.TemporaryDirectory() as storage:
        prepare = [sys.executable, str(ROOT / "jobs" / "prepare.py"), f"--source={options.data}"]
        prepare += [f"--image-size={SETTINGS['image_size']}", f"--storage-path={storage}"]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL, env=_environment())
        rounds = []
        for number in range(options.rounds):
            rounds.append(measure(options, storage, number))
            print(f"round {number + 1}: " + ", ".join(f"{k} {v:.3g}" for k, v in rounds[-1].items()), flush=True)
    print(f"\n{options.trials} trials of up to {options.epochs} epochs, {SETTINGS}, {os.cpu_count()} cores: medians")
    for key in rounds[0]:
        print(f"{key:>40}  {statistics.median(r[key] for r in rounds):.3f}")


if __name__ == "__main__":
    main()
