"""Train a U-Net on several workers of Ray, tracked in MLflow.

python jobs/train.py --data synthetic --num-workers 2          on this machine
python jobs/train.py --resume RUN_NAME                         continue a run
python jobs/train.py --sync RUN_NAME                           send to MLflow what an outage kept back
ray job submit --working-dir . -- python jobs/train.py …       on a cluster
"""

import time

STARTED = time.time()

from unet import cli  # noqa: E402
from unet.config import TrainSettings  # noqa: E402


def run(settings: TrainSettings) -> int:
    from unet.cluster.session import ray_session
    from unet.supervise.driver import train
    from unet.supervise.preflight import open_run
    from unet.terminal import Display
    from unet.tracking.registry import register_run
    from unet.tracking.send import sync

    if settings.run.sync:
        sync(settings, Display())
        return cli.DONE
    opened, display = open_run(settings), Display()
    with ray_session(settings.command.debug):
        summary = train(opened, display, started=STARTED)
    if settings.run.register and summary["status"] == "finished":
        register_run(summary, settings.run, display)
    return cli.STOPPED if summary["status"] == "stopped" else cli.DONE


if __name__ == "__main__":
    cli.main(TrainSettings, run, __doc__)
