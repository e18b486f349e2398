"""The job's steady images/s against the fastest bare in-memory loop known, in turn on the same cores.

    python benchmarks/train_throughput.py [--rounds 3] [--precision float32]

Both train the same network (16 filters, 128 px, the job's own dropout, which is faster than Keras') with a global
batch of 64 on all cores. The bare loop is one process: arrays in memory, one traced step, no Ray, no validation,
no metrics, nothing read back but the last loss. Every round runs bare, the job with one worker and with two; the
ratios are taken within a round and their medians printed, since a shared machine's speed drifts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH, SIZE, FILTERS, STEPS, EPOCHS = 64, 128, 16, 10, 3


def bare(precision: str, started: float) -> None:
    """Print images/s and the seconds from `started` to the first step's end."""
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(os.cpu_count())
    tf.config.threading.set_inter_op_parallelism_threads(os.cpu_count())
    import keras

    from unet.recipe.layers import build_unet
    from unet.recipe.passes import TrainingPass, training_pass

    keras.config.set_dtype_policy(precision)
    model = build_unet(SIZE, FILTERS)
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)
    def step(images, masks, number):
        with tf.GradientTape() as tape, training_pass(TrainingPass(0, number, tf.constant(0, tf.int64))):
            logits = model(tf.cast(images, tf.float32) / 255.0, training=True)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(masks, tf.int32), logits)
            loss = tf.reduce_mean(loss)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (4 * BATCH, SIZE, SIZE, 3), np.uint8)
    masks = generator.integers(0, 3, (4 * BATCH, SIZE, SIZE), np.uint8)
    batches = [slice(i * BATCH, (i + 1) * BATCH) for i in range(4)]
    float(step(images[batches[0]], masks[batches[0]], tf.constant(1, tf.int64)))
    first, begin = time.time() - started, time.perf_counter()
    for number in range(2, 2 * STEPS + 2):
        loss = step(images[batches[number % 4]], masks[batches[number % 4]], tf.constant(number, tf.int64))
    float(loss)
    print(json.dumps({"images_per_second": 2 * STEPS * BATCH / (time.perf_counter() - begin), "first_step": first}))


def run_bare(precision: str) -> dict:
    command = [sys.executable, __file__, "--bare", str(time.time()), "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    return json.loads(done.stdout.splitlines()[-1])


def run_job(precision: str, workers: int, storage: str, name: str, epochs: int = EPOCHS) -> dict:
    command = [
        sys.executable,
        str(ROOT / "jobs" / "train.py"),
        "--recipe=reference",
        "--data=synthetic",
        f"--image-size={SIZE}",
    ]
    command += [f"--base-filters={FILTERS}", f"--batch-size={BATCH}", f"--precision={precision}", f"--epochs={epochs}"]
    command += [
        f"--limit-train={STEPS * BATCH}",
        f"--num-workers={workers}",
        f"--storage-path={storage}",
        f"--run-name={name}",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment())
    summary = json.loads((Path(storage) / name / "summary.json").read_text())
    lines = [json.loads(line) for line in (Path(storage) / name / "metrics.jsonl").read_text().splitlines()]
    # Steady: in the first epoch, actors of Ray are still starting on the same cores.
    steady = statistics.median(line["speed/images_per_second"] for line in lines[1:] or lines)
    return {"images_per_second": steady, "first_step": summary["seconds_to_first_step"]}


def _environment() -> dict:
    return os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--bare", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare(options.precision, options.bare)
        return
    kinds = ("bare", "1 worker", "2 workers")
    results = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as storage:
        run_job(options.precision, 1, storage, "prepares-the-data", epochs=1)
        for number in range(options.rounds):
            results["bare"].append(run_bare(options.precision))
            for workers, kind in ((1, "1 worker"), (2, "2 workers")):
                results[kind].append(run_job(options.precision, workers, storage, f"{workers}-{number}"))
            shown = "  ".join(f"{k} {r[-1]['images_per_second']:.1f}" for k, r in results.items())
            print(f"round {number + 1}: {shown} images/s", flush=True)
    print(f"\n{FILTERS} filters, {SIZE} px, batch {BATCH}, {options.precision}, {os.cpu_count()} cores: medians")
    for kind in kinds:
        speed = statistics.median(r["images_per_second"] for r in results[kind])
        first = statistics.median(r["first_step"] for r in results[kind])
        pairs = zip(results[kind], results["bare"], strict=True)
        ratio = statistics.median(a["images_per_second"] / b["images_per_second"] for a, b in pairs)
        print(f"{kind:>9}  {speed:6.1f} images/s  ratio {ratio:.3f}  first step after {first:.1f} s")


if __name__ == "__main__":
    main()
