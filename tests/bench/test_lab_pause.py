"""The pause of pre-copy with lazy restore between the lab's two guests: it must not grow with idle memory.

    ./check bench -k lab

Only here can a kernel track memory. The clock is the day's, which the guests share; the link has no limit.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from tests.vm.image import LabMissing
from tests.vm.lab import Lab, open_lab
from tests.vm.scenarios import Moved, ask, milliseconds, move, ready, take, writer

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

SIZES_MIB: Final = (64, 1024)
MEMORY_MIB: Final = 3072  #: the process twice, in its images and in itself, and the system
MOVE_SECONDS: Final = 280.0
REPETITIONS: Final = 3  #: an emulated processor takes its time


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    try:
        async with open_lab(memory_mib=MEMORY_MIB) as lab:
            yield lab
    except LabMissing as exc:
        pytest.skip(str(exc))


async def test_lab_pre_copy(lab: Lab, json_report: dict[str, Any], quick: bool) -> None:
    """The sizes in turn, so that a machine that becomes slower does so for both."""
    await ready(lab, bytes_per_second=None)
    pauses: dict[int, list[float]] = {mib: [] for mib in SIZES_MIB}
    totals: dict[int, list[float]] = {mib: [] for mib in SIZES_MIB}
    for _ in range(1 if quick else REPETITIONS):
        for mib in SIZES_MIB:
            steps = [
                {"run": "idle", "argv": writer(mib), "on": "a"},
                ask("idle", "a", "reset"),
                move("idle", "a", "b", "PRE_COPY", restore_mode="RESTORE_MODE_LAZY"),
                ask("idle", "b", "tell"),
                {"stop": "idle", "on": "b"},
            ]
            answers = await take(lab, steps, MOVE_SECONDS)
            moved = Moved(answers[2])
            assert moved.done, moved.record
            pauses[mib].append(answers[3]["gap_ms"] / 1000)
            totals[mib].append((milliseconds(moved.record["total"]) or 0) / 1000)
            sys.stdout.write(f"\nlab, {mib} MiB: pause {pauses[mib][-1]:.3f} s, {len(moved.rounds)} rounds")
    for mib in SIZES_MIB:
        json_report.setdefault("cases", []).append(
            {
                "name": f"lab ({lab.accelerator}), pre-copy, lazy restore, {mib} MiB idle",
                "mib": mib,
                "mode": "pre-copy",
                "where": "lab",
                "phaul_pause_s": pauses[mib],
                "by_hand_pause_s": [],
                "go_criu_pause_s": [],
                "phaul_total_s": totals[mib],
                "by_hand_total_s": [],
                "ratio": None,
            }
        )
    growth = statistics.median(pauses[SIZES_MIB[-1]]) / statistics.median(pauses[SIZES_MIB[0]])
    sys.stdout.write(f"\nlab: from {SIZES_MIB[0]} to {SIZES_MIB[-1]} MiB the pause grows by {growth:.2f}\n")
