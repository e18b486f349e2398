"""Score trained models on a split, with the uncertainty of every score.

python jobs/evaluate.py --model RUN_NAME --data synthetic --split test
python jobs/evaluate.py --model ONE_RUN,ANOTHER --data FOLDER
"""

from unet import cli
from unet.config import EvaluateSettings


def run(settings: EvaluateSettings) -> None:
    from unet.evaluation import outcome, tables
    from unet.evaluation.run import evaluate
    from unet.session import ray_session
    from unet.terminal import Display

    display = Display()
    with ray_session(settings.door.debug):
        try:
            found = evaluate(settings, display)
        finally:
            display.close()
    for done in found:
        tables.show(display.console, f"{done.label} on {done.split}", done.metrics)
    if len(found) > 1:
        tables.show_comparison(display.console, found[0].metrics["comparison"])
    for done in found:
        outcome.keep(done, settings, display, alone=len(found) == 1)


if __name__ == "__main__":
    cli.main(EvaluateSettings, run, __doc__)
