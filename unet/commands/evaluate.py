"""Score trained models on a split, with the uncertainty of every score.

examples:
    python jobs/evaluate.py --model RUN_NAME --split test
    python jobs/evaluate.py --model ONE_RUN,ANOTHER --data FOLDER
"""

from typing import TYPE_CHECKING

from unet.commands import cli
from unet.config import EvaluateSettings

if TYPE_CHECKING:
    from unet.storage import Folder
    from unet.terminal import Display


def run(settings: EvaluateSettings) -> None:
    from unet.terminal import Display

    score(settings, Display())


def score(settings: EvaluateSettings, display: "Display") -> "list[Folder]":
    """Score, write, show and track; where the results of each model are.

    Raises:
        InputError, RunFailed: as `unet.evaluation.run.evaluate` does.
    """
    from unet.evaluation.output import check_settings

    check_settings(settings)
    from unet.cluster.session import ray_session
    from unet.evaluation import outcome, tables
    from unet.evaluation.run import evaluate

    with ray_session(settings.command.debug):
        try:
            found = evaluate(settings, display)
        finally:
            display.close()
    for done in found:  # before anything is shown or sent, so that no failure there loses the scores
        outcome.write(done, display)
    for done in found:
        tables.show(display.console, f"{done.label} on {done.split}", done.metrics)
    if len(found) > 1:
        tables.show_comparison(display.console, found[0].metrics["comparison"])
    for done in found:
        display.say(f"Written to {done.folder}: {', '.join(outcome.FILES)}")
        if settings.evaluate.track:
            outcome.track(done, settings, display)
    return [done.folder for done in found]


def main() -> None:
    cli.main(EvaluateSettings, run, __doc__)
