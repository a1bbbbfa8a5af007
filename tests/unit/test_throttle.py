"""The steps of the throttle, and what pulls them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaul_client.rounds import History, IterStats
from phaul_client.throttle import MAX_PERCENT, is_exhausted, is_high, next_step, wanted_percent


def rounds(*pages_and_throttle: tuple[int, int]) -> History:
    return tuple(
        IterStats(
            started_at_seconds=float(index),
            duration_seconds=1.0,
            frozen_seconds=0.01,
            pages_scanned=10000,
            pages_written=pages,
            pages_skipped_parent=10000 - pages,
            bytes_sent=pages * 4096,
            transfer_seconds=0.9,
            throttle_percent=throttle_percent,
        )
        for index, (pages, throttle_percent) in enumerate(pages_and_throttle)
    )


def test_steps_are_those_of_auto_converge() -> None:
    steps = [0]
    while steps[-1] < MAX_PERCENT:
        steps.append(next_step(steps[-1]))
    assert steps == [0, 20, 30, 40, 50, 60, 70, 80, 90, 99]
    assert next_step(MAX_PERCENT) == MAX_PERCENT


def test_high_is_more_than_half_of_what_was_transferred() -> None:
    (before, half), (_, more) = rounds((1000, 0), (500, 0)), rounds((1000, 0), (501, 0))
    assert not is_high(before, half)
    assert is_high(before, more)


@pytest.mark.parametrize(
    ("history", "percent"),
    [
        pytest.param((), 0, id="nothing yet"),
        pytest.param(rounds((9000, 0)), 0, id="the first round is not dirtying"),
        pytest.param(rounds((9000, 0), (8000, 0)), 0, id="high once"),
        pytest.param(rounds((9000, 0), (8000, 0), (8000, 0)), 20, id="high for the second time"),
        pytest.param(rounds((9000, 0), (8000, 0), (1000, 0), (900, 0)), 20, id="the second time, not in a row"),
        pytest.param(rounds((9000, 0), (8000, 0), (8000, 0), (900, 0)), 0, id="no longer high"),
        pytest.param(
            rounds((9000, 0), (8000, 0), (8000, 0), (8000, 20)), 20, id="the step's effect is still to be seen"
        ),
        pytest.param(rounds((9000, 0), (8000, 0), (8000, 0), (8000, 20), (8000, 20)), 30, id="it was not enough"),
        pytest.param(rounds((9000, 0), (8000, 0), (8000, 0), (8000, 20), (2000, 20)), 20, id="it was enough"),
        pytest.param(rounds((9000, 99), (8000, 99), (8000, 99)), 99, id="the most"),
    ],
)
def test_triggers(history: History, percent: int) -> None:
    assert wanted_percent(history, stuck=False) == percent


def test_a_stuck_policy_pulls_a_step_but_never_two_at_once() -> None:
    assert wanted_percent(rounds((9000, 0), (100, 0)), stuck=True) == 20
    assert wanted_percent(rounds((9000, 0), (100, 20)), stuck=True) == 20
    assert wanted_percent(rounds((9000, 0), (100, 20), (100, 20)), stuck=True) == 30


def test_exhausted_when_the_last_step_has_been_seen() -> None:
    assert not is_exhausted(rounds((9000, 90), (8000, 90)))
    assert not is_exhausted(rounds((9000, 90), (8000, 99)))
    assert is_exhausted(rounds((9000, 90), (8000, 99), (8000, 99)))


@settings(deadline=None)
@given(
    history=st.lists(st.tuples(st.integers(0, 10000), st.integers(0, MAX_PERCENT)), min_size=1).map(
        lambda values: rounds(*values)
    ),
    stuck=st.booleans(),
)
def test_never_loosened_and_at_most_one_step(history: History, stuck: bool) -> None:
    percent = history[-1].throttle_percent
    assert wanted_percent(history, stuck=stuck) in (percent, next_step(percent))
