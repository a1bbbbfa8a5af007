"""Processes that write to their memory, synthetic and recorded, for `simulator.py`.

Pages are dirtied as sets, so that a page written twice between two snapshots counts once. Nothing is random.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Final

from phaul_client.rounds import PAGE_SIZE_BYTES

MIB: Final = 1 << 20
UNIT_PAGES: Final = 4
"""Pages that one write dirties: coarse enough to be quick, fine enough to be a set."""
UNIT_BYTES: Final = UNIT_PAGES * PAGE_SIZE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A process that writes to its memory. Its time stands while it is frozen and slows under a throttle."""

    name: str
    memory_bytes: int
    written_bytes: Callable[[float], float]
    """Bytes written from its start until that second of its own time."""
    target: Callable[[int], int]
    """Which unit of memory the n-th write hits."""

    def dirtied(self, start_seconds: float, end_seconds: float) -> set[int]:
        """Units written between two moments of its own time."""
        first, last = (int(self.written_bytes(moment) / UNIT_BYTES) for moment in (start_seconds, end_seconds))
        return {self.target(write) for write in range(first, last)}


def _scattered(write: int) -> int:
    """A number that looks random, the same every time."""
    mixed = (write + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    return mixed ^ mixed >> 31


def steady(name: str, rate_bytes_per_second: float, *, memory_bytes: int, region_bytes: int) -> Workload:
    """Writes through a region from its start to its end, again and again."""
    units = region_bytes // UNIT_BYTES
    return Workload(
        name=name,
        memory_bytes=memory_bytes,
        written_bytes=lambda seconds: seconds * rate_bytes_per_second,
        target=lambda write: write % units,
    )


def skewed(name: str, rate_bytes_per_second: float, *, memory_bytes: int) -> Workload:
    """As a key-value store under load: 80 % of the writes hit 5 % of memory, the rest any of it."""
    units = memory_bytes // UNIT_BYTES
    hot_units = units // 20

    def target(write: int) -> int:
        number = _scattered(write)
        return number // 5 % hot_units if number % 5 else number // 5 % units

    return Workload(
        name=name,
        memory_bytes=memory_bytes,
        written_bytes=lambda seconds: seconds * rate_bytes_per_second,
        target=target,
    )


def bursty_bytes(seconds: float) -> float:
    """2 MB/s, and 82 MB/s from the second to the fourth second of every five."""
    whole, rest = divmod(seconds, 5.0)
    return 2e6 * seconds + 80e6 * (whole * 2.0 + min(2.0, max(0.0, rest - 2.0)))


def recorded(name: str, rounds: Sequence[tuple[float, int]], *, memory_bytes: int) -> Workload:
    """Replay (seconds of a window, bytes found dirty in it); after the last the same rate goes on."""
    ends_seconds = list(accumulate(seconds for seconds, _ in rounds))
    total_bytes = list(accumulate(dirty_bytes for _, dirty_bytes in rounds))
    units = memory_bytes // UNIT_BYTES

    def written_bytes(moment_seconds: float) -> float:
        before_seconds, before_bytes = 0.0, 0
        for end_seconds, end_bytes in zip(ends_seconds, total_bytes, strict=True):
            if moment_seconds <= end_seconds or end_seconds == ends_seconds[-1]:
                share = (moment_seconds - before_seconds) / (end_seconds - before_seconds)
                return before_bytes + share * (end_bytes - before_bytes)
            before_seconds, before_bytes = end_seconds, end_bytes
        return 0.0

    return Workload(name=name, memory_bytes=memory_bytes, written_bytes=written_bytes, target=lambda n: n % units)


def read_trace(path: Path) -> list[Workload]:
    """The cases of a report of `./check vm --json` as workloads. Raises OSError, ValueError or KeyError."""
    workloads = []
    for case in json.loads(path.read_text())["cases"]:
        rounds = case["rounds"]
        if len(rounds) < 2:
            continue
        windows = [
            (before["duration_ms"] / 1000, after["pages_written"] * PAGE_SIZE_BYTES)
            for before, after in pairwise(rounds)
        ]
        memory_bytes = rounds[0]["pages_written"] * PAGE_SIZE_BYTES
        workloads.append(recorded(f"recorded: {case['name']}", windows, memory_bytes=memory_bytes))
    return workloads
