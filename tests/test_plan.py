"""How long a run is to be: steps that fit into a time, and what a change of the length means."""

from conftest import state_of
from hypothesis import given
from hypothesis import strategies as st

from unet.config import TrainSettings, TuneSettings, unflat
from unet.training.plan import (
    FINISH_SECONDS,
    Pace,
    change_of_rate,
    has_ended,
    horizon,
    planned_steps,
    steps_that_fit,
)

seconds = st.floats(0.001, 1000)


@given(st.floats(-10, 1e5), seconds, seconds, st.integers(1, 300), st.data())
def test_the_steps_that_fit_fit_with_their_validations_and_little_is_left(left, step, epoch_end, epoch_steps, data):
    done = data.draw(st.integers(0, epoch_steps - 1))
    found = steps_that_fit(left, step, epoch_end, epoch_steps, done)

    def taken(steps: int) -> float:
        return steps * step + -(-(done + steps) // epoch_steps) * epoch_end

    assert found >= 0
    assert not found or taken(found) <= left * (1 + 1e-9) + 1e-6
    assert left - taken(found) <= 2 * (epoch_end + step) + 1e-6


def test_a_last_part_that_is_shorter_than_its_validation_is_left_out():
    assert steps_that_fit(9, 1, 5, epoch_steps=10, done=0) == 0 and steps_that_fit(11, 1, 5, 10, done=0) == 6
    assert steps_that_fit(9, 1, 5, epoch_steps=10, done=1) == 4  # one that is begun is scored as it is
    assert steps_that_fit(15 + 9, 1, 5, epoch_steps=10, done=0) == 10


def settings_of(**changes) -> TrainSettings:
    return unflat(TrainSettings, {"schedule": "linear", "learning_rate": 1.0} | changes)


def test_minutes_are_planned_by_the_measured_pace_and_what_must_follow():
    state = state_of(settings_of(minutes=10), step=25, epoch_step=25)
    pace = Pace(600, epoch_steps=100, val_batches=10, test_batches=20)
    assert pace.planned(state, 30) is None and pace.planned(state, 700) == 25  # nothing is measured; the time is over
    for _ in range(19):
        pace.stepped(2.0)
        assert not pace.is_due(30)
    pace.stepped(2.0)
    assert pace.is_due(30)
    # A scored batch is taken for half a step, until one was seen: 10 s an epoch, 20 s the test.
    left = 600 - 30 - FINISH_SECONDS - 20
    assert pace.planned(state, 30) == 25 + 75 + 100 + int((left - 160 - 210 - 10) / 2)
    for _ in range(30):
        pace.stepped(4.0)
    assert not pace.is_due(59) and pace.is_due(60)  # a twentieth of the time later
    pace.validated(5.0)
    assert pace.planned(state, 60) == 25 + 75 + int((600 - 60 - FINISH_SECONDS - 10 - 75 * 3 - 5 - 5) / 3)
    assert not pace.is_due(500) and pace.is_due(575)  # the next one is the last


def test_steps_of_a_frozen_encoder_are_measured_by_themselves():
    """Two epochs of them at a second each; the others are taken for twice as long, until they are measured."""
    state = state_of(settings_of(minutes=10), step=20, epoch_step=20)
    pace = Pace(600, epoch_steps=50, val_batches=0, test_batches=0, frozen=100)
    for _ in range(20):
        pace.stepped(1.0, is_frozen=True)
    assert pace.planned(state, 0) == 100 + (600 - 80) / 2
    pace.stepped(3.0)
    later = state_of(settings_of(minutes=10), step=110, epoch=3, epoch_step=10, planned_steps=360)
    assert pace.planned(later, 90) == 110 + (600 - 90) / 3
    short = Pace(60, epoch_steps=50, val_batches=0, test_batches=0, frozen=100)
    for _ in range(20):
        short.stepped(1.0, is_frozen=True)
    assert short.planned(state, 10) == 20 + 50


def test_a_run_ends_with_its_epochs_its_plan_or_its_patience():
    def ended(settings, planned=None, **facts):
        return has_ended(settings, state_of(settings, **facts), planned)

    assert settings_of().epochs == TuneSettings().epochs == 10 and settings_of(minutes=3).epochs is None
    assert unflat(TuneSettings, {"minutes": 3}).epochs == 10  # which are the sweep's
    assert ended(settings_of(), epoch=11) and not ended(settings_of(), epoch=10)
    timed = settings_of(minutes=3)
    assert not ended(timed, None, epoch=99, step=990) and not ended(timed, 991, epoch=99, step=990)
    assert ended(timed, 990, epoch=99, step=990) and not ended(timed, 990, epoch=99, step=990, epoch_step=4)
    assert ended(settings_of(minutes=3, epochs=5), 990, epoch=6, step=50)
    assert ended(settings_of(minutes=3, patience=2), None, epoch=4, step=40, stale_epochs=2)


def test_another_length_says_what_becomes_of_the_rate():
    before = settings_of(epochs=10)
    state = state_of(before, step=49, epoch=5, epoch_step=9, planned_steps=100)

    def said(settings, state):
        return change_of_rate(settings, state, planned_steps(settings, state, 10), 10)

    assert said(before, state) is None
    assert said(settings_of(epochs=20), state) == (
        "The learning rate goes on at 0.75 instead of 0.5, as in a run of 20 epochs."
    )
    ended = state_of(before, step=100, epoch=11, planned_steps=100)
    assert said(settings_of(epochs=20), ended) == (
        "The run had ended with a learning rate of 0.0099; it goes on at 0.5, as in a run of 20 epochs."
    )
    assert said(settings_of(epochs=20, schedule="constant"), state) is None
    timed = state_of(settings_of(minutes=3), step=49, epoch=5, epoch_step=9, planned_steps=100)
    assert said(settings_of(minutes=3), timed) is None
    assert said(settings_of(minutes=6, epochs=40), timed).endswith("0.5, as in a run of 6 minutes, at most 40 epochs.")
    assert planned_steps(settings_of(minutes=6), timed, 10) == 200
    # Epochs that are given as well end the schedule, but do not make a run that the clock ended a finished one.
    both = settings_of(minutes=6, epochs=12)
    assert horizon(both, 200, 10).steps == 120 and horizon(both, None, 10).steps == 120
    assert not has_ended(both, state_of(both, step=100, epoch=11), planned_steps(both, timed, 0))
    assert planned_steps(settings_of(minutes=6), state, 10) is None and said(settings_of(minutes=6), state) is None
