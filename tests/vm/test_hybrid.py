"""Hybrid between two kernels: rounds of a pre-copy, then post-copy for what is still written, by time and when asked.

Only here can a kernel track memory, and only here has criu (4.1) page messages of 24 bytes. The link is slow enough
that the first round takes seconds: what is asked for in it is asked for in time. What the process writes to behind it
comes page by page: a fault over two relays takes such guests several milliseconds.
"""

from __future__ import annotations

from typing import Any, Final

import pytest

from tests.conftest import Report
from tests.vm.lab import Lab
from tests.vm.scenarios import Moved, ask, case, move, ready, switched, take, writer

pytestmark = pytest.mark.timeout(300)

MIB: Final = 48
HOT_MIB: Final = 4
RATE: Final = 2e6


@pytest.fixture
def _all(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--all"):
        pytest.skip("the second hybrid in the lab: only with --all")


async def hybrid(lab: Lab, report: Report, name: str, *, is_asked: bool, **options: Any) -> Moved:
    """Move it; its data are intact, both rounds and pages behind it brought them."""
    await ready(lab)
    await lab.a.run(["sh", "-c", "echo 4194304 >/proc/sys/fs/pipe-max-size"])
    step = move(name, "a", "b", "HYBRID", downtime_goal="0.001s", **options)
    steps = [
        {"run": name, "argv": writer(MIB, HOT_MIB, RATE), "on": "a"},
        ask(name, "a", "reset"),
        switched(step) if is_asked else step,
        ask(name, "b", "check"),
        {"stop": name, "on": "b"},
    ]
    answers = await take(lab, steps)
    moved = Moved(answers[2])
    report.setdefault("cases", []).append(
        case(name, lab, moved, pause_ms=answers[3]["gap_ms"], data_intact=answers[3]["intact"])
    )
    assert moved.done, moved.record
    assert answers[3]["intact"]
    assert [each["final"] for each in moved.rounds][:1] == [False], moved.rounds
    assert moved.rounds[0]["pages_written"] >= (MIB << 20) // 4096, "the first round carries all"
    return moved


async def test_by_time(lab: Lab, json_report: Report) -> None:
    moved = await hybrid(lab, json_report, "hybrid-by-time", is_asked=False, postcopy_after="1s")
    assert moved.reason == "postcopy-time"


@pytest.mark.usefixtures("_all")
async def test_when_asked(lab: Lab, json_report: Report) -> None:
    moved = await hybrid(lab, json_report, "hybrid-when-asked", is_asked=True)
    assert moved.reason == "asked"
