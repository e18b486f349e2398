"""Compare runs: scores, paired differences, settings that differ and curves, on one page. Or the trials of a sweep.

examples:
    python jobs/compare.py RUN_NAME ANOTHER
    python jobs/compare.py SWEEP
"""

from unet.commands import cli
from unet.config.compare import CompareSettings


def run(settings: CompareSettings) -> None:
    from unet.comparison import outcome, tables
    from unet.comparison.run import compare_runs
    from unet.terminal import Display

    display = Display()
    try:
        done = compare_runs(settings, display)
    finally:
        display.close()
    outcome.write(done)
    tables.show(display.console, done)
    display.say(f"Written to {done.folder}: {outcome.PAGE}")
    if settings.compare.track:
        outcome.track(done, settings.store, display)


def main() -> None:
    cli.main(CompareSettings, run, __doc__)
