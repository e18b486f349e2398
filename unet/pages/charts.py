"""Axes and lines of a page's drawings, as numbers that a template turns into SVG."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from unet.classes import MANY
from unet.metric_names import SCORE, TRAIN_LOSS, VAL_LOSS, of_class
from unet.pages.figures import best_epoch, series

STEPS = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])


class Axis(NamedTuple):
    """From `low` to `high`, with a tick at every `step`, at both ends too."""

    low: float
    high: float
    step: float

    @classmethod
    def over(cls, values: Iterable[float | None], steps: int = 5, least: float = 0.0) -> "Axis":
        """An axis over values, without those that are None, in about `steps` steps of at least `least`."""
        found = [value for value in values if value is not None] or [0.0, 1.0]
        span = max(max(found) - min(found), 1e-3)
        place = min(int(np.searchsorted(STEPS, span / steps)), len(STEPS) - 1)
        step = max(float(STEPS[place]), least)
        low, high = (
            float(edge(value / step)) * step for edge, value in ((np.floor, min(found)), (np.ceil, max(found)))
        )
        return cls(low, high if high > low else low + step, step)

    @property
    def ticks(self) -> list[tuple[str, float]]:
        """The text and the position, 0..1, of each tick."""
        count = round((self.high - self.low) / self.step)
        decimals = max(0, -int(np.floor(np.log10(self.step))))
        words = [f"{self.low + index * self.step:.{decimals}f}" for index in range(count + 1)]
        return [(word.replace("-", "−"), index / count) for index, word in enumerate(words)]

    def at(self, value: float) -> float:
        """Where a value lies, 0..1."""
        return (value - self.low) / (self.high - self.low)


class Curve(NamedTuple):
    """A line of a chart; `colour` is CSS, `points` are (x, y) in 0..1 from the lower left, `last` its last value."""

    name: str
    colour: str
    points: list[tuple[float, float]]
    last: float
    dashed: bool = False


class Chart(NamedTuple):
    """Lines over epochs or minutes; `best` is the position of the best epoch's point and its text, if there is one."""

    title: str
    across: Axis
    down: Axis
    lines: list[Curve]
    best: tuple[tuple[float, float], str] | None
    by: str = "epoch"


class Line(NamedTuple):
    """What a chart shows of a run: a record per epoch (`unet.pages.figures.training_curves`), with its `minutes`."""

    name: str
    colour: str
    dashed: bool
    history: Sequence[Mapping]


def training_charts(history: Sequence[Mapping], classes: Sequence) -> list[Chart]:
    """The loss, and the IoU on the validation split, of a record per epoch (see `unet.pages.figures.training_curves`).

    Of more classes than `MANY` the mean IoU only.
    """
    if not history:
        return []
    loss = [("training", "var(--val)", TRAIN_LOSS), ("validation", "var(--ink)", VAL_LOSS)]
    iou = [
        (item.name, "rgb({} {} {})".format(*item.colour), of_class("val", "iou", item.name))
        for item in classes
        if len(classes) <= MANY
    ]
    iou += [("mean", "var(--ink)", SCORE)]
    epochs = [record["epoch"] for record in history]
    across = Axis.over([min(epochs), max(epochs)], 8, least=1)
    found = []
    for title, lines in (("Loss", loss), ("IoU on val", iou)):
        measured = [(name, colour, *series(history, key)) for name, colour, key in lines]
        measured = [line for line in measured if line[2]]
        # A loss has no upper bound; scores of different runs compare better on one axis.
        down = Axis.over([0.0, 1.0] if lines is iou else [0.0, *(v for line in measured for v in line[3])])
        best = best_epoch(history) if lines is iou else None
        drawn = [Curve(name, colour, _points(across, down, xs, ys), ys[-1]) for name, colour, xs, ys in measured]
        mark = best and ((across.at(best[0]), down.at(best[1])), f"best mean {best[1]:.3f}, epoch {best[0]}")
        found.append(Chart(title, across, down, drawn, mark))
    return [chart for chart in found if chart.lines]


def run_charts(runs: Sequence[Line]) -> list[Chart]:
    """The mean IoU on the validation split and both losses of some runs, each over epochs and over minutes.

    Their axes go as far as the values do: what differs between runs is often a small part of a score.
    """
    found = []
    for title, key in (("Mean IoU on val", SCORE), ("Loss on val", VAL_LOSS), ("Loss in training", TRAIN_LOSS)):
        for by, across_all in (("epoch", {"steps": 8, "least": 1}), ("minutes", {"steps": 8})):
            measured = [(run, *series(run.history, key, by)) for run in runs]
            measured = [line for line in measured if line[2]]
            begin = [0.0] if by == "minutes" else []
            across = Axis.over([*begin, *(x for _, xs, _ in measured for x in xs)], **across_all)
            down = Axis.over(y for _, _, ys in measured for y in ys)
            lines = [
                Curve(run.name, run.colour, _points(across, down, xs, ys), ys[-1], run.dashed)
                for run, xs, ys in measured
            ]
            found.append(Chart(title, across, down, lines, None, by))
    return [chart for chart in found if chart.lines]


def _points(across: Axis, down: Axis, xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    return [(across.at(x), down.at(y)) for x, y in zip(xs, ys, strict=True)]
