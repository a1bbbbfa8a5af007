"""What an opening is granted, and what never."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaul_client.errors import InvalidRequest
from phauld.destination.admission import MAX_LEASE_SECONDS, MIN_LEASE_SECONDS, check_carried, lease_seconds

LOGS = Path("/var/log/phaul")


def test_files_come_to_where_logs_are() -> None:
    check_carried([LOGS / "web.log", LOGS / "..web"], LOGS)
    check_carried([], LOGS)


@pytest.mark.parametrize("path", ["/etc/passwd", "/var/log/phaul/a/b", "/var/log/phaul/..", "/var/log/phaul/a\0b", "a"])
def test_and_nowhere_else(path: str) -> None:
    with pytest.raises(InvalidRequest, match="outside of /var/log/phaul"):
        check_carried([LOGS / "web.log", Path(path)], LOGS)


@pytest.mark.parametrize(
    ("asked", "granted"),
    [(0.0, 30.0), (5.0, 5.0), (0.001, MIN_LEASE_SECONDS), (-1.0, MIN_LEASE_SECONDS), (1e9, MAX_LEASE_SECONDS)],
)
def test_a_lease_has_bounds(asked: float, granted: float) -> None:
    assert lease_seconds(asked, 30.0) == granted
