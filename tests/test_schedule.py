"""The learning rate over a run: pure functions, no TensorFlow."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet.errors import InputError
from unet.recipe.optimizer import OptimizerSettings, in_few_words, learning_rate
from unet.recipe.schedule import FIRST, RISE, Horizon

SCHEDULES = ("constant", "trapezoid", "cosine", "linear", "one_cycle")
RATE = 0.5
horizons = st.builds(Horizon, st.integers(1, 5000), st.integers(1, 500))


def rates(horizon: Horizon, schedule: str, warmup: str = "0") -> list[float]:
    settings = OptimizerSettings(learning_rate=RATE, schedule=schedule, warmup=warmup)
    return [learning_rate(settings, step, horizon) for step in range(1, horizon.steps + 1)]


@given(horizons, st.sampled_from(SCHEDULES), st.sampled_from(("0", "7", "100000", "2e", "0.5e", "5%", "99.9%")))
def test_every_rate_is_above_zero_and_at_most_the_full_one(horizon, schedule, warmup):
    found = rates(horizon, schedule, "0" if schedule == "one_cycle" else warmup)
    assert all(0 < rate <= RATE for rate in found)
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


@given(horizons.filter(lambda horizon: horizon.steps >= 100), st.sampled_from(SCHEDULES), st.sampled_from(("0", "20%")))
def test_it_makes_no_jumps_and_ends_near_zero(horizon, schedule, warmup):
    found = rates(horizon, schedule, "0" if schedule == "one_cycle" else warmup)
    steepest = math.pi / 2 / min(0.2, RISE) / horizon.steps
    assert all(abs(a - b) <= RATE * steepest * 1.01 for a, b in itertools.pairwise(found))
    assert (
        found[-1] == RATE if schedule == "constant" else found[-1] < (0.06 if schedule == "trapezoid" else 0.015) * RATE
    )


@given(horizons, st.sampled_from(SCHEDULES), st.integers(1, 10_000))
def test_beyond_its_end_it_stays(horizon, schedule, more):
    settings = OptimizerSettings(schedule=schedule)
    last = learning_rate(settings, horizon.steps, horizon)
    assert learning_rate(settings, horizon.steps + more, horizon) == last


def test_its_numbers():
    assert rates(Horizon(4, 2), "linear") == pytest.approx([RATE * share for share in (0.8, 0.6, 0.4, 0.2)])
    cosine = [RATE * (1 + math.cos(math.pi * step / 5)) / 2 for step in (1, 2, 3, 4)]
    assert rates(Horizon(4, 2), "cosine") == pytest.approx(cosine)
    fall = rates(Horizon(14, 2), "trapezoid")
    assert fall == pytest.approx([RATE * share for share in (*[1.0] * 12, 2 / 3, 1 / 3)])
    for warmup in ("4", "2e", "40%"):  # of ten steps, two in an epoch
        assert rates(Horizon(10, 2), "constant", warmup) == [RATE * share for share in (0.25, 0.5, 0.75, *[1.0] * 7)]
    cycle = rates(Horizon(1000, 10), "one_cycle")
    assert cycle.index(max(cycle)) == 1000 * RISE - 1 and max(cycle) == RATE
    assert cycle[0] == pytest.approx(RATE * FIRST, rel=0.01) and cycle[149] == pytest.approx(RATE * (1 + FIRST) / 2)
    assert cycle[649] == pytest.approx(RATE / 2, rel=0.01)


def test_with_the_defaults_the_rate_is_the_setting_itself():
    settings = OptimizerSettings(learning_rate=0.00123)
    assert {learning_rate(settings, step, Horizon(7, 2)) for step in range(1, 12)} == {0.00123}
    assert in_few_words(OptimizerSettings()) == "Adam 0.001"
    changes = {"optimizer": "muon", "schedule": "one_cycle", "weight_decay": 0.05, "ema_decay": 0.999}
    assert in_few_words(OptimizerSettings(**changes)) == "Muon 0.001 one-cycle, weight decay 0.05, average 0.999"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"warmup": "2 epochs"}, "--warmup 2 epochs is not a length: write 200 for steps, 2e for epochs, 5%"),
        ({"warmup": "-5%"}, "--warmup -5% is not a length"),
        ({"warmup": "100%"}, "--warmup 100% is the whole run: give less than 100%"),
        ({"warmup": "5%", "schedule": "one_cycle"}, "one_cycle has a rise of its own: give --warmup 0"),
        ({"weight_decay": 0.1}, "--weight-decay 0.1 is not for adam: give --optimizer adamw"),
        ({"weight_decay": -1, "optimizer": "adamw"}, "--weight-decay -1: input should be greater than or equal to 0"),
        ({"momentum": 0.9}, "--momentum 0.9 is for sgd and muon: give --momentum None with adam"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "--momentum 1.0: input should be less than 1"),
        ({"ema_decay": 1.0}, "--ema-decay 1.0: input should be less than 1"),
        (
            {"schedule": "cosin"},
            "--schedule cosin: input should be 'constant', 'trapezoid', 'cosine', 'linear' or 'one_cycle'",
        ),
        ({"optimizer": "adan"}, "--optimizer adan: input should be 'adam', 'adamw', 'sgd' or 'muon'"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(changes, words):
    with pytest.raises(InputError) as error:
        OptimizerSettings(**changes)
    assert words in str(error.value)
