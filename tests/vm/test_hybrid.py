"""Hybrid between two kernels: rounds of a pre-copy, then post-copy for what is still written, by time and when asked.

Only here can a kernel track memory. The link is slow enough that the first round takes seconds: what is asked for
in it is asked for in time.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Report
from tests.vm.lab import Lab
from tests.vm.scenarios import LINK_BYTES_PER_SECOND, Moved, ask, case, move, ready, switched, take, writer

pytestmark = pytest.mark.timeout(300)

#: Above the link: no round brings it nearer to the goal.
ARGV = writer(48, 32, LINK_BYTES_PER_SECOND * 1.5)


@pytest.fixture(autouse=True)
def _when_asked_for(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--all"):
        pytest.skip("hybrid in the lab: only with --all")


async def hybrid(lab: Lab, report: Report, name: str, *, is_asked: bool, **options: Any) -> Moved:
    """Move it; its data are intact, both rounds and pages behind it brought them."""
    await ready(lab)
    await lab.a.run(["sh", "-c", "echo 4194304 >/proc/sys/fs/pipe-max-size"])
    step = move(name, "a", "b", "HYBRID", downtime_goal="0.001s", **options)
    steps = [
        {"run": name, "argv": ARGV, "on": "a"},
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
    assert moved.rounds[0]["pages_written"] >= (48 << 20) // 4096, "the first round carries all"
    return moved


async def test_by_time(lab: Lab, json_report: Report) -> None:
    moved = await hybrid(lab, json_report, "hybrid-by-time", is_asked=False, postcopy_after="1s")
    assert moved.reason == "postcopy-time"


async def test_when_asked(lab: Lab, json_report: Report) -> None:
    moved = await hybrid(lab, json_report, "hybrid-when-asked", is_asked=True)
    assert moved.reason == "asked"
