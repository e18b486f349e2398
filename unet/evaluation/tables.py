"""An evaluation in the terminal: tables that fit into 80 columns."""

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from unet.classes import MANY
from unet.evaluation.intervals import LEAST_IMAGES
from unet.pages.figures import lowest
from unet.pages.numbers import ABSENT, images, score

WORST = 8
"""Number of breeds shown: those with the lowest mean IoU."""
NAME_WIDTH, WIDE = 18, 26
"""Characters of a name before it is cut, and in tables with fewer numbers: all fit into 80 columns."""
WAYS = {"outline_as_pet": "as pet", "outline_ignored": "ignored"}


def show(console: Console, title: str, metrics: Mapping) -> None:
    """The tables of one model."""
    console.print(_by_class(title, metrics))
    console.print(_otherwise(metrics))
    if metrics["binary"]:
        console.print(_binary(metrics))
    same = metrics["by_species"] == metrics["by_breed"]  # of drawn pets
    for group in ("species",) if same else ("species", "breed"):
        if len(metrics[f"by_{group}"]) > 1:
            console.print(_groups(group, metrics[f"by_{group}"]))


def show_comparison(console: Console, comparison: Mapping) -> None:
    """The differences of each pair, and the verdict."""
    for pair in comparison["pairs"]:
        table = framed(f"{pair['b']} minus {pair['a']}", "IoU of", "difference", "95 %")
        parts = [("network_size", ""), ("band", ", near borders"), ("own_size", ", own size")]
        for part, words in parts:
            if part not in pair:
                continue
            rows = [("mean" + words, pair[part]["mean_iou"], "bold")]
            if part == "network_size":
                rows += [(name, found, "") for name, found in _most_different(pair[part]["iou"])]
            for name, found, style in rows:
                table.add_row(Text(name), score(found["value"], sign="+"), _span(found["interval"], "+"), style=style)
        console.print(table)
        console.print(Text(pair["verdict"], style="bold"))


def _most_different(differences: Mapping) -> list[tuple[str, Mapping]]:
    """The differences of all classes, or with more than `MANY` classes of those that differ most."""
    if len(differences) <= MANY:
        return list(differences.items())
    return sorted(differences.items(), key=lambda item: -abs(item[1]["value"] or 0))[:MANY]


def _by_class(title: str, metrics: Mapping) -> Table:
    spans = metrics["intervals"]
    table = framed(title, "class", "IoU", "95 %", "Dice", "95 %")
    table.caption = (
        f"accuracy {score(metrics['accuracy'])} {_span(spans['accuracy'])} · loss {score(metrics['loss'])}\n"
        f"{images(metrics['images'])}" + ("; 95 % intervals over images" if spans["accuracy"] else "")
    )
    for name in (shown := lowest(metrics["iou"])):
        iou, dice, span = metrics["iou"][name], metrics["dice"][name], spans["dice"][name]
        table.add_row(Text(name), score(iou), _span(spans["iou"][name]), score(dice), _span(span))
    if len(shown) < len(metrics["iou"]):
        table.caption += f"\nlowest {len(shown)} of {len(metrics['iou'])} classes; all: metrics.json"
    table.add_section()
    means = ((metrics[key], spans[key]) for key in ("mean_iou", "mean_dice"))
    table.add_row("mean", *(text for value, span in means for text in (score(value), _span(span))), style="bold")
    return table


def _otherwise(metrics: Mapping) -> Table:
    """The means of the other ways to score the same masks."""
    table = framed("Other ways to score", "of", "mean IoU", "95 %", "mean Dice", "accuracy", width=WIDE)
    band, own = metrics.get("band"), metrics.get("own_size")
    rows = [("mean over images", metrics["per_image"])]
    rows += [(f"within {band['width']} px of a border", band)] if band else []
    rows += [("at the photos' own size", own)] if own else []
    for name, scores in rows:
        span = scores.get("intervals", {}).get("mean_iou")
        numbers = (score(scores[key]) for key in ("mean_iou", "mean_dice", "accuracy"))
        iou, *others = numbers
        table.add_row(name, iou, _span(span), *others)
    return table


def _binary(metrics: Mapping) -> Table:
    """Pet against background."""
    table = framed("Pet against background", "outline", "IoU pet", "95 %", "Dice pet", "mean IoU")
    own = (metrics.get("own_size") or {}).get("binary") or {}
    rows = [(WAYS[way], scores) for way, scores in metrics["binary"].items()]
    rows += [(f"{WAYS[way]}, own size", scores) for way, scores in own.items()]
    for name, scores in rows:
        iou, span = score(scores["iou"]["pet"]), _span(scores["intervals"]["iou"]["pet"])
        table.add_row(name, iou, span, score(scores["dice"]["pet"]), score(scores["mean_iou"]))
    return table


def _groups(group: str, found: Mapping) -> Table:
    """The groups with the lowest scores, lowest first; those with few images only if there are no others."""
    large = {name: scores for name, scores in found.items() if scores["images"] >= LEAST_IMAGES} or found
    ranked = sorted(large.items(), key=lambda item: (item[1]["mean_iou"] is None, item[1]["mean_iou"]))
    title = f"The worst {WORST} of {len(large)} breeds" if len(large) > WORST else f"By {group}"
    title += f" with {LEAST_IMAGES} images or more" if len(large) < len(found) else ""
    table = framed(title, group, "images", "mean IoU", "95 %", "accuracy", width=WIDE)
    for name, scores in ranked[:WORST]:
        numbers = score(scores["mean_iou"]), _span(scores["intervals"]["mean_iou"]), score(scores["accuracy"])
        table.add_row(Text(name), f"{scores['images']:,}", *numbers)
    return table


def framed(title: str, first: str, *columns: str, width: int = NAME_WIDTH) -> Table:
    """A table whose title, like the names in it, is plain text, not markup: users name classes and runs."""
    right = (Column(name, justify="right", no_wrap=True) for name in columns)
    head = Column(first, overflow="ellipsis", no_wrap=True, max_width=width)
    return Table(head, *right, title=Text(title, style="bold"), box=SIMPLE_HEAD, title_justify="left", min_width=36)


def _span(span: list | None, sign: str = "") -> str:
    return ABSENT if span is None else f"{score(span[0], sign)} to {score(span[1], sign)}"
