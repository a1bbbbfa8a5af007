"""How long the pause would be if the final dump began now: pure arithmetic over the rounds so far.

    pause = fixed cost + (dirty bytes at the stop + image bytes) / bandwidth + memory bytes * restore time per byte

Dirty bytes at the stop are not the bytes of the last round: they are what the process dirties between the snapshot of
the last round and the stop, that is during the last round. See docs/policy.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Final

from phaul_client.rounds import PAGE_SIZE_BYTES, History, IterStats, Limits, usable

ASSUMED_BANDWIDTH_BYTES_PER_SECOND: Final = 117e6
"""1 Gbit/s less framing; used only while no round has moved a byte in a measurable time."""
BANDWIDTH_SAMPLE_BYTES: Final = 16 << 20
"""A round that sent less mostly measures socket buffers and round trips."""
LONGER_WINDOW_RATIO: Final = 1.25
"""Two windows must differ by this much before their ratio says how dirtying grows with time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The pause expected if the tree were stopped now, and what it is made of."""

    expected_pause_seconds: float
    fixed_seconds: float
    transfer_seconds: float
    image_seconds: float
    restore_seconds: float
    dirty_bytes: float
    """Memory expected to be dirty at the stop; after one round only a bound: everything that round wrote."""
    dirty_rate_bytes_per_second: float
    """Measured over the window before the latest round; 0 while only one round is known."""
    bandwidth_bytes_per_second: float
    next_round_seconds: float
    """How long another round would take."""
    next_gain_seconds: float
    """By how much another round is expected to shorten the pause (negative: lengthen it)."""


@dataclass(frozen=True, slots=True)
class _Window:
    """What was dirtied between two snapshots."""

    seconds: float
    pages: int
    throttle_percent: int


def forecast(history: History, limits: Limits) -> Forecast:
    """Forecast the pause after `history`; raises ValueError if no round has been run."""
    if not history:
        raise ValueError("no round, no forecast")
    costs = _Costs.measure(history, limits)
    windows = _windows(history)
    dirty_pages = _dirty_pages(windows, usable(history[-1].duration_seconds), history)
    next_round_seconds = costs.round_seconds(dirty_pages)
    later_pages = _dirty_pages(windows, next_round_seconds, history)
    pause_seconds = costs.pause_seconds(dirty_pages)
    return Forecast(
        expected_pause_seconds=pause_seconds,
        fixed_seconds=costs.fixed_seconds,
        transfer_seconds=costs.transfer_seconds(dirty_pages),
        image_seconds=costs.image_seconds,
        restore_seconds=costs.restore_seconds,
        dirty_bytes=dirty_pages * PAGE_SIZE_BYTES,
        dirty_rate_bytes_per_second=dirty_rate_bytes_per_second(history),
        bandwidth_bytes_per_second=costs.bandwidth_bytes_per_second,
        next_round_seconds=next_round_seconds,
        next_gain_seconds=pause_seconds - costs.pause_seconds(later_pages),
    )


def dirty_rate_bytes_per_second(history: History) -> float:
    """Bytes written in the latest round over the time between its snapshot and the one before; 0 if unknown."""
    windows = _windows(history)
    if not windows or windows[-1].seconds == 0:
        return 0.0
    return windows[-1].pages * PAGE_SIZE_BYTES / windows[-1].seconds


def bandwidth_bytes_per_second(history: History, limits: Limits) -> float:
    """Bandwidth of the latest round large enough to measure one, else of the largest; never above the limit."""
    measured = [stats for stats in history if stats.bytes_sent > 0 and usable(stats.transfer_seconds) > 0]
    large = [stats for stats in measured if stats.bytes_sent >= BANDWIDTH_SAMPLE_BYTES]
    if large:
        sample = large[-1]
    elif measured:
        sample = max(measured, key=lambda stats: stats.bytes_sent)
    else:
        return min(ASSUMED_BANDWIDTH_BYTES_PER_SECOND, limits.bandwidth_limit_bytes_per_second or math.inf)
    bandwidth = usable(sample.bytes_sent / sample.transfer_seconds) or ASSUMED_BANDWIDTH_BYTES_PER_SECOND
    return min(bandwidth, limits.bandwidth_limit_bytes_per_second or math.inf)


@dataclass(frozen=True, slots=True)
class _Costs:
    """What a page, a round and a stop cost, as far as the rounds have shown."""

    freeze_seconds: float
    overhead_seconds: float
    fixed_seconds: float
    bandwidth_bytes_per_second: float
    wire_bytes_per_page: float
    image_seconds: float
    restore_seconds: float

    @classmethod
    def measure(cls, history: History, limits: Limits) -> _Costs:
        incremental = history[1:] or history  # the first round freezes longer: it collects all of memory
        freeze_seconds = max(usable(stats.frozen_seconds) for stats in incremental[-2:])
        overhead_seconds = median(_overhead_seconds(stats) for stats in history)
        switch_seconds = overhead_seconds if limits.switch_cost_seconds is None else limits.switch_cost_seconds
        fixed_seconds = freeze_seconds + switch_seconds
        bandwidth = bandwidth_bytes_per_second(history, limits)
        latest = history[-1]
        memory_bytes = max(0, latest.pages_written + latest.pages_skipped_parent) * PAGE_SIZE_BYTES
        return cls(
            freeze_seconds=freeze_seconds,
            overhead_seconds=overhead_seconds,
            fixed_seconds=fixed_seconds if fixed_seconds > 0 else limits.fixed_cost_prior_seconds,
            bandwidth_bytes_per_second=bandwidth,
            wire_bytes_per_page=_wire_bytes_per_page(history),
            image_seconds=limits.image_bytes / bandwidth,
            restore_seconds=memory_bytes * limits.restore_seconds_per_byte,
        )

    def transfer_seconds(self, pages: float) -> float:
        return pages * self.wire_bytes_per_page / self.bandwidth_bytes_per_second

    def round_seconds(self, pages: float) -> float:
        return self.overhead_seconds + self.freeze_seconds + self.transfer_seconds(pages)

    def pause_seconds(self, pages: float) -> float:
        return self.fixed_seconds + self.transfer_seconds(pages) + self.image_seconds + self.restore_seconds


def _windows(history: History) -> tuple[_Window, ...]:
    """What each round from the second on found dirty, and over what time."""
    windows = []
    for before, stats in pairwise(history):
        seconds = usable(stats.started_at_seconds - before.started_at_seconds) or usable(before.duration_seconds)
        windows.append(_Window(seconds, max(0, stats.pages_written), before.throttle_percent))
    return tuple(windows)


def _dirty_pages(windows: tuple[_Window, ...], seconds: float, history: History) -> float:
    """Pages dirtied in a window of `seconds`, at most the memory there is."""
    latest = history[-1]
    if not windows:
        return float(max(0, latest.pages_written))
    memory_pages = float(max(0, latest.pages_written) + max(0, latest.pages_skipped_parent))
    return min(_extrapolated_pages(windows, seconds), memory_pages)


def _extrapolated_pages(windows: tuple[_Window, ...], seconds: float) -> float:
    """From the latest window to one of `seconds`.

    Distinct pages grow with time no faster than in proportion, and more slowly for a hot set. Towards longer windows
    the proportion is the careful answer; once a window at least as long has been seen, the most that any window
    dirtied (the working set) bounds it. Towards shorter ones the proportion would be too hopeful: there the exponent is
    taken from two windows that differ.
    """
    latest = windows[-1]
    if latest.seconds == 0 or latest.pages == 0:
        return float(latest.pages)
    ratio = seconds / latest.seconds
    if ratio < 1:
        return latest.pages * math.pow(ratio, _exponent(windows))
    comparable = [window for window in windows if window.throttle_percent == latest.throttle_percent]
    proportional = latest.pages * ratio
    if not any(window.seconds >= seconds for window in comparable):
        return proportional
    return min(proportional, max(window.pages for window in comparable))


def _exponent(windows: tuple[_Window, ...]) -> float:
    """How dirty pages grow with time, as a power of it: 1 for new pages only, 0 for a hot set.

    0 as well while no two windows tell them apart: a short window is not promised to dirty less than a long one.
    """
    latest = windows[-1]
    for window in reversed(windows[:-1]):
        comparable = window.throttle_percent == latest.throttle_percent
        if comparable and window.seconds >= latest.seconds * LONGER_WINDOW_RATIO:
            if window.pages <= latest.pages:
                return 0.0
            return min(1.0, math.log(window.pages / latest.pages) / math.log(window.seconds / latest.seconds))
    return 0.0


def _overhead_seconds(stats: IterStats) -> float:
    """What a round takes beside freezing and sending: criu's start, the page server, two round trips."""
    return usable(usable(stats.duration_seconds) - usable(stats.frozen_seconds) - usable(stats.transfer_seconds))


def _wire_bytes_per_page(history: History) -> float:
    """Of the largest round: headers and compression as measured."""
    largest = max(history, key=lambda stats: stats.pages_written)
    if largest.pages_written <= 0 or largest.bytes_sent <= 0:
        return float(PAGE_SIZE_BYTES)
    return largest.bytes_sent / largest.pages_written
