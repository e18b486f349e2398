"""Search settings with Ray Tune: every trial is a training, and bad ones stop early.

examples:
    python jobs/tune.py --data synthetic --space quick --num-samples 8 --epochs 4
    python jobs/tune.py --resume SWEEP                 continue a sweep that was stopped
    python jobs/tune.py --resume SWEEP --extend 10     add trials to a finished one
"""

from unet.commands import cli
from unet.config import TuneSettings


def run(settings: TuneSettings) -> int:
    from unet.cluster.session import ray_session
    from unet.terminal import Display
    from unet.tuning.runner import run_sweep
    from unet.tuning.sweep import open_sweep

    sweep = open_sweep(settings)
    # Without the dashboard Ray Train never frees the resources of a trial of several workers that was stopped early.
    with ray_session(settings.command.debug, dashboard=True):
        summary = run_sweep(sweep, Display())
    return cli.STOPPED if summary["status"] == "stopped" else cli.DONE


def main() -> None:
    cli.main(TuneSettings, run, __doc__)
