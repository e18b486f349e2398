"""Pictures of a sweep: scores over time, each setting against the score, which settings mattered."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unet.metric_names import BEST, SCORE
from unet.pages.figures import DPI, INK, LEGEND, QUIET, calm
from unet.tuning.space import Space, choices, is_log, limits

ENDS = {"finished": "#174a7e", "pruned": "#9aa0a9", "stopped": "#b8860b"}
FAILED = "#b3412f"


def scores_over_time(histories: dict[str, list[dict]], rows: Sequence[dict], path: Path) -> None:
    """Val mean IoU of every trial by epoch, the best one in bold."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    best = rows[0]["trial"]
    for row in reversed(rows):
        records = histories[row["trial"]]
        strong = row["trial"] == best
        line: dict[str, Any] = {"linewidth": 2.6, "zorder": 3} if strong else {"linewidth": 1.2, "alpha": 0.75}
        points = [(r["epoch"], r[SCORE]) for r in records if SCORE in r]
        if points:
            colour = INK if strong else ENDS.get(row["end"], FAILED)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, **line)
    handles = [axes.plot([], [], color=ENDS[e], label=e)[0] for e in ENDS if any(r["end"] == e for r in rows)]
    handles.append(axes.plot([], [], color=INK, linewidth=2.6, label=f"best, {best}")[0])
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **LEGEND)
    calm(axes, "Validation mean IoU by epoch, one line per trial")
    axes.set_xlabel("epoch", fontsize=10, color=QUIET)
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.savefig(path, format="png")


def settings_and_scores(rows: Sequence[dict], space: Space, path: Path) -> None:
    """Each searched setting against the best val mean IoU of its trials, the best one ringed."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    scored, names = [r for r in rows if r[BEST] is not None], list(space.draws)
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1)
    figure = Figure(figsize=(4.4 * columns, 3.9 * lines + 0.4), dpi=DPI, layout=layout)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for axes, name in zip(panels, names, strict=False):
        domain = space.draws[name]
        values = choices(domain)

        def across(row, name=name, values=values):
            value = row["settings"][name]
            return value if values is None else values.index(value)

        for end in sorted({r["end"] for r in scored}):
            of_end = [r for r in scored if r["end"] == end]
            style = {"s": 42, "color": ENDS.get(end, FAILED), "alpha": 0.85, "linewidths": 0}
            axes.scatter([across(r) for r in of_end], [r[BEST] for r in of_end], label=end, **style)
        ring = {"s": 150, "facecolors": "none", "edgecolors": INK, "linewidths": 1.8}
        axes.scatter([across(scored[0])], [scored[0][BEST]], **ring)
        if values is not None:
            axes.set_xticks(range(len(values)), [str(v) for v in values])
            axes.set_xlim(-0.6, len(values) - 0.4)
        elif is_log(domain):
            low, high = limits(domain)
            axes.set_xscale("log")
            axes.set_xlim(low / 1.15, high * 1.15)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        calm(axes, name.replace("_", " "))
        axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("best val mean IoU", fontsize=10, color=QUIET)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), **LEGEND)
    figure.savefig(path, format="png")


def importance_picture(importance: dict[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.5 + 0.5 * len(importance)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    names = [name.replace("_", " ") for name in importance]
    bars = axes.barh(names, list(importance.values()), color="#174a7e", height=0.55)
    axes.bar_label(bars, fmt="{:.0%}", padding=5, color=INK, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    calm(axes, "Share of the score's variance explained by each setting")
    axes.set_xticks([])
    figure.savefig(path, format="png")
