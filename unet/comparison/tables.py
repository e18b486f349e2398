"""A comparison in the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unet.comparison.pairs import best_of
from unet.comparison.run import Comparison
from unet.comparison.runs import differing
from unet.evaluation.tables import framed
from unet.pages.numbers import ABSENT, percent, score

FEW_PAIRS = 6
"""Of more pairs only those of the best run are shown here; the page has all."""


def show(console: Console, done: Comparison) -> None:
    """Its tables, and what they come to, in sentences."""
    console.print(_runs(done))
    if settings := differing(done.runs):
        console.print(_settings(done, settings))
    if done.sweep:
        if done.sweep.importance:
            console.print(_importance(done))
        console.print(Text(done.sweep.told, style="bold"))
    if best := best_of(done.pairs, done.split):
        console.print(Text(best, style="bold"))
    pairs = done.pairs.pairs
    for pair in pairs if len(pairs) <= FEW_PAIRS else done.pairs.of(done.pairs.best):
        console.print(Text(pair["verdict"]))
    for sentence in done.pairs.left_out:
        console.print(Text(sentence, style="yellow"))


def _runs(done: Comparison) -> Table:
    columns = "recipe", "parameters", "epochs", "minutes", "images/s", "best val mean IoU", "test mean IoU"
    table = framed("Runs", "run", *columns, width=40)
    for run in done.runs:
        numbers = number(run.minutes, ".1f"), number(run.speed, ".1f"), score(run.best and run.best[1])
        counts = number(run.parameters, ",d"), str(len(run.history))
        table.add_row(Text(run.name), Text(run.recipe), *counts, *numbers, score(run.test_score))
    return table


def _settings(done: Comparison, settings: dict[str, list]) -> Table:
    table = framed("Settings that differ", "setting", *(run.name for run in done.runs), width=40)
    for name, values in settings.items():
        table.add_row(name, *(Text(plain(value)) for value in values))
    return table


def _importance(done: Comparison) -> Table:
    assert done.sweep
    table = framed("Share of the scores' variance", "setting", "share", "90 %", width=40)
    for setting, share, span in done.sweep.importance:
        table.add_row(setting, percent(share, 0), f"{percent(span[0], 0)} to {percent(span[1], 0)}" if span else ABSENT)
    return table


def number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def plain(value: Any) -> str:
    """The value of a setting."""
    if value is None:
        return ABSENT
    return f"{value:g}" if isinstance(value, float) else str(value)
