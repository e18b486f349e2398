"""Train a U-Net on Ray's workers, tracked in MLflow.

examples:
    python jobs/train.py --data synthetic --num-workers 2      on this machine
    python jobs/train.py --data FOLDER --report --export onnx  with a report and an ONNX file
    python jobs/train.py --resume RUN_NAME                     continue a run
    python jobs/train.py --reproduce RUN_NAME                  train it again, and compare
    python jobs/train.py --sync RUN_NAME                       send MLflow what it missed
    ray job submit --working-dir . -- python jobs/train.py …   on a cluster
"""

import time

STARTED = time.time()

from collections.abc import Callable  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from unet.commands import cli, evaluate, export  # noqa: E402
from unet.config import EvaluateSettings, ExportSettings, TrainSettings, unflat  # noqa: E402
from unet.errors import InputError, RunFailed, first_line  # noqa: E402

if TYPE_CHECKING:
    from unet.runs.run import Run
    from unet.terminal import Display


def run(settings: TrainSettings) -> int:
    from unet.cluster.session import ray_session
    from unet.supervise import results
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
        if summary["status"] == "stopped":
            return cli.STOPPED
        made = _made_of(opened, display)
    results.show(opened, display, made)
    if settings.run.register:
        register_run(summary, settings.run, display)
    return cli.DONE if len(made) == settings.run.report + bool(settings.run.export) else cli.FAILED


def _made_of(run: "Run", display: "Display") -> dict[str, str]:
    """What --report and --export make of a finished run, and where it is. What fails is not in it, but said."""
    from unet.evaluation.output import PAGE
    from unet.packaging.export import Disagreement
    from unet.runs.run import called, where

    settings, found = run.settings, {}
    part, split = settings.run, "test" if run.summary["test"]["images"] else "val"
    values: dict[str, Any] = {"model": run.name, "storage_path": part.storage_path, "tracking_uri": part.tracking_uri}
    values["debug"] = settings.command.debug
    jobs: dict[str, tuple[Callable[[], str], str, str]] = {}
    if part.report:
        scoring = unflat(EvaluateSettings, values | {"split": split, "device": settings.compute.device})
        jobs["report"] = lambda: f"{evaluate.score(scoring, display)[0]}/{PAGE}", "evaluate", f"--split {split}"
    if part.export:
        handing_on = unflat(ExportSettings, values | {"formats": part.export})
        jobs["export"] = lambda: str(export.write(handing_on, display)), "export", f"--formats {' '.join(part.export)}"
    for what, (make, command, flags) in jobs.items():
        try:
            found[what] = make()
        except Exception as error:  # whatever it is: the run is finished, and the rest is made
            known = isinstance(error, InputError | RunFailed)
            if isinstance(error, Disagreement) and error.agreeing:  # the same forms would fail again
                flags = f"--formats {' '.join(error.agreeing)}"
            reason = str(error).rstrip(".") if known else f"{type(error).__name__}: {first_line(error)}"
            display.say(
                f"The run {run.name} is finished, but it has no {what} yet: {reason}. Make it later: "
                f"{called(command)} {flags} --model {run.name}{where(part)}",
                "yellow",
            )
    return found


def main() -> None:
    cli.main(TrainSettings, run, __doc__)
