"""When those that fill a tree no longer go first."""

from __future__ import annotations

import pytest

from phauld.destination.fetching import gives_way


@pytest.mark.parametrize(
    ("processes", "processors", "gives"),
    [(1, 1, True), (2, 2, False), (8, 2, False), (9, 2, True), (50, 2, True), (50, 16, False), (200, 16, True)],
)
def test_a_tree_of_many_processes_gets_a_processor(processes: int, processors: int, gives: bool) -> None:
    assert gives_way(processes, processors) is gives
