"""The page of a comparison: one HTML file, without scripts or anything from the network."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from unet.comparison.pairs import best_of, excludes_zero
from unet.comparison.run import Comparison
from unet.comparison.runs import ComparedRun, by_class, differing
from unet.comparison.tables import number, plain
from unet.pages.charts import Axis, Line, run_charts
from unet.pages.render import render
from unet.recipe.loss import LossSettings

COLOURS = ((68, 119, 170), (238, 102, 119), (34, 136, 51), (204, 153, 0), (102, 178, 216), (170, 51, 119))
"""Of the runs, in their order, which colour-blind readers tell apart too (after Paul Tol's "bright"); then again, with
dashed lines."""
FEW_CLASSES = 4
"""With more classes than this, their differences would not fit beside that of the mean."""


class ShownRun(NamedTuple):
    """A run and how it is drawn."""

    run: ComparedRun
    colour: tuple[int, int, int]
    dashed: bool
    scores: dict | None


def comparison_page(done: Comparison) -> str:
    """The whole page, as text to encode in UTF-8."""
    runs = [
        ShownRun(run, COLOURS[i % len(COLOURS)], i >= len(COLOURS), done.pairs.scores.get(run.name))
        for i, run in enumerate(done.runs)
    ]
    settings = differing(done.runs)
    classes = list(by_class(done.runs, "val"))
    return render(
        "comparison/page.html.jinja",
        done=done,
        runs=runs,
        best=best_of(done.pairs, done.split),
        score_axis=Axis.over(_score_ends(done)),
        pairs=done.pairs.pairs,
        pair_axis=Axis.over([0.0, *_ends(pair["network_size"]["mean_iou"] for pair in done.pairs.pairs)]),
        few_classes=classes if len(classes) <= FEW_CLASSES else [],
        importance_axis=Axis.over([0.0, 1.0]),
        settings={name: [plain(value) for value in values] for name, values in settings.items()},
        losses_differ=bool(settings.keys() & LossSettings.model_fields.keys()),
        charts=run_charts([Line(r.run.name, _css(r.colour), r.dashed, r.run.history) for r in runs]),
        by_class={title: found for split, title in SPLITS.items() if (found := by_class(done.runs, split))},
        number=number,
        highest=_highest,
        is_clear=excludes_zero,
    )


SPLITS = {"val": "On val, in the epoch with the best mean IoU", "test": "On test"}


def _css(colour: tuple[int, int, int]) -> str:
    return "rgb({} {} {})".format(*colour)


def _score_ends(done: Comparison) -> list[float]:
    scores = done.pairs.scores.values()
    return list(_ends({"value": found["mean_iou"], "interval": found["intervals"]["mean_iou"]} for found in scores))


def _ends(found: Iterable[dict]) -> Iterable[float]:
    """Values and the ends of their intervals."""
    return (end for one in found for end in (one["value"], *(one["interval"] or ())) if end is not None)


def _highest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
