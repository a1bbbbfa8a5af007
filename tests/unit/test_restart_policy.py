"""Restarts as a table: every case by name, and what holds for all of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as some

from phauld.trees.restart_policy import (
    ENDED,
    FIRST_DELAY_SECONDS,
    LONG_RUN_SECONDS,
    LONGEST_DELAY_SECONDS,
    NEVER,
    STANDINGS,
    Act,
    Attempts,
    Ending,
    Restart,
    Standing,
    When,
    after_running,
    decide,
)

ALWAYS = Restart(when=When.ALWAYS)
ON_FAILURE = Restart(when=When.ON_FAILURE)
AGAIN = {
    (When.ON_FAILURE, Ending.FAILURE),
    (When.ALWAYS, Ending.SUCCESS),
    (When.ALWAYS, Ending.FAILURE),
    (When.ALWAYS, Ending.UNSEEN),
}
attempts = some.builds(Attempts, restarts=some.integers(0, 10**6), in_a_row=some.integers(0, 10**6))
restarts = some.builds(Restart, when=some.sampled_from(When), most=some.integers(0, 5))
seconds = some.floats(-1e6, 1e9)


def test_the_tables_know_every_case() -> None:
    assert set(ENDED) == set(itertools.product(When, Ending))
    assert set(STANDINGS) == set(Standing)


@pytest.mark.parametrize("case", list(itertools.product(When, Ending)), ids=str)
def test_what_has_ended_here(case: tuple[When, Ending]) -> None:
    verdict = decide(Restart(when=case[0]), Attempts(), Standing.HERE, case[1], 1)
    expected = Act.WAIT if case[1] is Ending.NOT_YET else Act.RESTART if case in AGAIN else Act.LEAVE
    assert verdict.act is expected


@given(restarts, attempts, some.sampled_from(Standing), some.sampled_from(Ending), seconds)
def test_it_is_started_only_where_it_is_known_to_run_nowhere(
    restart: Restart, so_far: Attempts, standing: Standing, ending: Ending, ran: float
) -> None:
    verdict = decide(restart, so_far, standing, ending, ran)
    if verdict.act is Act.RESTART:
        assert standing is Standing.HERE
        assert ending in (Ending.SUCCESS, Ending.FAILURE, Ending.UNSEEN)
        assert restart != NEVER
        assert verdict.attempts.restarts == so_far.restarts + 1
        assert 1 <= verdict.attempts.in_a_row <= so_far.in_a_row + 1
        assert FIRST_DELAY_SECONDS <= verdict.delay_seconds <= LONGEST_DELAY_SECONDS
        if restart.when is When.ON_FAILURE and restart.most:
            assert verdict.attempts.restarts <= restart.most
    if standing in (Standing.LEAVING, Standing.ARRIVING):
        assert verdict.act is Act.WAIT
    if standing in (Standing.MOVED, Standing.STOPPED) or ending is Ending.NEVER_RAN:
        assert verdict.act is not Act.RESTART


def delays(number: int, ran_seconds: float = 0) -> list[float]:
    so_far = Attempts()
    found: list[float] = []
    for _ in range(number):
        verdict = decide(ALWAYS, so_far, Standing.HERE, Ending.FAILURE, ran_seconds)
        so_far, found = verdict.attempts, [*found, verdict.delay_seconds]
    return found


def test_each_delay_is_twice_the_one_before_up_to_a_minute() -> None:
    found = delays(2000)
    assert [round(each, 3) for each in found[:10]] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2]
    assert set(found[10:]) == {60.0}


def test_who_ran_for_long_begins_anew_but_counts_on() -> None:
    assert delays(3, LONG_RUN_SECONDS) == [0.1, 0.1, 0.1]
    many = Attempts(restarts=7, in_a_row=7)
    assert after_running(many, LONG_RUN_SECONDS) == Attempts(restarts=7)
    assert after_running(many, LONG_RUN_SECONDS - 0.01) == many


@pytest.mark.parametrize(("so_far", "act"), [(0, Act.RESTART), (2, Act.RESTART), (3, Act.LEAVE), (4, Act.LEAVE)])
def test_a_number_of_restarts_is_one_in_all(so_far: int, act: Act) -> None:
    three = Restart(when=When.ON_FAILURE, most=3)
    assert decide(three, Attempts(restarts=so_far), Standing.HERE, Ending.FAILURE, 1000).act is act


def test_a_node_that_was_booted_starts_what_is_always_to_run() -> None:
    assert decide(ALWAYS, Attempts(), Standing.HERE, Ending.UNSEEN, 0).act is Act.RESTART
    assert decide(ON_FAILURE, Attempts(), Standing.HERE, Ending.UNSEEN, 0).act is Act.LEAVE
