"""Search spaces: small readable YAML files, checked against the settings before anything starts.

A line is `setting: {draw: [values]}`. Draws: `uniform` and `loguniform` between two ends, `randint` between two
integers (both included), `choice` among values.
"""

import difflib
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Integer

from unet.cluster.planner import worker_bytes
from unet.config import SEARCHABLE, TrainSettings, flat, parse_yaml, read_named, unflat
from unet.errors import InputError
from unet.recipe.recipe import AUTO

SPACES = Path(__file__).resolve().parent.parent.parent / "tune_spaces"
DRAWS = {
    "uniform": tune.uniform,
    "loguniform": tune.loguniform,
    "randint": lambda low, high: tune.randint(low, high + 1),  # Tune leaves the upper end out
    "choice": lambda *values: tune.choice(list(values)),
}

COMBINATIONS = 64
"""How many complete draws are checked against the settings before a sweep starts."""


@dataclass(frozen=True)
class Space:
    """What a sweep searches.

    Attributes:
        draws: Tune's domain by setting.
        text: the YAML it was read from.
        largest: of the settings that it can draw, those whose training takes the most memory, for planning.
    """

    draws: dict[str, Domain]
    text: str
    largest: TrainSettings

    def grid(self) -> dict[str, dict]:
        """Every combination, in Tune's terms.

        Raises:
            InputError: a range has no grid.
        """
        found = {name: choices(domain) for name, domain in self.draws.items()}
        for name, values in found.items():
            if values is None:
                raise InputError(
                    f"--search grid needs choices, and {name} is drawn from a range: write "
                    f"`{name}: {{choice: [a, b]}}` in the space, or give --search random."
                )
        return {name: tune.grid_search(values) for name, values in found.items() if values is not None}

    def choosing(self, setting: str, values: list) -> "Space":
        """The same with other values to choose among for a setting."""
        return replace(self, draws=self.draws | {setting: tune.choice(values)})

    def described(self) -> str:
        return ", ".join(f"{name} {_described(domain)}" for name, domain in self.draws.items())


def read_space(name: str) -> str:
    """The YAML of `tune_spaces/NAME.yaml`, or of a file.

    Raises:
        InputError: there is no such space (with the nearest known).
    """
    return read_named("space", name, SPACES)


def parse_space(text: str, source: str, settings: TrainSettings) -> Space:
    """A space from its YAML.

    Raises:
        InputError: it names an unknown setting or draw (with the nearest known), or a value that does not fit.
    """
    content = parse_yaml(text, f"The space {source}")
    if not isinstance(content, dict) or not content:
        raise InputError(f"The space {source} needs lines such as `dropout: {{uniform: [0.0, 0.5]}}`.")
    base, draws, values = flat(settings), {}, {}
    for setting, draw in content.items():
        if setting not in SEARCHABLE:
            near = difflib.get_close_matches(str(setting), SEARCHABLE, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it can search {', '.join(sorted(SEARCHABLE))}."
            raise InputError(f"The space {source} cannot search {setting!r}; {hint}")
        draws[setting], values[setting] = _parse_draw(source, setting, draw)
        if setting == "precision" and AUTO in values[setting]:
            raise InputError(
                f"The space {source} draws precision {AUTO}, so its trials could not be compared: name the precisions."
            )
        for value in values[setting]:
            _settings(settings, {setting: value}, f"The space {source}")
        if isinstance(draws[setting], Categorical):  # as the settings read them: 1e-3 is a text in YAML
            values[setting] = [flat(_settings(settings, {setting: v}, source))[setting] for v in values[setting]]
            draws[setting] = tune.choice(values[setting])
        elif isinstance(base[setting], int) and not isinstance(draws[setting], Integer):
            raise InputError(f"The space {source}: {setting} is a whole number, so draw it with randint or choice.")
    random_state = np.random.RandomState(0)
    for _ in range(COMBINATIONS):
        drawn = {name: domain.sample(random_state=random_state) for name, domain in draws.items()}
        _settings(settings, drawn, f"The space {source} draws settings that do not fit together")
    return Space(draws, text, _largest(settings, values, f"The space {source}, at its largest"))


GROWING = ("base_filters", "depth", "blocks", "batch_size", "ema_decay")
"""Settings of which more takes more memory, or some takes more than none."""


def _largest(settings: TrainSettings, values: dict[str, list], what: str) -> TrainSettings:
    """Those of the drawn settings whose training takes the most memory: more of a number is never less of that."""
    ends = {name: [max(values[name])] for name in GROWING if name in values}
    kinds = {name: values[name] for name in ("network", "norm") if name in values}
    drawn = ends | kinds
    trials = (_settings(settings, dict(zip(drawn, each, strict=True)), what) for each in product(*drawn.values()))
    return max(trials, key=lambda trial: worker_bytes(trial, trial.training.batch_size))


def choices(domain: Domain | None) -> list | None:
    """What is chosen among; None where nothing is, or from a range."""
    return list(domain.categories) if isinstance(domain, Categorical) else None


def limits(domain: Domain) -> tuple[float, float]:
    """The ends of a range; of whole numbers, the upper one is the first that is not drawn."""
    assert isinstance(domain, Float | Integer)  # a space has nothing else but choices
    return domain.lower, domain.upper


def is_log(domain: Domain) -> bool:
    """Whether a range is drawn by its logarithm."""
    return "Log" in type(domain.get_sampler()).__name__


def _settings(settings: TrainSettings, drawn: dict, what: str) -> TrainSettings:
    try:
        return unflat(type(settings), flat(settings) | drawn)
    except InputError as error:
        raise InputError(f"{what}: {str(error).removeprefix('the settings: ')}") from error


def _parse_draw(source: str, setting: str, draw: Any) -> tuple[Domain, list]:
    """Tune's domain, and the values that the settings must accept: the ends of a range, or every choice."""
    if not isinstance(draw, dict) or len(draw) != 1:
        raise InputError(f"The space {source}: {setting} needs one draw, such as `{{uniform: [0.0, 0.5]}}`.")
    ((kind, values),) = draw.items()
    if kind not in DRAWS:
        near = difflib.get_close_matches(str(kind), DRAWS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(DRAWS)}."
        raise InputError(f"The space {source}: unknown draw {kind!r} for {setting}; {hint}")
    number = int if kind == "randint" else float
    try:
        if kind == "choice":
            if not isinstance(values, list) or not values:
                raise ValueError
        else:
            low, high = values = [number(v) for v in values]
            if not low < high or (kind == "loguniform" and low <= 0):
                raise ValueError
    except (TypeError, ValueError) as error:
        needs = "[a, b, …]" if kind == "choice" else "[low, high]" + (" above 0" if kind == "loguniform" else "")
        raise InputError(f"The space {source}: {setting} needs `{kind}: {needs}`.") from error
    return DRAWS[kind](*values), list(values)


def _described(domain: Domain) -> str:
    if (values := choices(domain)) is not None:
        return "{" + ", ".join(str(v) for v in values) + "}"
    low, high = limits(domain)
    last = high - 1 if isinstance(domain, Integer) else high
    scale = " (log)" if is_log(domain) else ""
    return f"{low:g}…{last:g}{scale}"
