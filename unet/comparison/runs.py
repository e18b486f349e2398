"""What is compared: runs as their folders tell of them, and the settings in which they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet.classes import Classes
from unet.config import OF_THIS_PLACE, TrainSettings, defaults, read_config
from unet.metric_names import SPEED, TEST_SCORE, of, of_class
from unet.pages.figures import best_epoch, series
from unet.runs.checkpoint import Checkpoints
from unet.runs.run import read_history, read_summary
from unet.secrets import without_passwords
from unet.storage import Folder

NOT_COMPARED = (*OF_THIS_PLACE, "sync", "data", "experiment", "register", "recipe")
"""Settings that make no difference to a run, or whose difference is shown otherwise: its data are compared by their
digest, and of a recipe the settings are listed one by one."""


@dataclass(frozen=True)
class ComparedRun:
    """A run as it is compared.

    Attributes:
        name: as shown.
        model: what `--model` takes for it.
        folder: of the run.
        settings: flat, without secrets.
        summary: the content of `summary.json`.
        history: the lines of `metrics.jsonl`, each with its `minutes` (`with_minutes`).
        minutes: of its own time, over all its starts; None before the first line.
        parameters: of its network; None before its first checkpoint.
        classes: of its data; empty before its first checkpoint.
        checkpoint: that its name means; None before its first.
    """

    name: str
    model: str
    folder: Folder
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    minutes: float | None
    parameters: int | None
    classes: Classes
    checkpoint: str | None

    @classmethod
    def of_folder(cls, name: str, model: str, folder: Folder) -> "ComparedRun":
        """What the folder of a run says.

        Raises:
            InputError: it is damaged.
        """
        summary, states = read_summary(folder), [state for _, state in Checkpoints(folder).readable()]
        latest = states[0] if states else None
        ended = {state.epoch - 1: state.seconds for state in states if state.epoch_step == 0 and state.epoch > 1}
        history = with_minutes(read_history(folder), summary.get("started"), ended)
        return cls(
            name=name,
            model=model,
            folder=folder,
            settings=without_passwords(defaults(TrainSettings) | read_config(folder)),
            summary=summary,
            history=history,
            minutes=latest.seconds / 60 if latest else history[-1]["minutes"] if history else None,
            parameters=latest.recipe().network.parameters if latest else None,
            classes=latest.class_infos if latest else (),
            checkpoint=latest.chosen if latest else None,
        )

    @property
    def recipe(self) -> str:
        """The name of its recipe, without the folder of a file."""
        return str(self.settings["recipe"]).rpartition("/")[2]

    @property
    def best(self) -> tuple[int, float] | None:
        """The epoch with the highest val mean IoU, and that."""
        return best_epoch(self.history)

    @property
    def speed(self) -> float | None:
        """Images a second, in the median epoch."""
        _, speeds = series(self.history, SPEED)
        return float(np.median(speeds)) if speeds else None

    def scores(self, split: str) -> dict[str, float]:
        """The metrics of the best epoch on val, or of the test split, by name; empty where there are none."""
        if split == "test":
            return of("test", self.summary["test"]) if self.summary.get("test") else {}
        epoch = self.best and self.best[0]
        return next((dict(line) for line in self.history if line["epoch"] == epoch), {})

    @property
    def test_score(self) -> float | None:
        return self.scores("test").get(TEST_SCORE)


def with_minutes(history: Sequence[Mapping], started: int | None, ended: Mapping[int, float]) -> list[dict]:
    """The lines of `metrics.jsonl`, each with the `minutes` that the run had taken by then.

    A line knows the time of the clock, which goes on between two starts of a run. A checkpoint knows the seconds that
    the run itself had taken, over all its starts. Where the clock counts more than that up to a checkpoint, the longest
    waits for a line are cut, all at one length, until both agree.

    Args:
        history: the lines.
        started: when the first start began, in milliseconds since 1970; None: with the first line.
        ended: the run's own seconds at the end of those epochs that have a checkpoint.
    """
    if not history:
        return []
    times = [line["time"] for line in history]
    waits = np.maximum(np.diff([times[0] if started is None else started, *times]), 0) / 1000
    begin, before = 0, 0.0
    for end, line in enumerate(history, 1):
        if (seconds := ended.get(line["epoch"])) is not None:
            waits[begin:end] = _cut(waits[begin:end], max(0.0, seconds - before))
            begin, before = end, seconds
    return [dict(line) | {"minutes": float(m)} for line, m in zip(history, np.cumsum(waits) / 60, strict=True)]


def _cut(waits: np.ndarray, total: float) -> np.ndarray:
    """Waits, the longest cut at one length, so that their sum is at most `total`."""
    if waits.sum() <= total:
        return waits
    ordered = np.sort(waits)
    shorter = np.cumsum(ordered) - ordered
    # With the k shortest left whole, the others share the rest; a wrong k gives too short a length.
    return np.minimum(waits, ((total - shorter) / np.arange(len(waits), 0, -1)).max())


def differing(runs: Sequence[ComparedRun]) -> dict[str, list]:
    """The settings of which the runs have different values: the value of each run."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in NOT_COMPARED)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def by_class(runs: Sequence[ComparedRun], split: str) -> dict[str, list[float | None]]:
    """The IoU of each class on val (in the best epoch) or test: a value of each run. Empty where no run has any."""
    names = dict.fromkeys(item.name for run in runs for item in run.classes)
    found = {name: [run.scores(split).get(of_class(split, "iou", name)) for run in runs] for name in names}
    return found if any(value is not None for values in found.values() for value in values) else {}
