"""What the policies would do, with the writers of `writers.py`, a link and criu's costs.

`python -m phaul_client.simulator` prints a table, the same every time. With the name of a report (`--trace FILE`) its
rounds are replayed as a writer as well.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from phaul_client.policy import ClassicPolicy, DowntimePolicy, Finish, Iterate, Policy, SwitchToPostcopy
from phaul_client.rounds import PAGE_SIZE_BYTES, History, IterStats, Limits
from phaul_client.writers import MIB, UNIT_BYTES, UNIT_PAGES, Workload, bursty_bytes, read_trace, skewed, steady

GIGABIT_BYTES_PER_SECOND: Final = 117e6
"""What a 1 Gbit/s link carries."""


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


def workloads() -> tuple[tuple[Workload, Limits], ...]:
    """The rows of the table."""
    link = GIGABIT_BYTES_PER_SECOND
    plain, throttled = Limits(), Limits(allow_throttle=True)
    memory_bytes = 256 * MIB
    fast = steady("above the link, 1.5 of it", 1.5 * link, memory_bytes=1024 * MIB, region_bytes=768 * MIB)
    growing = Workload(
        name="growing by 10 MB/s every second",
        memory_bytes=1024 * MIB,
        written_bytes=lambda seconds: 5e6 * seconds * seconds,
        target=lambda write: write % (1024 * MIB // UNIT_BYTES),
    )
    return (
        (steady("idle", 0, memory_bytes=memory_bytes, region_bytes=memory_bytes), plain),
        (steady("a fifth of the link", link / 5, memory_bytes=memory_bytes, region_bytes=memory_bytes), plain),
        (
            Workload(
                name="bursty, 2 and 82 MB/s",
                memory_bytes=memory_bytes,
                written_bytes=bursty_bytes,
                target=lambda write: write % (memory_bytes // UNIT_BYTES),
            ),
            plain,
        ),
        (skewed("skewed as redis, 30 MB/s", 30e6, memory_bytes=memory_bytes), plain),
        (steady("hot set of 48 MiB, fast", 2 * link, memory_bytes=memory_bytes, region_bytes=48 * MIB), plain),
        (growing, plain),
        (fast, plain),
        (replace(fast, name=f"{fast.name}, throttled"), throttled),
        (skewed("goal of 30 ms, cannot be met", 30e6, memory_bytes=memory_bytes), Limits(downtime_goal_seconds=0.03)),
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
