"""The pause and the total time of a move by phaul, beside the best script with the criu command, in one run.

    ./check bench [--quick] [--json FILE]

The pause is what the process itself saw: the longest gap between two of its heartbeats. The two ways take turns, and
memory is warmed before each move (see `warm_memory`). Nothing here asserts a time: the figures are the result.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from tests.by_hand import move_by_hand, start_tree, warm_memory
from tests.nodes import Nodes, two_nodes, until
from tests.victims.heartbeat import read_beats

pytestmark = [pytest.mark.bench, pytest.mark.criu, pytest.mark.timeout(1800)]

ROOT: Final = Path(__file__).parents[2]
HEARTBEAT: Final = [sys.executable, "-I", "-S", str(ROOT / "tests/victims/heartbeat.py")]
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """A process and a way to move it."""

    mib: int
    mode: str
    restore: str = "lazy"

    def repetitions(self, quick: bool) -> int:
        return 2 if quick else 5

    @property
    def name(self) -> str:
        return f"{self.mode}, {self.restore} restore, {self.mib} MiB"


@dataclass(slots=True)
class Figures:
    """What was measured, one value for each repetition, in seconds."""

    pause: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    peak_rss_mib: list[float] = field(default_factory=list)  #: of the larger of the two daemons, in the move


CASES: Final = (
    Case(0, "stop-copy"),  # nothing but the interpreter: what is left is the floor
    Case(16, "stop-copy"),
    Case(64, "stop-copy"),
    Case(512, "stop-copy"),
    Case(2048, "stop-copy"),
    Case(64, "post-copy"),
    Case(2048, "post-copy"),
)


@pytest.fixture
def large_pipes() -> Iterator[None]:
    """Post-copy needs pipes of 4 MiB where CAP_SYS_RESOURCE is missing."""
    limit = Path("/proc/sys/fs/pipe-max-size")
    before = limit.read_text()
    limit.write_text(str(max(4 * MIB, int(before))))
    yield
    limit.write_text(before)


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    async with two_nodes(tmp_path / "nodes") as nodes:
        await nodes.a.start_phauld()
        await nodes.b.start_phauld()
        yield nodes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("large_pipes")
async def test_pause(case: Case, nodes: Nodes, tmp_path: Path, json_report: dict[str, Any], quick: bool) -> None:
    """By phaul and by hand, in turn."""
    repetitions = case.repetitions(quick)
    idle_rss_mib = _rss_mib(nodes, "VmRSS")
    phaul, by_hand = Figures(), Figures()
    for number in range(repetitions):
        turns: list[tuple[Figures, Callable[[Case, Nodes, Path], Awaitable[tuple[float, float]]]]] = [
            (phaul, _by_phaul),
            (by_hand, _by_hand),
        ]
        for figures, move in turns if number % 2 == 0 else reversed(turns):
            directory = tmp_path / f"{number}-{move.__name__}"
            directory.mkdir()
            await warm_memory(nodes.a, case.mib * MIB)
            _forget_peaks(nodes)
            pause, total = await move(case, nodes, directory)
            figures.pause.append(pause)
            figures.total.append(total)
            figures.peak_rss_mib.append(max(_rss_mib(nodes, "VmHWM")))
    ratio = statistics.median(phaul.pause) / statistics.median(by_hand.pause)
    json_report.setdefault("cases", []).append(
        {
            "name": case.name,
            "mib": case.mib,
            "mode": case.mode,
            "phaul_pause_s": phaul.pause,
            "by_hand_pause_s": by_hand.pause,
            "go_criu_pause_s": [],  # it always pre-dumps, which this kernel cannot: see the lab
            "phaul_total_s": phaul.total,
            "by_hand_total_s": by_hand.total,
            "ratio": ratio,
            "phauld_idle_rss_mib": idle_rss_mib,
            "phauld_peak_rss_mib": phaul.peak_rss_mib,
        }
    )
    sys.stdout.write(
        f"\n{case.name}: pause {_spread(phaul.pause)} by phaul, {_spread(by_hand.pause)} by hand, ratio {ratio:.2f}; "
        f"total {_spread(phaul.total)} and {_spread(by_hand.total)}; "
        f"phauld {max(idle_rss_mib):.0f} MiB idle, {max(phaul.peak_rss_mib):.0f} MiB at most\n"
    )


def _forget_peaks(nodes: Nodes) -> None:
    for node in (nodes.a, nodes.b):
        assert node.daemon.process is not None
        Path(f"/proc/{node.daemon.process.pid}/clear_refs").write_text("5")


def _rss_mib(nodes: Nodes, name: str) -> list[float]:
    """Of both daemons."""
    found = []
    for node in (nodes.a, nodes.b):
        assert node.daemon.process is not None
        for line in Path(f"/proc/{node.daemon.process.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                found.append(int(line.split()[1]) / 1024)
    return found


async def _by_phaul(case: Case, nodes: Nodes, directory: Path) -> tuple[float, float]:
    beats = directory / "beats"
    started = await nodes.a.phaul("run", "--name", "victim", "--", *HEARTBEAT, beats, "--mib", str(case.mib))
    assert started.returncode == 0, started.stderr
    await _settled(beats)
    began = time.monotonic()
    moved = await nodes.a.phaul(
        "migrate", "victim", "--to", nodes.b.address, "--mode", case.mode, "--restore", case.restore, "--json"
    )
    total = time.monotonic() - began
    assert moved.returncode == 0, moved.stdout + moved.stderr
    pause = await _pause(beats)
    report = moved.events()[-1]
    await nodes.b.phaul("stop", "victim", "--grace", "0")
    await nodes.b.phaul("rm", "victim")
    return pause, min(total, report["total_ms"] / 1000)


async def _by_hand(case: Case, nodes: Nodes, directory: Path) -> tuple[float, float]:
    beats = directory / "beats"
    pid = await start_tree(nodes.a, [*HEARTBEAT, beats, "--mib", str(case.mib)], directory / "log")
    await _settled(beats)
    began = time.monotonic()
    await move_by_hand(nodes.a, nodes.b, pid)
    total = time.monotonic() - began
    pause = await _pause(beats)
    await nodes.b.run(["pkill", "-KILL", "--full", str(beats)])
    return pause, total


async def _settled(beats: Path) -> None:
    """It has its memory and beats."""
    await until(lambda: read_beats(beats).count > 20, 60)


async def _pause(beats: Path) -> float:
    """The longest gap, once it beats at the other end."""
    seen = read_beats(beats).count
    await until(lambda: read_beats(beats).count > seen + 20, 60)
    return read_beats(beats).longest_gap_ns / 1e9


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values) * 1000:.0f} ms ({min(values) * 1000:.0f} to {max(values) * 1000:.0f})"
