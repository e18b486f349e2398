"""A worker of Ray Train: TensorFlow is started, peers are joined, and the loop runs to its end."""

import contextlib
import socket

import ray
import ray.train

from unet.cluster.devices import start_tensorflow
from unet.data.ingest import WorkerShard
from unet.errors import NoGpu, StepFailed, StorageFailed, first_line
from unet.remote import patience
from unet.training.backend import join_workers
from unet.training.begin import begin
from unet.training.finish import finish
from unet.training.job import Job
from unet.training.link import WorkerLink
from unet.training.loop import FirstCannotWrite, Loop
from unet.training.sampler import sampling
from unet.training.shown import show


def train_worker(config: dict) -> None:
    """Run the `Job` of `config["job"]` on this worker of Ray Train, on streamed data where `config["streamed"]`."""
    job = config["job"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    link = WorkerLink(job.link, job.run, rank)
    place = (rank, ray.get_runtime_context().get_node_id(), socket.gethostname())
    ray.get(job.link.event.remote("worker", place))
    link.event("start", world_size)
    # One worker a node, and none of a sweep's trials, which share their nodes.
    samples = job.score_test and context.get_local_rank() == 0
    told = patience(tell=lambda words: link.event("waiting", words))
    with told, sampling(link.sample) if samples else contextlib.nullcontext():
        _train(job, link, rank, world_size, config["streamed"])


def _train(job: Job, link: WorkerLink, rank: int, world_size: int, streamed: bool) -> None:
    try:
        start_tensorflow(job.threads, job.use_gpu, job.settings.compute.deterministic)
        strategy = join_workers(job.use_gpu) if world_size > 1 else None

        from unet.recipe.step import Learner

        recipe = job.settings.recipe(len(job.classes))
        learner = Learner(recipe, rank, world_size, strategy, ray.get(job.start) if job.start else None)
        if streamed:
            shard = ray.train.get_dataset_shard("train")
        else:
            reading: ray.ObjectRef = ray.get(job.link.reading.remote())[0]
            shard = WorkerShard(ray.get(reading), rank, world_size)
        loop = Loop(job, learner, shard.reader(), link, rank, world_size)
        begin(loop)

        def report(record: dict) -> None:
            ray.train.report(record)
            show(loop, record["epoch"])

        if loop.train(report) and job.score_test:
            finish(loop)
    except FirstCannotWrite:
        pass
    except (StorageFailed, NoGpu) as error:
        # Told, by whomever, and not raised: the driver ends all of them, and would start them again otherwise.
        kind = "no_gpu" if isinstance(error, NoGpu) else "storage_failed"
        ray.get(job.link.event.remote(kind, str(error)))
    except Exception as error:
        if not type(error).__module__.startswith("tensorflow"):
            raise
        raise StepFailed(f"{type(error).__name__}: {first_line(error)}") from None
