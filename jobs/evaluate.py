"""Score a trained model on a split: IoU and Dice by class.

python jobs/evaluate.py --model RUN_NAME --data synthetic --split test
"""

import json
from pathlib import Path

from unet import cli
from unet.config import EvaluateSettings


def run(settings: EvaluateSettings) -> None:
    from unet.evaluation.score import evaluate
    from unet.report import score_table
    from unet.session import ray_session
    from unet.terminal import Display

    part, display = settings.evaluate, Display()
    with ray_session(settings.door.debug):
        try:
            result = evaluate(settings, display)
        finally:
            display.close()
    display.console.print(score_table(f"{part.model} on {part.split}", result))
    if "own_size" in result:
        display.console.print(score_table("At each photo's own size", result["own_size"]))
    if part.output:
        Path(part.output).mkdir(parents=True, exist_ok=True)
        target = Path(part.output) / "metrics.json"
        target.write_text(json.dumps(result, indent=2))
        display.say(f"Written: {target}")


if __name__ == "__main__":
    cli.main(EvaluateSettings, run, __doc__)
