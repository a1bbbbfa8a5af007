"""What a finished round of pre-copy measured, and the limits a migration must keep.

Pure values, shared by the forecast, the policies and the throttle. Times are plain floats from one monotonic clock of
the source; no previous round is an empty history, never a zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

PAGE_SIZE_BYTES: Final = 4096
_NONSENSE: Final = 1e15


@dataclass(frozen=True, slots=True, kw_only=True)
class IterStats:
    """One finished pre-dump as the source measured it.

    Values that make no sense (negative, NaN, infinite) do not raise: a migration in flight must not die of a bad
    statistic. Whoever derives something from them reads them through `usable`.
    """

    started_at_seconds: float
    """When criu was told to pre-dump, on a monotonic clock: the snapshot of memory follows at once."""
    duration_seconds: float
    """From started_at_seconds until the destination has confirmed the round."""
    frozen_seconds: float
    """How long this round held the tree still (criu's freezing_time and frozen_time)."""
    pages_scanned: int
    pages_written: int
    pages_skipped_parent: int
    bytes_sent: int
    """Bytes on the wire, headers and compression included."""
    transfer_seconds: float
    """Time spent sending them: criu's memwrite_time."""
    throttle_percent: int = 0
    """The throttle set when the round began. What it holds back is found by the next round, not by this one."""


History = tuple[IterStats, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user wants and what is known beforehand.

    Raises ValueError for values that cannot be meant, before anything has been started.
    """

    downtime_goal_seconds: float = 0.3
    deadline_seconds: float | None = None
    """By when the move should be over, counted from the start of the first round; None: no deadline."""
    max_rounds: int = 30
    min_pages: int = 64
    """A round that wrote fewer pages shows an idle process: another one brings nothing."""
    max_growth_ratio: float = 1.1
    """A round that dirtied more than this times the one before it grows; two in a row diverge."""
    plateau_rounds: int = 3
    """That many rounds in a row (seen or foreseen) that do not pay make a plateau."""
    fixed_cost_prior_seconds: float = 0.05
    """The fixed part of the pause, used only until a round has measured it."""
    switch_cost_seconds: float | None = None
    """State dump, commit and restore of an empty tree, from an earlier move between these nodes; None: not known,
    the rounds' own overhead stands for it."""
    restore_seconds_per_byte: float = 0.0
    """How long the destination reads memory per byte before the tree runs; 0 with lazy restore."""
    image_bytes: int = 0
    """Small images (everything but pages) that are copied inside the pause."""
    bandwidth_limit_bytes_per_second: float | None = None
    allow_throttle: bool = False
    allow_postcopy: bool = False
    postcopy_after_seconds: float | None = None
    """With allow_postcopy: switch when that much time has gone without reaching the goal."""

    def __post_init__(self) -> None:
        for name in ("downtime_goal_seconds", "fixed_cost_prior_seconds", "restore_seconds_per_byte", "image_bytes"):
            _require(name, getattr(self, name), minimum=0)
        for name in ("max_rounds", "min_pages"):
            _require(name, getattr(self, name), minimum=0)
        _require("max_growth_ratio", self.max_growth_ratio, minimum=1)
        _require("plateau_rounds", self.plateau_rounds, minimum=1)
        for name in ("deadline_seconds", "switch_cost_seconds", "postcopy_after_seconds"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), minimum=0)
        if self.bandwidth_limit_bytes_per_second is not None:
            _require("bandwidth_limit_bytes_per_second", self.bandwidth_limit_bytes_per_second, minimum=1)


def usable(value: float) -> float:
    """`value` if it can be a time in seconds or a rate per second, else 0."""
    return value if 0 < value < _NONSENSE else 0.0  # false for NaN


def elapsed_seconds(history: History) -> float:
    """From the start of the first round to the end of the latest."""
    if not history:
        return 0.0
    first, last = history[0], history[-1]
    return usable(last.started_at_seconds - first.started_at_seconds) + usable(last.duration_seconds)


def _require(name: str, value: float, *, minimum: float) -> None:
    if not math.isfinite(value) or value < minimum:
        raise ValueError(f"{name} must be a finite number of at least {minimum}, not {value!r}")
