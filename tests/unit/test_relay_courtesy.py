"""A question for many pages waits while the tree touches its first ones, and not for long."""

import pytest

from phaul_client.relay_courtesy import LEAST_SECONDS, MOST_SECONDS, QUIET_SECONDS, Courtesy


def test_who_waits_never_waits_here() -> None:
    courtesy = Courtesy()
    assert not any(courtesy.gives_way(1, now / 100) for now in range(100))


def test_only_the_beginning_is_gentle() -> None:
    courtesy = Courtesy()
    assert courtesy.gives_way(16, 100.0)
    assert courtesy.gives_way(1024, 100.0 + LEAST_SECONDS - 0.01)
    assert not courtesy.gives_way(1024, 100.0 + LEAST_SECONDS)


def test_it_lasts_as_long_as_pages_are_touched() -> None:
    courtesy = Courtesy()
    courtesy.gives_way(16, 100.0)
    touched = 100.0 + LEAST_SECONDS + 0.1
    courtesy.gives_way(1, touched)
    assert courtesy.gives_way(16, touched + QUIET_SECONDS / 2)
    assert not courtesy.gives_way(16, touched + QUIET_SECONDS)


@pytest.mark.parametrize("after", [0.0, 1.0])
def test_and_never_for_ever(after: float) -> None:
    courtesy = Courtesy()
    courtesy.gives_way(16, 100.0)
    now = 100.0 + MOST_SECONDS + after
    courtesy.gives_way(1, now)
    assert not courtesy.gives_way(16, now)
