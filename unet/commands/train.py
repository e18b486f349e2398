"""Train a U-Net on Ray's workers, tracked in MLflow.

examples:
    python jobs/train.py --data synthetic --num-workers 2      on this machine
    python jobs/train.py --resume RUN_NAME                     continue a run
    python jobs/train.py --reproduce RUN_NAME                  train it again and compare the numbers
    python jobs/train.py --sync RUN_NAME                       send MLflow what it missed
    ray job submit --working-dir . -- python jobs/train.py …   on a cluster
"""

import time

STARTED = time.time()

from unet.commands import cli  # noqa: E402
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


def main() -> None:
    cli.main(TrainSettings, run, __doc__)
