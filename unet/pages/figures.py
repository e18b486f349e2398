"""Pictures and tables that show how well a model segments.

Pictures are drawn without pyplot and its global state, so any thread, worker or machine without a display can draw.
matplotlib and rich load only when used.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unet.classes import IGNORE, MANY, ClassInfo
from unet.metric_names import SCORE, TRAIN_LOSS, VAL_LOSS, of_class
from unet.metrics import confusion_of, iou_and_dice
from unet.pages.numbers import cell_text, score
from unet.pages.pictures import STRIPES, overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

DPI = 130
INK, QUIET, FAINT, EDGE = "#2b2d33", "#6b7078", "#e4e6ea", "#9aa0a9"
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 10, "labelcolor": INK}


def training_curves(history: Sequence[Mapping], classes: Sequence[ClassInfo], path: str | Path) -> Path:
    """Draw loss, IoU and Dice over the epochs, with the best epoch by mean IoU marked.

    `history` holds a record for each epoch: `epoch`, `train/loss`, `val/loss`, `val/mean_iou`, `val/iou/<class>` and
    `val/dice/<class>`. A value that is missing, None or not finite is left out of its line. More classes than `MANY`
    are thin lines without names.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    if not history:
        raise ValueError("There are no epochs to draw: the history is empty. Train for at least one epoch.")
    many = len(classes) > MANY
    rows = 1 if many else math.ceil((len(classes) + 1) / 8)
    figure = Figure(figsize=(13, 4.1 + 0.24 * rows), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1))
    loss, iou, dice = panels = figure.subplots(1, 3)
    # Dots make every epoch of a short run visible; in a long run they would only thicken the line.
    style = {"linewidth": 1.8} | ({"marker": "o", "markersize": 3.5} if len(history) <= 25 else {})
    loss.plot(*series(history, TRAIN_LOSS), color="#9aa0a9", label="training", **style)
    loss.plot(*series(history, VAL_LOSS), color=INK, label="validation", **style)
    loss.set_ylim(0, 1.05 * loss.dataLim.ymax if loss.dataLim.ymax > 0 else 1)
    loss.legend(**LEGEND)
    for axes, metric in ((iou, "iou"), (dice, "dice")):
        axes.set_ylim(0, 1)
        for item in classes:
            values = series(history, of_class("val", metric, item.name))
            thin = {"linewidth": 0.5, "marker": "", "label": "_"} if many else {"label": item.name}
            axes.plot(*values, color=unit(item.colour, on_white=True), **style | thin)
    iou.plot(*series(history, SCORE), color=INK, label="mean", **style | {"linewidth": 2.6})
    named = [line for line in iou.get_lines() if not line.get_label().startswith("_")]
    figure.legend(handles=named, loc="outside lower center", ncols=8, **LEGEND)

    epochs = [record["epoch"] for record in history]
    if best := best_epoch(history):
        epoch, value = best
        iou.vlines(epoch, 0, value, color=INK, linewidth=0.9, linestyle=(0, (2, 3)))
        iou.plot(epoch, value, "o", markersize=9, color=INK, markerfacecolor="white", markeredgewidth=2, clip_on=False)
        # The label stands at the foot of the axes, below curves that have risen, and leans to the roomier side.
        offset, side = ((-7, 8), "right") if 2 * epoch > min(epochs) + max(epochs) else ((7, 8), "left")
        iou.annotate(
            f"best mean {value:.3f}\nepoch {epoch}",
            (epoch, 0),
            offset,
            textcoords="offset points",
            ha=side,
            fontsize=10,
            color=INK,
            linespacing=1.4,
        )
    for axes, title in zip(panels, ("Loss", "Validation IoU", "Validation Dice"), strict=True):
        calm(axes, title)
        axes.spines["bottom"].set(visible=True, color="#c3c7cd")
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_xlabel("epoch", fontsize=10, color=QUIET)
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    figure.savefig(path, format="png")
    return Path(path)


def best_epoch(history: Sequence[Mapping]) -> tuple[int, float] | None:
    """Return (epoch, mean IoU) of the highest `val/mean_iou`, the earliest on a tie; None if none was measured."""
    return max(zip(*series(history, SCORE), strict=True), key=lambda pair: pair[1], default=None)


def confusion_picture(confusion: np.ndarray, classes: Sequence[ClassInfo], path: str | Path) -> Path:
    """Draw `confusion`, int64 (C, C), row = truth, column = predicted: each cell's share of its row and its pixels.

    With more classes than `MANY` it shows only the colours of the shares, in a picture of one size.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    count, names = len(classes), [item.name for item in classes]
    if confusion.shape != (count, count):
        raise ValueError(f"The confusion matrix has shape {confusion.shape}; {count} classes need ({count}, {count}).")
    totals = confusion.sum(axis=1)
    shares = confusion / np.maximum(totals, 1)[:, None]
    few, many = count <= 6, count > MANY
    cell, share_size, pixel_size, name_size = (1.25, 14, 9.5, 11) if few else (0.62, 8, 6, 9)
    cell = MANY * cell / count if many else cell
    figure = Figure(figsize=(count * cell + 1.9, count * cell + 1.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    shading = LinearSegmentedColormap.from_list("shares", ["#f5f6f9", "#174a7e"])
    axes.imshow(shares, cmap=shading, vmin=0, vmax=1)
    calm(axes, "Confusion matrix")
    axes.set_xlabel("predicted", fontsize=10, color=QUIET, labelpad=8)
    axes.set_ylabel("truth (each row is 100 %)", fontsize=10, color=QUIET, labelpad=8)
    if many:
        axes.set_title(f"Confusion matrix of {count} classes, by their ids", fontsize=13, color=INK, loc="left", pad=11)
        figure.savefig(path, format="png")
        return Path(path)
    for (row, column), share in np.ndenumerate(shares):
        # White and ink read equally well on the blue of 0.6; shares that round to nothing step back.
        colour = "white" if share > 0.6 else INK if share >= 0.005 else QUIET
        upper, lower = cell_text(int(confusion[row, column]), int(totals[row]))
        axes.text(column, row, upper, ha="center", va="bottom" if lower else "center", color=colour, size=share_size)
        axes.text(column, row + 0.1, lower, ha="center", va="top", color=colour, size=pixel_size)
    tilt: dict[str, Any] = {} if few else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(count), names, fontsize=name_size, color=INK, **tilt)
    axes.set_yticks(range(count), names, fontsize=name_size, color=INK)
    for draw in (axes.hlines, axes.vlines):
        draw(np.arange(1, count) - 0.5, -0.5, count - 0.5, color="white", linewidth=2)
    figure.savefig(path, format="png")
    return Path(path)


def gallery(
    images: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    classes: Sequence[ClassInfo],
    path: str | Path,
) -> Path:
    """Draw photo, truth and prediction of each sample, with the IoU of each class under the prediction.

    `images` is uint8 (N, H, W, 3); `truth` and `predicted` are uint8 (N, H, W) class ids; 255 in `truth` means ignore
    and is drawn striped. More than four samples stand two abreast.
    """
    from matplotlib.figure import Figure

    count, height, width = images.shape[:3]
    if count == 0:
        raise ValueError("There are no samples to show: pass at least one image.")
    texts = [iou_caption(*pair, classes) for pair in zip(truth, predicted, strict=True)]
    captions = ["\n".join(line.strip(" ·") for line in textwrap.wrap(text, 46)) for text in texts]
    legend = _patches(classes, truth, predicted)
    # Lengths are in inches, so that pictures of one sample and of twenty have the same proportions.
    abreast = 2 if count > 4 else 1
    side, gap, gutter, margin = 2.5, 0.07, 0.35, 0.2
    tall, block = side * height / width, 3 * side + 2 * gap + gutter
    row_height = tall + 0.45 + 0.15 * max(caption.count("\n") for caption in captions)
    head = 0.5 + 0.23 * math.ceil(len(legend) / (4 * abreast))
    page = np.array([2 * margin + abreast * block - gutter, head + math.ceil(count / abreast) * row_height])
    figure = Figure(figsize=tuple(page), dpi=DPI)
    _legend(figure, legend, (margin / page[0], 1 - 0.15 / page[1]), 4 * abreast)
    extent = (0, width, height, 0)
    for sample, (photo, name, caption) in enumerate(zip(images, names, captions, strict=True)):
        row, place = divmod(sample, abreast)
        panels = ("photo", None, name), ("truth", truth[sample], ""), ("prediction", predicted[sample], caption)
        for column, (title, mask, note) in enumerate(panels):
            corner = (margin + place * block + column * (side + gap), page[1] - head - row * row_height - tall)
            axes = figure.add_axes((*(corner / page), *((side, tall) / page)))
            axes.set_axis_off()
            axes.set_title(title if row == 0 else "", fontsize=10, color=QUIET, loc="left", pad=5)
            axes.annotate(
                note,
                (0, 0),
                (0, -5),
                xycoords="axes fraction",
                textcoords="offset points",
                va="top",
                fontsize=8,
                color=INK,
                linespacing=1.35,
            )
            if mask is None:
                axes.imshow(photo, extent=extent, interpolation="lanczos")
            else:
                axes.imshow(_panel(photo, mask, classes), extent=extent)
    figure.savefig(path, format="png")
    return Path(path)


def samples(
    images: np.ndarray,
    masks: np.ndarray,
    names: Sequence[str],
    classes: Sequence[ClassInfo],
    title: str,
    path: str | Path,
) -> Path:
    """Draw samples four abreast, each as photo and mask: `images` uint8 (N, H, W, 3), `masks` uint8 (N, H, W)."""
    from matplotlib.figure import Figure

    height, width = images.shape[1:3]
    legend = _patches(classes, masks)
    abreast, side, gap, gutter, margin = 4, 1.7, 0.04, 0.22, 0.2
    tall, block = side * height / width, 2 * side + gap + gutter
    head, row_height = 0.62 + 0.23 * math.ceil(len(legend) / 8), tall + 0.36
    page = np.array([2 * margin + abreast * block - gutter, head + math.ceil(len(images) / abreast) * row_height])
    figure = Figure(figsize=tuple(page), dpi=DPI)
    figure.text(margin / page[0], 1 - 0.15 / page[1], title, fontsize=13, color=INK, va="top")
    _legend(figure, legend, (margin / page[0], 1 - 0.5 / page[1]), 8)
    for sample, (photo, mask, name) in enumerate(zip(images, masks, names, strict=True)):
        row, place = divmod(sample, abreast)
        for column, picture in enumerate((photo, _panel(photo, mask, classes))):
            left, bottom = margin + place * block + column * (side + gap), page[1] - head - row * row_height - tall
            axes = figure.add_axes((left / page[0], bottom / page[1], side / page[0], tall / page[1]))
            axes.set_axis_off()
            axes.imshow(picture, extent=(0, width, height, 0), interpolation=None if column else "lanczos")
        note = textwrap.shorten(name, 40, placeholder="…")
        figure.text((left - side - gap) / page[0], (bottom - 0.07) / page[1], note, fontsize=8, color=INK, va="top")
    figure.savefig(path, format="png")
    return Path(path)


def _patches(classes: Sequence[ClassInfo], truth: np.ndarray, *others: np.ndarray) -> list[Patch]:
    """What a legend of masks shows: the classes, of many the most frequent, and ignored pixels if `truth` has some."""
    from matplotlib.patches import Patch

    named = classes if len(classes) <= MANY else _most_frequent(classes, truth, *others)
    # With an edge, since a class may be white, as the page is.
    patches = [Patch(facecolor=unit(item.colour), edgecolor=EDGE, linewidth=0.6, label=item.name) for item in named]
    if (truth == IGNORE).any():
        dark, light = map(unit, STRIPES)
        patches.append(Patch(facecolor=dark, edgecolor=light, hatch="/////", linewidth=0, label="ignored"))
    return patches


def _legend(figure: Figure, patches: list[Patch], corner: tuple[float, float], columns: int) -> None:
    """A legend whose upper left corner stands there, in shares of the page."""
    options = {"borderpad": 0, "borderaxespad": 0, "handlelength": 1.1, "handleheight": 1.1} | LEGEND
    figure.legend(handles=patches, loc="upper left", bbox_to_anchor=corner, ncols=columns, **options)


def _most_frequent(classes: Sequence[ClassInfo], *masks: np.ndarray) -> list[ClassInfo]:
    """The classes with most pixels in the masks, at most `MANY`, in the order of their ids."""
    every = np.concatenate(masks, axis=None)
    pixels = np.bincount(every, minlength=IGNORE + 1)[: len(classes)]
    return [classes[i] for i in sorted(np.argsort(-pixels, kind="stable")[:MANY]) if pixels[i]]


def lowest(scores: Mapping[str, float | None]) -> list[str]:
    """The names of the classes that a table shows: all, or of more than `MANY` the lowest `MANY`, the lowest first."""
    if len(scores) <= MANY:
        return list(scores)
    measured = {name: value for name, value in scores.items() if value is not None}
    return sorted(measured, key=measured.__getitem__)[:MANY]


def image_iou(truth: np.ndarray, predicted: np.ndarray, class_count: int) -> list[float | None]:
    """Return the IoU of each class between uint8 (H, W) masks, None if absent in both; truth 255 counts for nothing."""
    confusion = confusion_of(truth, predicted, class_count)
    iou, _ = iou_and_dice(np.diagonal(confusion), confusion.sum(1), confusion.sum(0))
    return [None if np.isnan(value) else float(value) for value in iou]


def iou_caption(truth: np.ndarray, predicted: np.ndarray, classes: Sequence[ClassInfo]) -> str:
    """Return "pet 0.91 · background 0.96 · outline –"; with more than four classes, absent ones are left out."""
    scores = zip(classes, image_iou(truth, predicted, len(classes)), strict=True)
    parts = [
        f"{item.name} {score(value, digits=2)}" for item, value in scores if value is not None or len(classes) <= 4
    ]
    parts = [*parts[:MANY], f"and {len(parts) - MANY} more"] if len(parts) > MANY else parts
    # Only the spaces between classes may break: a name and its value stay on one line.
    return " · ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)


def series(history: Sequence[Mapping], key: str, by: str = "epoch") -> tuple[list, list[float]]:
    """Return the epochs (or what else `by` names) that measured `key` and their values."""
    records = [record for record in history if record.get(key) is not None and math.isfinite(record[key])]
    return [record[by] for record in records], [record[key] for record in records]


def _panel(photo: np.ndarray, mask: np.ndarray, classes: Sequence[ClassInfo]) -> np.ndarray:
    """A mask over its photo, uint8 RGB, enlarged so that borders and stripes are finer than the mask's pixels."""
    scale = max(1, round(640 / max(mask.shape)))
    mask = mask.repeat(scale, axis=0).repeat(scale, axis=1)
    grey = Image.fromarray(photo).convert("L").resize(mask.shape[::-1], Image.Resampling.LANCZOS)
    return np.asarray(overlay(np.asarray(grey), mask, classes, edged=True))


def calm(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=13, color=INK, loc="left", pad=11)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=10, labelcolor=QUIET, pad=6)


def unit(colour: tuple[int, int, int], on_white: bool = False) -> tuple[float, float, float]:
    """Return `colour` in 0..1; `on_white` darkens a light one just enough for a thin line on paper."""
    bright = np.dot(colour, (0.2126, 0.7152, 0.0722)) / 255
    darker = min(1.0, 0.68 / max(bright, 0.01)) if on_white else 1.0
    red, green, blue = (channel / 255 * darker for channel in colour)
    return red, green, blue
