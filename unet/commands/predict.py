"""Segment photos of any size with a trained model: masks, overlays, and a table of areas.

examples:
    python jobs/predict.py --model RUN_NAME --input FOLDER --output DIR
    python jobs/predict.py --model RUN_NAME --input 'photos/**/*.jpg' --output DIR --tta
    python jobs/predict.py --model RUN_NAME --input FOLDER --as-dataset DIR     masks to correct
    python jobs/predict.py --model models:/NAME@champion --input s3://IN --output s3://OUT
"""

import shlex

from unet.commands import cli
from unet.config import PredictSettings


def run(settings: PredictSettings) -> int:
    from unet.cluster.session import ray_session
    from unet.disk import at_the_door
    from unet.models.trained import located
    from unet.prediction.job import photos_of, predict
    from unet.runs.run import called
    from unet.storage import Folder
    from unet.terminal import Display

    display, photos = Display(), photos_of(settings)
    with at_the_door():
        located(settings.predict.model, Folder(settings.store.storage_path))  # a typo is reported before Ray starts
    with ray_session(settings.command.debug), cli.work_is_kept(display):
        summary = predict(settings, photos, display)
    output = Folder(settings.predict.folder)
    counts = {"predicted": summary.done, "done earlier": summary.before, "skipped": summary.bad}
    rows = [("photos", ", ".join(f"{n:,} {words}" for words, n in counts.items() if n or words == "predicted"))]
    if summary.speed:
        rows.append(("speed", f"{summary.speed:.1f} images/s, after a start of {summary.startup:.1f} s"))
    rows.append(("masks", f"{output}/masks"))
    if settings.predict.overlays:
        rows.append(("overlays", f"{output}/overlays"))
    if settings.predict.probabilities:
        rows.append(("probabilities", f"{output}/probabilities"))
    rows.append(("table", f"{output}/predictions.csv"))
    if settings.predict.as_dataset:
        further = f"{called('train')} --data {shlex.quote(output.typed())} --init-from {settings.predict.model}"
        rows.append(("next", f"correct {output}/masks, then {further}"))
    if summary.bad:
        rows.append(("retry", "the same command tries skipped photos again, and adds new ones"))
    display.table("Predictions", rows)
    return cli.DONE if summary.done + summary.before else cli.FAILED


def main() -> None:
    cli.main(PredictSettings, run, __doc__)
