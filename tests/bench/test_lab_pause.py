"""The pause of pre-copy between the lab's two guests: phaul with lazy restore, the criu command, and go-criu's phaul.

    ./check bench -k lab [--quick] [--json FILE]

Only here can a kernel track memory. The same idle process, in one run, the order changed each time, memory touched
before each move; the link has no limit. phaul's pause must not grow with idle memory.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from tests.bench.go_phaul import ensure_go_phaul
from tests.bench.lab_ways import GO_PHAUL, Figures, Way, by_go_criu, by_hand, by_phaul, clear, warm
from tests.started import CommandFailed
from tests.vm.image import LabMissing
from tests.vm.lab import Lab, open_lab
from tests.vm.scenarios import ready

pytestmark = [pytest.mark.bench, pytest.mark.timeout(5400)]

SIZES_MIB: Final = (64, 1024)
MEMORY_MIB: Final = 3072  #: the process twice, in its images and in itself, and the system
REPETITIONS: Final = 5


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    try:
        async with open_lab(memory_mib=MEMORY_MIB) as lab:
            yield lab
    except LabMissing as exc:
        pytest.skip(str(exc))


async def _ways(lab: Lab) -> dict[str, Way]:
    """go-criu's only if it can be had; why not is said."""
    ways: dict[str, Way] = {"phaul": by_phaul, "by_hand": by_hand}
    try:
        program = ensure_go_phaul().read_bytes()
    except LabMissing as exc:
        sys.stdout.write(f"\nlab: go-criu is left out: {exc}\n")
        return ways
    for guest in lab.guests:
        await guest.put(GO_PHAUL, program, mode=0o755)
    return {**ways, "go_criu": by_go_criu}


async def test_lab_pre_copy(lab: Lab, json_report: dict[str, Any], quick: bool) -> None:
    """The sizes and the ways in turn, so that a machine that becomes slower does so for all."""
    await ready(lab, bytes_per_second=None)
    ways = await _ways(lab)
    found: dict[int, dict[str, list[Figures]]] = {mib: {name: [] for name in ways} for mib in SIZES_MIB}
    failed = dict.fromkeys(SIZES_MIB, 0)
    json_report.setdefault("cases", [])
    cases: list[dict[str, Any]] = json_report["cases"]
    for number in range(2 if quick else REPETITIONS):
        for mib in SIZES_MIB:
            for name, way in list(ways.items())[:: 1 if number % 2 == 0 else -1]:
                await warm(lab, mib)
                try:
                    found[mib][name].append(await way(lab, mib))
                except CommandFailed as exc:
                    if name != "go_criu":  # of the others none may fail
                        raise
                    failed[mib] += 1
                    await clear(lab)
                    sys.stdout.write(f"\nlab, {mib} MiB, {name}: the move failed: {exc}")
                    continue
                pause, total = found[mib][name][-1]
                sys.stdout.write(f"\nlab, {mib} MiB, {name}: pause {pause:.3f} s, total {total:.1f} s")
                sys.stdout.flush()
        cases[:] = [
            *(each for each in cases if each.get("where") != "lab"),
            *({**_case(lab, mib, found[mib]), "go_criu_failed": failed[mib]} for mib in found),
        ]
    medians = [statistics.median(pause for pause, _ in found[mib]["phaul"]) for mib in SIZES_MIB]
    growth = medians[-1] / medians[0]
    json_report["lab_growth"] = growth
    sys.stdout.write(f"\nlab: from {SIZES_MIB[0]} to {SIZES_MIB[-1]} MiB phaul's pause grows by {growth:.2f}\n")


def _case(lab: Lab, mib: int, found: dict[str, list[Figures]]) -> dict[str, Any]:
    """As in the other benchmarks."""
    figures = {
        f"{name}_{what}_s": [each[index] for each in found.get(name, [])]
        for name in ("phaul", "by_hand", "go_criu")
        for index, what in enumerate(("pause", "total"))
    }
    return {
        "name": f"lab ({lab.accelerator}), pre-copy, {mib} MiB idle",
        "mib": mib,
        "mode": "pre-copy",
        "where": "lab",
        **figures,
        "ratio": statistics.median(figures["phaul_pause_s"]) / statistics.median(figures["by_hand_pause_s"]),
    }
