"""A sweep as it is compared: its trials, and which of its settings mattered."""

from dataclasses import dataclass
from typing import NamedTuple

from unet.comparison.runs import ComparedRun
from unet.config import CONFIG, TuneSettings, read_config, unflat
from unet.metric_names import BEST
from unet.runs.run import read_summary
from unet.storage import Folder
from unet.terminal import Display
from unet.tuning.importance import LEAST_TRIALS, importance_spans, parameter_importance
from unet.tuning.ledger import Ledger, ranked
from unet.tuning.space import Space, choices, parse_space
from unet.tuning.sweep import SPACE


class Importance(NamedTuple):
    """The share of the scores' variance that a setting explains, and its interval over resamples of the trials."""

    setting: str
    share: float
    span: tuple[float, float] | None


@dataclass(frozen=True)
class ComparedSweep:
    """A sweep.

    Attributes:
        name, folder: of the sweep.
        trials: how many have begun.
        scored: how many of them have a score.
        mlflow_run_id: of its own run.
        importance: of each searched setting, the most important first; empty where it cannot be told.
    """

    name: str
    folder: Folder
    trials: int
    scored: int
    mlflow_run_id: str | None
    importance: list[Importance]

    @property
    def told(self) -> str:
        """What its trials say about the settings, in a sentence."""
        if not self.importance:
            few = self.scored < LEAST_TRIALS
            why = f"that takes {LEAST_TRIALS} trials with a score" if few else "all trials scored the same"
            return f"Which setting mattered cannot be told from {self.scored} trials: {why}."
        first, *others = self.importance
        clear = [o for o in others if first.span and o.span and o.span[1] < first.span[0]]
        if len(clear) == len(others):
            return f"{first.setting} mattered most."
        rivals = ", ".join(o.setting for o in others if o not in clear)
        return f"{first.setting} may have mattered most, but {self.scored} trials do not set it apart from {rivals}."


def read_sweep(name: str, folder: Folder, most: int, display: Display) -> tuple[ComparedSweep, list[ComparedRun]]:
    """A sweep and its best trials, at most so many, the best first.

    Raises:
        InputError: its folder is damaged.
    """
    rows = ranked(Ledger(folder).rows)
    settings = unflat(TuneSettings, read_config(folder), f"{folder}/{CONFIG}")
    space = _with_drawn(parse_space(folder.read_text(SPACE), f"{folder}/{SPACE}", settings), rows)
    seed = settings.training.seed
    shares = parameter_importance(rows, space, seed)
    resampled = lambda done, of: display.working("importance of the settings", done, of)  # noqa: E731
    spans = importance_spans(rows, space, seed, resampled) if shares else {}
    importance = [Importance(setting, share, spans.get(setting)) for setting, share in shares.items()]
    scored = sum(row[BEST] is not None for row in rows)
    sweep = ComparedSweep(name, folder, len(rows), scored, read_summary(folder).get("mlflow_run_id"), importance)
    begun = [row["trial"] for row in rows if (folder / row["trial"]).exists(CONFIG)]
    return sweep, [ComparedRun.of_folder(trial, f"{name}/{trial}", folder / trial) for trial in begun[:most]]


def _with_drawn(space: Space, rows: list[dict]) -> Space:
    """The space, whose choices hold what was drawn too: a choice such as `auto` becomes numbers when a sweep begins."""
    for name, domain in space.draws.items():
        if (known := choices(domain)) is not None:
            drawn = [row["settings"][name] for row in rows if row["settings"][name] not in known]
            space = space.choosing(name, [*known, *dict.fromkeys(drawn)])
    return space
