"""A worker of Ray Train: TensorFlow is started, peers are joined, and the loop runs to its end."""

import os

import ray

from unet.errors import StepFailed, StorageFailed, first_line
from unet.training.loop import Loop
from unet.training.monitor import Line


def train_worker(config: dict) -> None:
    """Run the `Job` of `config["job"]` on this worker of Ray Train."""
    job = config["job"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    line = Line(job.monitor, job.run, rank)
    ray.get(job.monitor.event.remote("worker", ray.get_runtime_context().get_node_id()))
    line.event("start", world_size)
    try:
        strategy = start_tensorflow(job.threads, world_size)

        from unet.training.learner import Learner  # imports TensorFlow, whose threads are set now

        learner = Learner(job.settings, len(job.classes), rank, world_size, strategy)
        reader = ray.train.get_dataset_shard("train").reader()
        loop = Loop(job, learner, reader, line, rank, world_size)
        if loop.train(ray.train.report) and job.score_test:
            loop.test()
    except StorageFailed as error:
        # Told, not raised: what a worker raises may start all of them again, and they would end here again.
        line.event("storage_failed", str(error))
    except Exception as error:
        if not type(error).__module__.startswith("tensorflow"):
            raise
        raise StepFailed(f"{type(error).__name__}: {first_line(error)}") from None


def start_tensorflow(threads: int, world_size: int):
    """Import TensorFlow with its threads set, and join the other workers; None if there are none."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    return tf.distribute.MultiWorkerMirroredStrategy() if world_size > 1 else None
