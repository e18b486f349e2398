"""What the bits of a training depend on beside its settings and data, as a checkpoint keeps it."""

import platform

import numpy as np

from unet.cluster.devices import device_name
from unet.config import TrainSettings


def equality_of(settings: TrainSettings, world_size: int, threads: int) -> dict:
    """What must be the same for a continuation to be bit-equal, of this process, whose TensorFlow is started."""
    import keras
    import tensorflow as tf

    return {
        "num_workers": world_size,
        "threads": threads,
        "precision": settings.training.precision,
        "processor": processor(),
        "device": device_name(),
        "op_determinism": settings.compute.deterministic,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
    }


def processor() -> str:
    """The kind of processor, as far as the system says."""
    try:
        with open("/proc/cpuinfo") as info:
            lines = dict(line.split(":", 1) for line in info.read().split("\n\n")[0].splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in lines.items()}
        return " ".join(fields.get(k, "") for k in ("model name", "cpu family", "model", "stepping")).strip()
    except OSError:
        return platform.processor() or platform.machine()
