"""A sweep in the terminal: a live table of trials, or plain lines where there is no terminal."""

import time
from collections.abc import Callable

import ray
from ray import tune
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live as LiveView
from rich.table import Table
from rich.text import Text

from unet.classes import Classes
from unet.metric_names import BEST, of_class
from unet.pages.numbers import duration, percent, score
from unet.progress import Live
from unet.terminal import PLAIN_SECONDS, Display, names_in_line
from unet.tuning.ledger import Ledger, ranked
from unet.tuning.trial_recorder import name

REFRESH_SECONDS = 0.5
SHOWN = 12
"""Ended trials in the live table; the others are counted."""
STYLES = {"running": "cyan", "finished": "green", "pruned": "dim", "failed": "red", "stopped": "yellow"}


class Board(tune.Callback):
    """Shows the ledger and where the running trials are. `left` estimates the remaining seconds, if it can."""

    def __init__(
        self,
        display: Display,
        ledger: Ledger,
        link,
        epochs: int,
        classes: Classes,
        left: Callable[[], float | None],
    ):
        self._display, self._ledger, self._link, self._left = display, ledger, link, left
        self._epochs, self._classes = epochs, classes
        self._view: LiveView | None = None
        self._shown = self._printed = time.monotonic()
        self._lives: dict[str, Live] = {}
        self._begun: set[str] = set()

    def __getstate__(self):
        return {}  # Tune pickles its callbacks for a restore that a sweep does not use

    def __enter__(self):
        if self._display.redraws:
            self._view = LiveView(console=self._display.console, transient=True, auto_refresh=False)
            self._view.start()
        return self

    def __exit__(self, *error):
        if self._view:
            self._view.stop()

    def on_trial_start(self, iteration, trials, trial, **info):
        if name(trial) in self._begun:  # PBT lets trials take turns
            return
        self._begun.add(name(trial))
        self._say(f"{name(trial)} starts  {drawn(trial.config['draw'])}", "dim")

    def on_trial_recover(self, iteration, trials, trial, **info):
        self._display.say(f"{name(trial)} failed and continues from its checkpoint", "yellow")

    def on_trial_complete(self, iteration, trials, trial, **info):
        self._ended(name(trial))

    def on_trial_error(self, iteration, trials, trial, **info):
        self._ended(name(trial))

    def _ended(self, trial: str) -> None:
        row = self._ledger[trial]
        reason = f": {row['reason']}" if row["reason"] else ""
        text = f"{trial} {row['end']} after epoch {row['epochs']}, best mean IoU {score(row[BEST])}{reason}"
        if row["end"] == "failed":
            self._display.say(text, "red")
        else:
            self._say(text)

    def _say(self, text: str, style: str | None = None) -> None:
        """A line, unless the live table shows the same."""
        if not self._view:
            self._printed = time.monotonic()
            self._display.say(text, style)

    def on_step_end(self, iteration, trials, **info):
        now = time.monotonic()
        if now - self._shown < REFRESH_SECONDS:
            return
        self._shown = now
        if not self._view and now - self._printed < PLAIN_SECONDS:
            return
        lives, _ = ray.get(self._link.poll.remote())
        self._lives = {uri.partition("?")[0].rpartition("/")[2]: live for uri, live in lives.items()}
        if self._view:
            self._view.update(Group(self._table(), Text(self._status(), style="dim")), refresh=True)
            return
        self._printed = now
        running = [r for r in self._ledger.rows if r["end"] == "running"]
        progress = ", ".join(f"{r['trial']} at {self._progress(r)}" for r in running)
        self._display.say(f"  {self._status()}" + (f" · {progress}" if progress else ""))

    def _table(self) -> Table:
        rows = self._ledger.rows
        running = [r for r in rows if r["end"] == "running"]
        ended = ranked(r for r in rows if r["end"] != "running")
        shown = running + ended[:SHOWN]
        table = trial_table(shown, self._progress, self._classes, self._display.console.width)
        if len(ended) > SHOWN:
            table.caption = f"and {len(ended) - SHOWN} more that have ended"
        return table

    def _progress(self, row: dict) -> str:
        live = self._lives.get(row["trial"])
        if row["end"] != "running" or live is None:
            return f"{row['epochs']}/{self._epochs}"
        return f"{live.phase} {percent(live.step / live.steps, 0)}  {live.epoch}/{self._epochs}"

    def _status(self) -> str:
        rows = self._ledger.rows
        ended = [r for r in rows if r["end"] != "running"]
        parts = [f"{len(ended)} trials ended, {len(rows) - len(ended)} running"]
        best = next(iter(ranked(rows)), None)
        if best and best[BEST] is not None:
            by_class = ", ".join(
                f"{c} {score(best.get(of_class('val', 'iou', c)))}" for c in names_in_line(self._classes)
            )
            parts.append(f"best {best['trial']} {score(best[BEST])}" + (f" ({by_class})" if by_class else ""))
        parts.append(f"{epochs_saved(rows, self._epochs)} trial-epochs saved by pruning")
        if (left := self._left()) is not None:
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)


def trial_table(
    rows: list[dict], progress: Callable[[dict], str], classes: Classes, width: int, title: str | None = None
) -> Table:
    """Trials with their settings, state, epochs and IoU; by class, of the best epoch, where there is room."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, collapse_padding=True)
    names = list(rows[0]["settings"]) if rows else []
    by_class = names_in_line(classes)
    by_class = by_class if width >= 44 + 10 * (len(by_class) + len(names)) else []
    table.add_column("trial", no_wrap=True)
    for heading in (*(n.replace("_", " ") for n in names), "state", "epoch", "mean IoU", *by_class):
        table.add_column(heading, justify="right", no_wrap=heading == "epoch")
    for row in rows:
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row["settings"].values()]
        iou = [score(row.get(of_class("val", "iou", c))) for c in by_class]
        state = Text(row["end"], style=STYLES[row["end"]])
        table.add_row(row["trial"], *values, state, progress(row), score(row[BEST]), *iou)
    return table


def epochs_saved(rows: list[dict], epochs: int) -> int:
    """Trial-epochs that pruned trials did not train."""
    return sum(epochs - row["epochs"] for row in rows if row["end"] == "pruned")


def drawn(settings: dict) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())
