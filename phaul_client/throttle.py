"""How far to hold a writer back that outruns the link: QEMU's auto-converge, step by step, as a pure function.

The shell turns the percentage into a duty cycle of the cgroup freezer, or into cpu.max where there is one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from phaul_client.rounds import PAGE_SIZE_BYTES, History, IterStats

INITIAL_PERCENT: Final = 20
INCREMENT_PERCENT: Final = 10
MAX_PERCENT: Final = 99
TRIGGER_PERCENT: Final = 50
"""A round is high when it found more than this share of what was transferred since the snapshot before it dirty."""
TRIGGER_ROUNDS: Final = 2
"""The first step waits for the second high round; a later one for a round that was dirtied under the step before."""


def next_step(percent: int) -> int:
    """The throttle after `percent`: 20, 30 … 90, 99."""
    if percent < INITIAL_PERCENT:
        return INITIAL_PERCENT
    return min(MAX_PERCENT, percent + INCREMENT_PERCENT)


def is_high(before: IterStats, stats: IterStats) -> bool:
    """Whether `stats` found more than half of the bytes dirty that `before` transferred meanwhile."""
    dirty_bytes = max(0, stats.pages_written) * PAGE_SIZE_BYTES
    transferred_bytes = max(0, before.pages_written) * PAGE_SIZE_BYTES
    return dirty_bytes * 100 > transferred_bytes * TRIGGER_PERCENT


def wanted_percent(history: History, *, stuck: bool) -> int:
    """The throttle for the next round.

    A step more if dirtying keeps up with the transfer, or if the policy is `stuck`: it would end above the goal. The
    present one while its effect has not been seen: the round that set it still found what was dirtied before.
    """
    if not history:
        return 0
    percent = history[-1].throttle_percent
    if not is_settled(history):
        return percent
    high = [is_high(before, stats) for before, stats in pairwise(history)]
    outrun = any(high[-1:]) and (percent > 0 or sum(high) >= TRIGGER_ROUNDS)
    return next_step(percent) if stuck or outrun else percent


def is_settled(history: History) -> bool:
    """Whether the latest round found what was dirtied under the present throttle."""
    before_percent = history[-2].throttle_percent if len(history) > 1 else 0
    return history[-1].throttle_percent == before_percent


def is_exhausted(history: History) -> bool:
    """Whether the last step has been made and its effect seen."""
    return history[-1].throttle_percent >= MAX_PERCENT and is_settled(history)
