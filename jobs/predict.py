"""Segment photos of any size with a trained model: masks, overlays, and a table of areas.

python jobs/predict.py --model RUN_NAME --input FOLDER --output DIR
python jobs/predict.py --model RUN_NAME --input 'photos/**/*.jpg' --output DIR --tta
python jobs/predict.py --model models:/NAME@champion --input s3://bucket/photos --output s3://bucket/masks
"""

from unet import cli
from unet.config import PredictSettings


def run(settings: PredictSettings) -> int:
    from unet.cluster.session import ray_session
    from unet.models.trained import located
    from unet.prediction.job import photos_of, predict
    from unet.storage import Folder
    from unet.terminal import Display

    display, photos = Display(), photos_of(settings)
    located(settings.predict.model, Folder(settings.store.storage_path))  # a typo is told before Ray starts
    with ray_session(settings.command.debug):
        try:
            summary = predict(settings, photos, display)
        except KeyboardInterrupt:
            display.close()
            display.say("What is done is kept: the same command goes on from here.")
            raise
        finally:
            display.close()
    output = Folder(settings.predict.output)
    counts = {"predicted": summary.done, "done before": summary.before, "skipped": summary.bad}
    rows = [
        ("photos", ", ".join(f"{count:,} {words}" for words, count in counts.items() if count or words == "predicted")),
        *(
            [("speed", f"{summary.speed:.1f} images/s, after {summary.startup:.1f} s of start")]
            if summary.speed
            else []
        ),
        ("masks", f"{output}/masks"),
        *([("overlays", f"{output}/overlays")] if settings.predict.overlays else []),
        *([("probabilities", f"{output}/probabilities")] if settings.predict.probabilities else []),
        ("table", f"{output}/predictions.csv"),
    ]
    if summary.bad:
        rows.append(("again", "the same command tries what was skipped, and what is new"))
    display.table("Predictions", rows)
    return cli.DONE if summary.done + summary.before else cli.FAILED


if __name__ == "__main__":
    cli.main(PredictSettings, run, __doc__)
