"""What a person sees during a run: a table at the start, a live line, a line per epoch, a table at the end.

Without a terminal the same as plain lines, without control codes.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live as LiveText
from rich.table import Table
from rich.text import Text

from unet import environment, streams
from unet.classes import Classes
from unet.metric_names import BEST_EPOCH, SCORE, SPEED, TRAIN_LOSS, VAL_LOSS, of_class
from unet.pages.figures import lowest
from unet.pages.numbers import duration, images, percent, score, speed
from unet.progress import Live
from unet.secrets import without_secrets

SHOWN = 5
"""Names of samples in a line about them."""
PLAIN_SECONDS = 20
"""How often the progress line is printed where it cannot be redrawn."""
LINE_CLASSES = 4
"""With more classes than this, their IoU would not fit into a line."""


class Display:
    """Prints to `console`; `quiet` prints nothing (a trial of a sweep)."""

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self.is_log = environment.is_submitted() and not sys.stdout.isatty()
        """Whether this is the log of a submitted job: its lines have times, and name hosts."""
        out = streams.timed(sys.stdout) if self.is_log else None
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=quiet, file=out)
        self.redraws = self.console.is_interactive and self.console.file.isatty()
        """Whether lines can be redrawn: not on a dumb terminal, nor in a log that is to have colours."""
        if not self.console.file.isatty():
            self.console.width = 160  # tables in a log need not fit a terminal
        self._live: LiveText | None = None
        self._printed = time.monotonic()
        self._told = ""

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(Text(without_secrets(text), style=style or ""))

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Names and values, each on one unbroken line, so that paths and commands can be copied."""
        self.say(title, "bold")
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.console.print(Text.assemble("  ", (name.ljust(width), "cyan"), "  ", without_secrets(value)))

    def working(self, what: str, done: int, total: int) -> None:
        """How far a long task is; `total` is 0 if that is not known."""
        self._progress(f"{what}  {done:,}/{total:,}" if total else what, last=done == total)

    def scoring(self, done: int, total: int, images_per_second: float | None) -> None:
        pace = f" · {speed(images_per_second)}" if images_per_second else ""
        self._progress(f"scoring  {done:,}/{images(total)}{pace}", last=done == total)

    def problems(self, manifest) -> None:
        """What was left out of prepared data, repaired, or looks wrong: a line for each kind, with the first names."""
        lists = ("left out", "left_out", "red"), ("repaired", "repaired", None), ("looks wrong", "warnings", "yellow")
        for title, found, style in lists:
            for kind, count in manifest.kinds(found).most_common():
                of_kind = [row for row in getattr(manifest, found) if kind in (row.get("problem"), row.get("repair"))]
                names = [row["name"] or row["detail"] for row in of_kind]
                more = f", and {count - SHOWN} more" if count > SHOWN else ""
                apart = ", " if of_kind[0]["name"] else "; "
                self.say(f"{title}: {kind} ({count}): {apart.join(names[:SHOWN])}{more}", style)

    def progress(self, live: Live, epochs: int | None, minutes: float | None = None) -> None:
        """Where a run is that ends with so many epochs, or minutes."""
        parts = [f"{live.phase} {live.step}/{live.steps}"]
        if live.phase != "test":
            timed = minutes is not None and live.elapsed is not None
            parts.insert(0, f"epoch {live.epoch}" if timed else f"epoch {_of(live.epoch, epochs)}")
            if minutes is not None and live.elapsed is not None:
                parts.insert(1, f"{live.elapsed / 60:.1f} of {minutes:g} min")
        if live.images_per_second is not None:
            parts.append(speed(live.images_per_second))
        if live.loss is not None:
            parts.append(f"loss {score(live.loss)}")
        if live.seconds_per_step is not None and live.phase == "train" and epochs and minutes is None:
            steps = live.steps - live.step + (epochs - live.epoch) * live.steps
            parts.append(f"{duration(steps * live.seconds_per_step)} left")
        if live.data_wait_fraction is not None:  # last: a narrow terminal cuts here
            parts.append(f"data wait {percent(live.data_wait_fraction, 0)}")
        self._progress(" · ".join(parts))

    def waiting(self, text: str) -> None:
        self._progress(text)

    def waiting_for_others(self, text: str) -> None:
        """The same for what may take long and is not this job's doing: in a log it stands at once."""
        if text != self._told:
            self._told, self._printed = text, -math.inf
        self._progress(text)

    def _progress(self, text: str, last: bool = False) -> None:
        if self.redraws:
            if self._live is None:
                self._live = LiveText(console=self.console, transient=True, refresh_per_second=8)
                self._live.start()
            self._live.update(Text("  " + text, style="dim", no_wrap=True, overflow="ellipsis"))
        elif last or time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.say("  " + text)

    def epoch(self, record: dict, epochs: int | None, classes: Classes) -> None:
        parts = [f"epoch {_of(record['epoch'], epochs)}"]
        for label, key in (("loss", TRAIN_LOSS), ("val loss", VAL_LOSS), ("mean IoU", SCORE)):
            parts.append(f"{label} {score(record.get(key))}")
        parts += [f"{name} {score(record.get(of_class('val', 'iou', name)))}" for name in names_in_line(classes)]
        if SPEED in record:
            parts.append(speed(record[SPEED]))
        best = record.get(BEST_EPOCH) == record["epoch"]
        self._printed = time.monotonic()
        self.say("  ".join(parts) + ("  *best" if best else ""), "bold" if best else None)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _of(epoch: int, epochs: int | None) -> str:
    """An epoch in a column, and of how many, where that is known."""
    return f"{epoch:>3}" if epochs is None else f"{epoch:>{len(str(epochs))}}/{epochs}"


def names_in_line(classes: Classes) -> list[str]:
    """The names of the classes whose IoU a line shows: all, or none if there are too many for it."""
    return [c.name for c in classes] if len(classes) <= LINE_CLASSES else []


def score_table(title: str, scores: Mapping) -> Table:
    """A terminal table: IoU and Dice of each class and their means, the other scores in the caption.

    `scores` holds `iou` and `dice` (class name to value), `mean_iou`, `mean_dice`, `accuracy`, `images` and maybe
    `loss`; a value that could not be measured is None.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    loss = f" · loss {score(scores['loss'])}" if "loss" in scores else ""
    caption = f"accuracy {score(scores['accuracy'])}{loss}\n{images(scores['images'])}"
    columns = "class", Column("IoU", justify="right"), Column("Dice", justify="right")
    if len(shown := lowest(scores["iou"])) < len(scores["iou"]):
        caption += f"\nlowest {len(shown)} of {len(scores['iou'])} classes"
    table = Table(*columns, title=title, caption=caption, box=SIMPLE_HEAD, title_style="bold", min_width=36)
    for name in shown:
        table.add_row(name, score(scores["iou"][name]), score(scores["dice"][name]))
    table.add_section()
    table.add_row("mean", score(scores["mean_iou"]), score(scores["mean_dice"]), style="bold")
    return table
