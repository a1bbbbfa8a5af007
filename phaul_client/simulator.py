"""What the policies would do: synthetic and recorded writers, a link, criu's costs; `python -m phaul_client.simulator`.

Pages are dirtied as sets, so that a page written twice between two snapshots counts once. Nothing is random: the same
table comes out every time. With the name of a report (`--trace FILE`) its rounds are replayed as a writer as well.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Final

from phaul_client.policy import ClassicPolicy, DowntimePolicy, Finish, Iterate, Policy, SwitchToPostcopy
from phaul_client.rounds import PAGE_SIZE_BYTES, History, IterStats, Limits

MIB: Final = 1 << 20
UNIT_PAGES: Final = 4
"""Pages that one write dirties: coarse enough to be quick, fine enough to be a set."""
UNIT_BYTES: Final = UNIT_PAGES * PAGE_SIZE_BYTES
GIGABIT_BYTES_PER_SECOND: Final = 117e6
"""What a 1 Gbit/s link carries."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds that criu and the protocol take, of the order that was measured natively (64 to 512 MiB)."""

    start_seconds: float = 0.02
    freeze_seconds: float = 0.006
    scan_seconds_per_page: float = 1e-7
    drain_seconds_per_page: float = 2e-7
    close_seconds: float = 0.008
    state_dump_seconds: float = 0.015
    restore_seconds: float = 0.015
    restore_seconds_per_byte: float = 0.0
    link_bytes_per_second: float = GIGABIT_BYTES_PER_SECOND

    def freeze(self, memory_pages: int, dirty_pages: int) -> float:
        """How long a snapshot holds the tree still, without any transfer."""
        return (
            self.freeze_seconds + memory_pages * self.scan_seconds_per_page + dirty_pages * self.drain_seconds_per_page
        )

    def transfer(self, pages: int) -> float:
        return pages * PAGE_SIZE_BYTES / self.link_bytes_per_second

    def pause(self, memory_pages: int, dirty_pages: int) -> float:
        """The whole stop, from the freeze to the running copy."""
        restore = self.restore_seconds + memory_pages * PAGE_SIZE_BYTES * self.restore_seconds_per_byte
        return self.freeze(memory_pages, dirty_pages) + self.state_dump_seconds + self.transfer(dirty_pages) + restore


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a simulated move went."""

    name: str
    history: History
    verdict: Finish | SwitchToPostcopy
    pause_seconds: float
    stop_copy_pause_seconds: float
    total_seconds: float

    @property
    def expected_pause_seconds(self) -> float:
        """As the policy foresaw it before the last dump; NaN without rounds."""
        return self.verdict.forecast.expected_pause_seconds if self.verdict.forecast else math.nan

    @property
    def throttle_percent(self) -> int:
        return self.history[-1].throttle_percent if self.history else 0


@dataclass(slots=True)
class _World:
    """A process and two clocks: the world's and its own."""

    workload: Workload
    costs: Costs
    now_seconds: float = 0.0
    own_seconds: float = 0.0
    dirty: set[int] = field(default_factory=set)
    sent: bool = False

    def run(self, seconds: float, throttle_percent: int) -> None:
        end_seconds = self.own_seconds + seconds * (100 - throttle_percent) / 100
        self.dirty |= self.workload.dirtied(self.own_seconds, end_seconds)
        self.own_seconds = end_seconds
        self.now_seconds += seconds

    @property
    def memory_pages(self) -> int:
        return self.workload.memory_bytes // PAGE_SIZE_BYTES

    def snapshot(self) -> int:
        """Pages to write; from here on, what is dirtied is counted anew."""
        pages = min(len(self.dirty) * UNIT_PAGES, self.memory_pages) if self.sent else self.memory_pages
        self.dirty = set()
        self.sent = True
        return pages

    def pre_dump(self, throttle_percent: int) -> IterStats:
        started_at_seconds = self.now_seconds
        self.run(self.costs.start_seconds, throttle_percent)
        pages = self.snapshot()
        frozen_seconds = self.costs.freeze(self.memory_pages, pages)
        self.now_seconds += frozen_seconds
        transfer_seconds = self.costs.transfer(pages)
        self.run(transfer_seconds + self.costs.close_seconds, throttle_percent)
        return IterStats(
            started_at_seconds=started_at_seconds,
            duration_seconds=self.now_seconds - started_at_seconds,
            frozen_seconds=frozen_seconds,
            pages_scanned=self.memory_pages,
            pages_written=pages,
            pages_skipped_parent=self.memory_pages - pages,
            bytes_sent=pages * PAGE_SIZE_BYTES,
            transfer_seconds=transfer_seconds,
            throttle_percent=throttle_percent,
        )


def simulate(workload: Workload, policy: Policy, limits: Limits, costs: Costs) -> Outcome:
    """Move the workload as the policy says."""
    world = _World(workload, costs)
    history: History = ()
    throttle_percent = 0
    while isinstance(verdict := policy.decide(history, limits), Iterate):
        throttle_percent = verdict.throttle_percent
        history = (*history, world.pre_dump(throttle_percent))
    world.run(costs.start_seconds, throttle_percent)
    pause_seconds = costs.pause(world.memory_pages, world.snapshot())
    return Outcome(
        name=workload.name,
        history=history,
        verdict=verdict,
        pause_seconds=pause_seconds,
        stop_copy_pause_seconds=costs.pause(world.memory_pages, world.memory_pages),
        total_seconds=world.now_seconds + pause_seconds,
    )


def _scattered(write: int) -> int:
    """A number that looks random, the same every time."""
    mixed = (write + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    return mixed ^ mixed >> 31


def _steady(name: str, rate_bytes_per_second: float, *, memory_bytes: int, region_bytes: int) -> Workload:
    """Writes through a region from its start to its end, again and again."""
    units = region_bytes // UNIT_BYTES
    return Workload(
        name=name,
        memory_bytes=memory_bytes,
        written_bytes=lambda seconds: seconds * rate_bytes_per_second,
        target=lambda write: write % units,
    )


def _skewed(name: str, rate_bytes_per_second: float, *, memory_bytes: int) -> Workload:
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


def _bursty_bytes(seconds: float) -> float:
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


def workloads() -> tuple[tuple[Workload, Limits], ...]:
    """The rows of the table."""
    link = GIGABIT_BYTES_PER_SECOND
    plain, throttled = Limits(), Limits(allow_throttle=True)
    memory_bytes = 256 * MIB
    fast = _steady("above the link, 1.5 of it", 1.5 * link, memory_bytes=1024 * MIB, region_bytes=768 * MIB)
    growing = Workload(
        name="growing by 10 MB/s every second",
        memory_bytes=1024 * MIB,
        written_bytes=lambda seconds: 5e6 * seconds * seconds,
        target=lambda write: write % (1024 * MIB // UNIT_BYTES),
    )
    return (
        (_steady("idle", 0, memory_bytes=memory_bytes, region_bytes=memory_bytes), plain),
        (_steady("a fifth of the link", link / 5, memory_bytes=memory_bytes, region_bytes=memory_bytes), plain),
        (
            Workload(
                name="bursty, 2 and 82 MB/s",
                memory_bytes=memory_bytes,
                written_bytes=_bursty_bytes,
                target=lambda write: write % (memory_bytes // UNIT_BYTES),
            ),
            plain,
        ),
        (_skewed("skewed as redis, 30 MB/s", 30e6, memory_bytes=memory_bytes), plain),
        (_steady("hot set of 48 MiB, fast", 2 * link, memory_bytes=memory_bytes, region_bytes=48 * MIB), plain),
        (growing, plain),
        (fast, plain),
        (replace(fast, name=f"{fast.name}, throttled"), throttled),
        (_skewed("goal of 30 ms, cannot be met", 30e6, memory_bytes=memory_bytes), Limits(downtime_goal_seconds=0.03)),
        (replace(fast, name="above the link, deadline of 25 s"), Limits(deadline_seconds=25)),
    )


HEADER: Final = (
    "| writer | rounds | throttle | reason | expected | actual | actual / expected | stop-and-copy | classic |\n"
    "|---|--:|--:|---|--:|--:|--:|--:|--:|"
)


def row(workload: Workload, limits: Limits, costs: Costs) -> str:
    """One line of the table, in milliseconds."""
    outcome = simulate(workload, DowntimePolicy(), limits, costs)
    classic = simulate(workload, ClassicPolicy(), limits, costs)
    cells = (
        outcome.name,
        str(len(outcome.history)),
        f"{outcome.throttle_percent} %",
        outcome.verdict.reason.value,
        f"{outcome.expected_pause_seconds * 1000:.0f} ms",
        f"{outcome.pause_seconds * 1000:.0f} ms",
        f"{outcome.pause_seconds / outcome.expected_pause_seconds:.2f}",
        f"{outcome.stop_copy_pause_seconds * 1000:.0f} ms",
        f"{classic.pause_seconds * 1000:.0f} ms ({len(classic.history)})",
    )
    return "| " + " | ".join(cells) + " |"


def table(traces: Sequence[Workload] = ()) -> str:
    """The table of all workloads and of `traces`, in Markdown."""
    rows = [*workloads(), *((trace, Limits()) for trace in traces)]
    return "\n".join([HEADER, *(row(workload, limits, Costs()) for workload, limits in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phaul_client.simulator", description="Simulate pre-copy.")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="also replay the rounds of this report")
    options = parser.parse_args(arguments)
    sys.stdout.write(table(read_trace(options.trace) if options.trace else ()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
