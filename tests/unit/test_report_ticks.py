"""The axis of the report: round numbers, not too many."""

from __future__ import annotations

import pytest

from phaul_client.cli.report import ticks


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (61.3, [0, 10, 20, 30, 40, 50, 60]),
        (100.0, [0, 20, 40, 60, 80, 100]),
        (475.9, [0, 100, 200, 300, 400]),
        (1999.0, [0, 200, 400, 600, 800, 1000, 1200, 1400, 1600, 1800]),
    ],
)
def test_ticks_are_round(end: float, expected: list[float]) -> None:
    assert ticks(end) == pytest.approx(expected)
