"""What a step depends on by its place in the run, such as the learning rate: of how long the run is to be.

Nothing about it is remembered, so a run that continues needs no more than its step; one that is made longer goes on
with the rate that a run of the new length has there.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["constant", "trapezoid", "cosine", "linear", "one_cycle"]

RISE = 0.3
"""The share of its steps in which one_cycle rises."""
FALL = 0.2
"""The share of its steps, behind the warm-up, in which trapezoid falls."""
FIRST = 1 / 25
"""What one_cycle begins with, as a share of the full rate; as in PyTorch and fast.ai."""


@dataclass(frozen=True)
class Horizon:
    """How long a run is to be.

    Attributes:
        steps: in all.
        epoch_steps: in an epoch.
    """

    steps: int
    epoch_steps: int


def part_of_run(flag: str, text: str, horizon: Horizon) -> float:
    """How many steps a flag means: '200' steps, '2e' epochs or '5%' of the run.

    Raises:
        ValueError: it is written otherwise, or is 100% of the run or more.
    """
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)(e|%)", text.strip())
    if not match:
        raise ValueError(f"{flag} {text} is not a length: write 200 for steps, 2e for epochs, 5% of the run")
    if match[1]:
        return int(match[1])
    number = float(match[2])
    if match[3] == "e":
        return number * horizon.epoch_steps
    if number >= 100:
        raise ValueError(f"{flag} {text} is the whole run: give less than 100%")
    return number / 100 * horizon.steps


def share_of_rate(schedule: Schedule, warmup: str, step: int, horizon: Horizon) -> float:
    """What share of the full rate a step has, in (0, 1].

    `step` counts from 1; beyond the horizon it is as at its last step. The warm-up rises linearly (Goyal et al., 2017)
    and reaches the full rate at its last step; then constant, or down to almost 0 at the horizon: by half a cosine
    (Loshchilov, Hutter, 2017), linearly, or at the end only (trapezoid: Hägele et al., 2024). one_cycle (Smith,
    Topin, 2018) rises and falls by half cosines, without its changes of the momentum.
    """
    if schedule == "one_cycle":
        rise = RISE * horizon.steps
        if step <= rise:
            return FIRST + (1 - FIRST) * (1 - _half_cosine(step / rise))
        return _half_cosine(_way(step, rise, horizon.steps))
    warm = part_of_run("--warmup", warmup, horizon)
    if step < warm:
        return step / warm
    return _FALLS[schedule](_way(step, warm, horizon.steps))


def _way(step: int, begin: float, end: int) -> float:
    """How far a step is from `begin` to the step after the last, in [0, 1): so that the last one still changes
    something."""
    return max(0.0, min(step, end) - begin) / (max(0.0, end - begin) + 1)


def _half_cosine(way: float) -> float:
    return (1 + math.cos(math.pi * way)) / 2


_FALLS: dict[str, Callable[[float], float]] = {
    "constant": lambda way: 1.0,
    "trapezoid": lambda way: min(1.0, (1 - way) / FALL),
    "cosine": _half_cosine,
    "linear": lambda way: 1 - way,
}
