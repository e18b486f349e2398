"""What the driver hands to every worker of a run."""

import time
from dataclasses import dataclass, field

import ray

from unet.classes import Classes
from unet.config import TrainSettings


@dataclass(frozen=True, repr=False)  # Ray shows it in its dashboard as text, and settings hold secrets
class Job:
    """What a worker is to do.

    Attributes:
        settings: of the run.
        public_settings: the same, flat, without passwords: what may be written down.
        run: URI of the run's folder.
        threads: TensorFlow threads of this worker.
        data_digest: of the prepared data.
        classes: of the prepared data.
        checkpoint: name of the one to go on from; None at a run's beginning.
        fencing_token: of this group of workers: with another in the run's folder it may not write there any more.
            None where no other group can be (a trial of a sweep).
        link: handle of the `DriverLink`.
        score_test: whether the run ends with the test split (a trial of a sweep does not).
        use_gpu: whether this worker was given a GPU.
        start: an object of Ray with the weights to begin with, by name; None: those that are drawn, or a checkpoint's.
        began: when this group of workers was started, in seconds since 1970.
    """

    settings: TrainSettings
    public_settings: dict
    run: str
    threads: int
    data_digest: str
    classes: Classes
    checkpoint: str | None
    fencing_token: str | None
    link: ray.actor.ActorHandle
    score_test: bool = True
    use_gpu: bool = False
    start: ray.ObjectRef | None = None
    began: float = field(default_factory=time.time)
