"""Search settings with Ray Tune: every trial is a training, bad ones stop early.

python jobs/tune.py --data synthetic --space quick --num-samples 8 --epochs 4
"""

from unet import cli
from unet.config import TuneSettings


def run(settings: TuneSettings) -> None:
    from unet.session import ray_session
    from unet.terminal import Display
    from unet.tuning import sweep

    with ray_session(settings.door.debug):
        sweep(settings, Display())


if __name__ == "__main__":
    cli.main(TuneSettings, run, __doc__)
