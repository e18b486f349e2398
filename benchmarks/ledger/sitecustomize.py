"""Writes down which samples enter the training steps; Python imports it where this folder is on the PYTHONPATH.

With UNET_LEDGER naming a folder, every process leaves a file `processes/<pid>` there, and every worker of a training a
line in `<pid>.jsonl` when a step begins (with a digest of each row) and one when it was applied with finite numbers. A
worker that is killed between the two may have given its rows to a step that the others applied.

For the tests and benchmarks that kill processes: nothing of the product knows of it.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from hashlib import blake2b
from pathlib import Path

WATCHED = "unet.recipe.step"
PADDING = "padding"


class Finder(importlib.abc.MetaPathFinder):
    """Has the learner's module watched as soon as it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_watch(module):
            execute(module)
            watch(module.Learner)

        spec.loader.exec_module = execute_and_watch
        return spec


def watch(learner_class) -> None:
    train_step = learner_class.train_step

    def watched(self, images, masks, step, *args, **kwargs):
        import ray

        # Every start of the workers has a placement group of its own.
        start = ray.get_runtime_context().get_placement_group_id()
        common = {"start": start, "rank": self.rank, "world": self.world_size, "step": step}
        rows = [digest(image, mask) for image, mask in zip(images, masks, strict=True)]
        write(common | {"rows": rows, "pixels": hashed(images, masks)})
        result = train_step(self, images, masks, step, *args, **kwargs)
        if result.finite:
            write(common | {"loss": result.loss})
        return result

    learner_class.train_step = watched


def digest(image, mask) -> str:
    """Of a sample, the same for its mirror image."""
    if not image.any() and (mask == 255).all():
        return PADDING
    return min(hashed(image, mask), hashed(image[:, ::-1], mask[:, ::-1]))


def hashed(*arrays) -> str:
    return blake2b(b"".join(array.tobytes() for array in arrays), digest_size=8).hexdigest()


def write(line: dict) -> None:
    """One call of the system for a whole line, so that a kill falls before or after it."""
    text = json.dumps(line | {"time": time.time(), "pid": os.getpid()}) + "\n"
    handle = os.open(FOLDER / f"{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)


if os.environ.get("UNET_LEDGER"):
    FOLDER = Path(os.environ["UNET_LEDGER"])
    (FOLDER / "processes").mkdir(parents=True, exist_ok=True)
    (FOLDER / "processes" / str(os.getpid())).touch()
    sys.meta_path.insert(0, Finder())
