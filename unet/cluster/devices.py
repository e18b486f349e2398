"""TensorFlow's start on the devices that a process was given."""

import contextlib
from collections.abc import Iterator

from unet import environment
from unet.errors import NoGpu


def start_tensorflow(threads: int, use_gpu: bool = False, deterministic: bool = False) -> None:
    """Import TensorFlow and set it up, before it runs anything, in a process that is entirely ours.

    It sees the one GPU that the process was given, or none: Ray does not hide GPUs from processes that it gave none.
    Float32 is float32, not TF32, TensorFlow's default on GPUs that have it. With `deterministic` only operations that
    repeat bit for bit are used.

    Raises:
        NoGpu: the GPU is not visible, or others are too.
    """
    environment.pin()
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    tf.config.set_visible_devices(_given(tf.config.list_physical_devices("GPU")) if use_gpu else [], "GPU")
    for gpu in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def _given(gpus: list) -> list:
    """The visible GPUs, if they are the one that was given."""
    if not gpus:
        raise NoGpu(
            "A process was given a GPU, but TensorFlow sees none: install the `gpu` extra with its dependencies where "
            "it runs (pip install -e '.[gpu]', without --no-deps, and NVIDIA's driver), or give --device cpu."
        )
    if len(gpus) > 1:
        raise NoGpu(
            f"A process was given one GPU, but TensorFlow sees {len(gpus)}: unset "
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES and RAY_TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES where Ray is "
            "started, or give --device cpu."
        )
    return gpus


def device_name() -> str:
    """The device of TensorFlow in this process: "cpu", or the GPU's name and its compute capability."""
    import tensorflow as tf

    gpus = tf.config.get_visible_devices("GPU")
    if not gpus:
        return "cpu"
    details = tf.config.experimental.get_device_details(gpus[0])
    capability = ".".join(map(str, details.get("compute_capability", ())))
    return f"{details.get('device_name', 'GPU')} {capability}".strip()


@contextlib.contextmanager
def float32_exactly() -> Iterator[None]:
    """No TF32 for the duration of the block, in a process whose TensorFlow is not ours to set up."""
    import tensorflow as tf

    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
