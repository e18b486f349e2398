"""Whether a GPU of this machine trains and scores as its CPU does: about five minutes, no network.

    python benchmarks/gpu_check.py [--device cpu]

Prints a table to paste into a report. TensorFlow must see the GPU; one step's gradients (float32 and mixed precision)
and the counts of an evaluation must be those of the CPU within bounds; a training with --deterministic must end with
the same bits where its worker is killed on the way; two workers on two GPUs, if there are two, must learn what one
does. Exit code 0: all of it is so; 1: something is not; 2: TensorFlow sees no GPU. `--device cpu` runs every check on
one thread of the CPU against all of them: it tries the script, not the machine.

The bounds: on CPUs, gradients of float32 in another order differ by 1e-6, of float16 by 2e-2, of bfloat16 by 7e-2. TF32
has the mantissa of float16, so it would not pass for float32.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import psutil
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "gpu": {"image_size": 128, "base_filters": 16, "batch_size": 8},
    "cpu": {"image_size": 32, "base_filters": 8, "batch_size": 8},  # float16 is slow there
}
STEPS, IMAGES = 20, 64
"""On the CPU before anything is compared; images of the evaluation."""
GRADIENTS = {"float32": 1e-4, "mixed_float16": 0.05, "mixed_bfloat16": 0.2}
"""The most that gradients may differ from the CPU's in float32: the norm of the difference over their own."""
COUNTS, LOSS, LEARNT = 1e-4, 1e-5, 1e-3
"""The most that an evaluation may count otherwise (a share of the pixels), differ in its loss, and a training in its
first epoch's loss (relative)."""
SPEED_SECONDS = {"gpu": 8, "cpu": 1}
LARGE = {"gpu": {"base_filters": 64, "batch_size": 32}, "cpu": {}}
"""The network whose speed is measured."""
TRAINING = {
    "recipe": "reference",
    **{"data": "synthetic:400", "image_size": 64, "base_filters": 8, "batch_size": 16, "epochs": 12},
    **{"grad_shards": 2, "checkpoint_every": 5, "deterministic": None},
}
NO_GPU = (
    "TensorFlow sees no GPU: install the `gpu` extra with its dependencies (pip install -e '.[gpu]') beside NVIDIA's "
    "driver; --device cpu tries the checks without one."
)


@dataclass(frozen=True)
class Check:
    """A row of the table."""

    what: str
    found: str
    bound: str
    passed: bool


def within(what: str, found: float, bound: float) -> Check:
    return Check(what, f"{found:.2g}", f"at most {bound:g}", bool(found <= bound))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task = json.loads(options.task)
        see(task) if task["kind"] == "see" else compute(task)
        return 0
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        devices = run_checks(checks, Path(folder), options.device)
    table = Table("check", "found", "asked for", "", box=MARKDOWN)
    for check in checks:
        table.add_row(check.what, check.found, check.bound, "yes" if check.passed else "NO")
    console = Console(highlight=False, width=150)
    console.print(table)
    if not devices:
        print(f"error: {NO_GPU}", file=sys.stderr)
        return 2
    failed = sum(not check.passed for check in checks)
    console.print(f"{failed} of {len(checks)} checks failed." if failed else f"All {len(checks)} checks passed.")
    return 1 if failed else 0


def run_checks(checks: list[Check], folder: Path, device: str) -> int:
    """Append what is found; the number of devices."""
    found = in_process(folder / "seen.json", kind="see", device=device)
    about = json.loads(found.read_text())
    versions = f"TensorFlow {about['tensorflow']}, CUDA {about['cuda']}, cuDNN {about['cudnn']}"
    names = ", ".join(about["names"]) or "none"
    checks.append(Check(f"TensorFlow sees a {device.upper()} ({versions})", names, "one or more", bool(about["names"])))
    if about["names"]:
        numbers(checks, folder, device, about["precisions"])
        trainings(checks, folder, device, len(about["names"]))
    return len(about["names"])


def in_process(output: Path, **task) -> Path:
    """Do a task in a process of its own, which sees the first GPU only; what it has written."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": first} if task["kind"] == "compute" else {})
    env |= {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, __file__, "--task", json.dumps(task | {"output": str(output)})]
    done = subprocess.run(command, env=env, capture_output=True, text=True)  # TensorFlow says much
    if done.returncode:
        raise SystemExit(done.stderr)
    return output


def see(task: dict) -> None:
    """The devices of a kind, and what TensorFlow was built with."""
    import tensorflow as tf

    build, names, precisions = tf.sysconfig.get_build_info(), [], list(GRADIENTS)
    for device in tf.config.list_physical_devices(task["device"].upper()):
        details = tf.config.experimental.get_device_details(device) if task["device"] == "gpu" else {}
        capability = details.get("compute_capability", ())
        names.append(" ".join([details.get("device_name", "CPU"), ".".join(map(str, capability))]).strip())
        if capability and capability < (8, 0):
            precisions = [precision for precision in precisions if precision != "mixed_bfloat16"]
    about = {"names": names * 2 if task["device"] == "cpu" else names, "precisions": precisions}
    about |= {"tensorflow": tf.__version__, "cuda": build.get("cuda_version"), "cudnn": build.get("cudnn_version")}
    Path(task["output"]).write_text(json.dumps(about))


def compute(task: dict) -> None:
    """Gradients and an evaluation with the weights of `task["weights"]`, or with those of a few steps from here."""
    from unet.cluster.devices import start_tensorflow
    from unet.config import TrainSettings, unflat
    from unet.data.synthetic import draw_pet

    start_tensorflow(task["threads"], task["use_gpu"])
    from unet.recipe.step import Learner

    settings, device = SETTINGS[task["device"]], task["device"]
    side, size = settings["image_size"], settings["batch_size"]
    images, masks = (np.stack(part) for part in zip(*(draw_pet(i, side) for i in range(IMAGES)), strict=True))
    batches = [(images[i : i + size], masks[i : i + size]) for i in range(0, IMAGES, size)]

    def learner_of(precision: str, weights: list[np.ndarray] | None, **changes) -> Learner:
        learner = Learner(unflat(TrainSettings, settings | {"precision": precision} | changes).recipe(3))
        if weights:
            learner.model.set_weights(weights)
        return learner

    learner = learner_of("float32", None)
    if task["weights"]:
        saved = np.load(task["weights"])
        learner.model.set_weights([saved[f"weight/{i:03d}"] for i in range(len(learner.model.weights))])
    for step in range(1, 1 if task["weights"] else STEPS + 1):
        learner.train_step(*batches[step % len(batches)], step)
    weights = learner.model.get_weights()
    results = {f"weight/{i:03d}": weight for i, weight in enumerate(weights)}
    counts, losses = zip(*(learner.evaluate(*batch) for batch in batches), strict=True)
    results |= {"counts": sum(counts), "loss": np.float64(sum(losses))}
    results["classes"] = np.concatenate([learner.predict(batch) for batch, _ in batches])
    for precision in task["precisions"]:
        gradients = learner_of(precision, weights).gradients(*batches[0], STEPS + 1)
        results[f"gradients/{precision}"] = np.concatenate([g.ravel() for g in gradients])
        if task["timed"]:
            learner = learner_of(precision, None, **LARGE[device])
            results[f"speed/{precision}"] = np.float64(speed(learner, images, masks, SPEED_SECONDS[device]))
    np.savez(task["output"], **results)


def speed(learner, images: np.ndarray, masks: np.ndarray, seconds: float) -> float:
    """Images/s of training steps alone, after three of them."""
    size = learner.settings.training.batch_size
    batch = np.resize(images, (size, *images.shape[1:])), np.resize(masks, (size, *masks.shape[1:]))
    for step in range(1, 4):
        learner.train_step(*batch, step)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        step += 1
        learner.train_step(*batch, step)
    return (step - 3) * size / (time.perf_counter() - began)


def numbers(checks: list[Check], folder: Path, device: str, precisions: list[str]) -> None:
    """Gradients, evaluation and speed on the device, against the CPU's in float32."""
    on_gpu, every = device == "gpu", os.cpu_count()
    common = {"kind": "compute", "device": device, "weights": None, "timed": False}
    reference = common | {"use_gpu": False, "threads": every, "precisions": ["float32"]}
    cpu = np.load(in_process(folder / "cpu.npz", **reference))
    tested = common | {"use_gpu": on_gpu, "threads": every if on_gpu else 1, "precisions": precisions}
    tested |= {"weights": str(folder / "cpu.npz"), "timed": True}
    own = np.load(in_process(folder / "own.npz", **tested))
    exact = cpu["gradients/float32"]
    for precision in precisions:
        off = np.linalg.norm(own[f"gradients/{precision}"] - exact) / np.linalg.norm(exact)
        checks.append(within(f"a step's gradients, {precision}, differ from the CPU's by", off, GRADIENTS[precision]))
    otherwise = np.abs(own["counts"] - cpu["counts"]).sum() / 2 / cpu["counts"].sum()
    checks.append(within(f"an evaluation of {IMAGES} images counts otherwise, a share of", otherwise, COUNTS))
    differ = np.count_nonzero(own["classes"] != cpu["classes"]) / cpu["classes"].size
    checks.append(within("pixels of another class, a share of", differ, COUNTS))
    checks.append(within("its loss differs by", abs(own["loss"] - cpu["loss"]) / cpu["loss"], LOSS))
    timed = SETTINGS[device] | LARGE[device]
    shape = f"{timed['base_filters']} filters, batch {timed['batch_size']}, {timed['image_size']} px"
    for precision in precisions:
        rate = float(own[f"speed/{precision}"])
        checks.append(Check(f"images/s of steps, {precision}, {shape}", f"{rate:.1f}", "more than 0", rate > 0))


def trainings(checks: list[Check], folder: Path, device: str, devices: int) -> None:
    """A training, the same whose worker is killed, and one of two workers."""
    storage = folder / "runs"
    whole = start(storage, "whole", device, 1)
    if not ended_well(checks, "a training with --deterministic ends well", whole):
        return
    rate = summary_of(storage, "whole")["images_per_second"]
    checks.append(Check("images/s of this training (8 filters, 64 px)", f"{rate:.1f}", "more than 0", rate > 0))
    killed = start(storage, "killed", device, 1)
    kill_a_worker(killed, storage / "killed")
    if ended_well(checks, "it goes on by itself when its worker is killed", killed):
        again = summary_of(storage, "killed")["restarts"]
        checks.append(Check("its workers were started again", str(again), "once", again == 1))
        same = last_weights(storage / "whole") == last_weights(storage / "killed")
        checks.append(Check("and it ends with the same bits", "the same" if same else "others", "the same", same))
    if devices < 2:
        return
    two = start(storage, "two", device, 2)
    if ended_well(checks, f"two workers train on two {device.upper()}s", two):
        one, both = first_loss(storage / "whole"), first_loss(storage / "two")
        checks.append(within("and their first epoch's loss differs from one's by", abs(both - one) / one, LEARNT))


def start(storage: Path, name: str, device: str, workers: int) -> subprocess.Popen:
    """A training under way on a Ray of its own."""
    flags = TRAINING | {"storage_path": storage, "run_name": name, "device": device, "num_workers": workers}
    given = [f"--{k.replace('_', '-')}" + ("" if v is None else f"={v}") for k, v in flags.items()]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *given]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended_well(checks: list[Check], what: str, process: subprocess.Popen) -> bool:
    """Wait for the end of a training; what it printed is shown where it did not end well."""
    output, _ = process.communicate()
    if process.returncode:
        print(output)
    checks.append(Check(what, f"exit code {process.returncode}", "0", process.returncode == 0))
    return process.returncode == 0


def kill_a_worker(process: subprocess.Popen, run: Path) -> None:
    """By SIGKILL, as soon as the run has a checkpoint inside an epoch."""
    while process.poll() is None and not any(run.glob("checkpoints/step_*/COMMIT")):
        time.sleep(0.05)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended by itself
            if "RayTrainWorker" in " ".join(child.cmdline()):
                child.kill()
                return


def summary_of(storage: Path, name: str) -> dict:
    return json.loads((storage / name / "summary.json").read_text())


def first_loss(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]


def last_weights(run: Path) -> dict[str, bytes]:
    """The bytes of each array of the run's last checkpoint."""
    found: dict[str, bytes] = {}
    last = max(run.glob("checkpoints/step_*"))
    with h5py.File(last / "model.weights.h5") as file:
        file.visititems(lambda name, item: found.update({name: item[()].tobytes()} if hasattr(item, "shape") else {}))
    return found


if __name__ == "__main__":
    sys.exit(main())
