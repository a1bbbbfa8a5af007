"""A question for many pages waits while the tree touches its first ones, and not for long."""

import pytest

from phaul_client.relay_courtesy import LEAST_SECONDS, MOST_SECONDS, PAGES_PER_SECOND, QUIET_SECONDS, Courtesy

MANY = 10 * PAGES_PER_SECOND  #: ten seconds' worth


def test_who_waits_never_waits_here() -> None:
    courtesy = Courtesy(MANY)
    assert not any(courtesy.gives_way(1, 0, now / 100) for now in range(100))


def test_only_the_beginning_is_gentle() -> None:
    courtesy = Courtesy(MANY)
    assert courtesy.gives_way(16, 0, 100.0)
    assert courtesy.gives_way(1024, 0, 100.0 + LEAST_SECONDS - 0.01)
    assert not courtesy.gives_way(1024, 0, 100.0 + LEAST_SECONDS)


def test_it_lasts_as_long_as_pages_are_touched() -> None:
    courtesy = Courtesy(MANY)
    courtesy.gives_way(16, 0, 100.0)
    touched = 100.0 + LEAST_SECONDS + 0.1
    courtesy.gives_way(1, 0, touched)
    assert courtesy.gives_way(16, 0, touched + QUIET_SECONDS / 2)
    assert not courtesy.gives_way(16, 0, touched + QUIET_SECONDS)


@pytest.mark.parametrize("after", [0.0, 1.0])
def test_and_never_for_ever(after: float) -> None:
    courtesy = Courtesy(MANY)
    courtesy.gives_way(16, 0, 100.0)
    now = 100.0 + MOST_SECONDS + after
    courtesy.gives_way(1, 0, now)
    assert not courtesy.gives_way(16, 0, now)


def test_what_is_filled_in_a_moment_is_not_held_back() -> None:
    assert not Courtesy(PAGES_PER_SECOND // 10).gives_way(16, 0, 100.0)


def test_unless_the_link_turns_out_to_be_slow() -> None:
    courtesy = Courtesy(PAGES_PER_SECOND // 10)
    courtesy.gives_way(16, 0, 100.0)
    assert courtesy.gives_way(16, 100, 100.1)
