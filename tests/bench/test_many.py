"""The pause of a tree with many tasks: processes that share everything, and threads of one process.

    ./check bench -k many [--quick] [--json FILE]

The programs are those of the workloads (tests/workloads/programs): a token goes round between the processes, by pipes,
sockets and eventfds, and each has a lock, a timer, a watch and a deleted file of its own. Once all of them have also
the ends of all others, as the 50 processes of the workloads do. They ask themselves whether everything still works, and
tell the longest gap that they saw. phaul and the criu command take turns; beside the pause is what each step took, from
phaul's report.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from tests.bench.test_pause import large_pipes
from tests.by_hand import MovedByHand, move_by_hand, start_tree
from tests.need import need
from tests.nodes import Nodes, two_nodes, until

__all__ = ["large_pipes"]  # a fixture

pytestmark = [pytest.mark.bench, pytest.mark.criu, pytest.mark.timeout(900)]

PROGRAMS: Final = Path(__file__).parents[1] / "workloads/programs"
CASES: Final = (
    *(("processes", count) for count in (10, 50, 200)),
    ("processes with all ends", 50),
    *(("threads", count) for count in (10, 100, 500)),
)
MODES: Final = {
    "eager": ("--mode", "stop-copy", "--restore", "eager"),
    "lazy": ("--mode", "stop-copy", "--restore", "lazy"),
    "post-copy": ("--mode", "post-copy", "--restore", "lazy"),
}
PLACE: Final = Path("/run/many")  #: in each node's own memory: a lock cannot be had twice
#: What phaul finds out by itself.
OPTIONS: Final = {"processes": ("--file-locks",), "processes with all ends": ("--file-locks",), "threads": ()}


@pytest.fixture(autouse=True)
def many_watches() -> Iterator[None]:
    """Both nodes share one kernel: for a moment there are two of each process, each with its watch."""
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    before = limit.read_text()
    limit.write_text(str(max(1024, int(before))))
    yield
    limit.write_text(before)


@dataclass(slots=True)
class Figures:
    """One value for each repetition, in seconds."""

    pause: list[float] = field(default_factory=list)
    steps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def median_steps_ms(self) -> dict[str, float]:
        return {name: round(statistics.median(took) * 1000, 1) for name, took in self.steps.items()}


@pytest.mark.usefixtures("large_pipes")
@pytest.mark.parametrize("restore", MODES)
@pytest.mark.parametrize(("kind", "count"), CASES)
async def test_many(
    kind: str, count: int, restore: str, tmp_path: Path, json_report: dict[str, Any], quick: bool
) -> None:
    """By phaul and by hand, in turn."""
    if reason := need({"gcc": "gcc"} if kind == "threads" else {}):
        pytest.skip(reason)
    phaul, by_hand = Figures(), Figures()
    async with two_nodes(tmp_path / "nodes") as nodes:
        await nodes.a.start_phauld()
        await nodes.b.start_phauld()
        for number in range(2 if quick else 5):
            turns = [(phaul, _by_phaul), (by_hand, _by_hand)]
            for figures, move in turns if number % 2 == 0 else reversed(turns):
                argv = _program(kind, count, tmp_path)
                figures.pause.append(await move(nodes, kind, argv, restore, figures, tmp_path))
    ratio = statistics.median(phaul.pause) / statistics.median(by_hand.pause)
    json_report.setdefault("many", []).append(
        {
            "kind": kind,
            "count": count,
            "restore": restore,
            "phaul_pause_s": phaul.pause,
            "by_hand_pause_s": by_hand.pause,
            "ratio": ratio,
            "phaul_steps_ms": phaul.median_steps_ms,
            "by_hand_steps_ms": by_hand.median_steps_ms,
        }
    )
    sys.stdout.write(
        f"\n{count} {kind}, {restore}: pause {_spread(phaul.pause)} by phaul, {_spread(by_hand.pause)} by hand, "
        f"ratio {ratio:.2f}; {phaul.median_steps_ms}; by hand {by_hand.median_steps_ms}\n"
    )


def _program(kind: str, count: int, directory: Path) -> list[str]:
    beats = str(PLACE / "beats")
    if kind != "threads":
        own = ["own"] if kind == "processes" else []
        return [sys.executable, "-I", "-S", str(PROGRAMS / "tree.py"), beats, str(count), *own]
    program = directory / "threads"
    if not program.exists():
        compiler = ["gcc", "-O1", "-pthread", "-o", str(program), str(PROGRAMS / "threads.c")]
        subprocess.run(compiler, check=True, capture_output=True)
    return [str(program), beats, str(count)]


async def _by_phaul(
    nodes: Nodes, kind: str, argv: list[str], restore: str, figures: Figures, _directory: Path
) -> float:
    places = _places(nodes)
    await nodes.a.phaul("run", "--name", "many", "--cwd", str(PLACE), "--", *argv, check=True)
    await _works(places[0])
    shutil.copytree(*places, dirs_exist_ok=True)
    options = (*(MODES[restore]), "--json")
    moved = await nodes.a.phaul("migrate", "many", "--to", nodes.b.address, *options)
    assert moved.returncode == 0, moved.stdout + moved.stderr
    await _works(places[1])
    await nodes.b.phaul("stop", "many", "--grace", "20", "--signal", "TERM", check=True)
    await nodes.b.phaul("rm", "many", check=True)
    for step in moved.events()[-1]["timeline"]:
        figures.steps[step["name"]].append((step["end_ms"] - step["start_ms"]) / 1000)
    assert _last(places[1])[2] == "PASS", _last(places[1])
    return _longest_gap(places[1])


async def _by_hand(nodes: Nodes, kind: str, argv: list[str], _restore: str, figures: Figures, directory: Path) -> float:
    places = _places(nodes)
    pid = await start_tree(nodes.a, argv, directory / f"{time.monotonic()}.log")
    await _works(places[0])
    shutil.copytree(*places, dirs_exist_ok=True)
    took: MovedByHand = await move_by_hand(nodes.a, nodes.b, pid, *OPTIONS[kind])
    await _works(places[1])
    await nodes.b.run(["pkill", "-TERM", "--oldest", "--full", f"^{' '.join(argv)}"])
    await until(lambda: _last(places[1])[2] != "RUNS", 30)
    for name in ("dump", "copy", "restore"):
        figures.steps[name].append(getattr(took, f"{name}_seconds"))
    return _longest_gap(places[1])


def _places(nodes: Nodes) -> tuple[Path, Path]:
    """Empty, on both nodes."""
    found = [node.root / PLACE.relative_to("/") for node in (nodes.a, nodes.b)]
    for each in found:
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir()
    return found[0], found[1]


def _last(place: Path) -> tuple[int, float, str]:
    """How far it has come, the longest gap in seconds, and how it is."""
    beats = place / "beats"
    line = beats.read_text().splitlines()[-1:] if beats.exists() else []
    if not line:
        return 0, 0.0, "RUNS"
    count, gap, word = line[0].split(" ", 2)
    return int(count), float(gap) / 1000, word


async def _works(place: Path) -> None:
    """It has come further."""
    until_then = _last(place)[0] + 100
    await until(lambda: _last(place)[0] > until_then or _last(place)[2] != "RUNS", 60)
    assert _last(place)[2] == "RUNS", _last(place)


def _longest_gap(place: Path) -> float:
    """In seconds. Moved by hand, a timer may stand still for ever: criu loses one that was due in the freeze."""
    return max(float(line.split(" ", 2)[1]) for line in (place / "beats").read_text().splitlines()) / 1000


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values) * 1000:.0f} ms ({min(values) * 1000:.0f} to {max(values) * 1000:.0f})"
