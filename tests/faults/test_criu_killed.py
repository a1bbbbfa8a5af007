"""SIGKILL for the source's criu at every instant of a dump and of a pre-dump: the program goes on as if nothing was.

A run without `--all` takes some instants of each; which ones turns with the day. With it, and `-s`, it tells how many
do harm, with a guard and without.
"""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from phauld.guarding.dump_hold import DumpGuard
from tests.faults.instants import BEAT_SECONDS, PTRACE_CONT, Criu, Tools, Victim, may_be_real_time

pytestmark = [
    pytest.mark.criu,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the guard knows the registers of x86-64 only"),
]

#: Processes, threads of each, what the first task does (see registers.c), and how many instants of a dump, of a
#: pre-dump are taken.
SHAPES: Final = {
    "computes": (1, 1, 0, 14, 5),
    "sleeps": (1, 1, 1, 4, 2),
    "reads": (1, 1, 2, 4, 2),
    "waits": (1, 1, 3, 4, 2),
    "eight-threads": (1, 8, 0, 20, 6),
    "four-processes": (4, 1, 0, 12, 4),
}
HARMED_SECONDS: Final = 3.0  #: who stands still that long without a guard was harmed
CASES: Final = [
    (name, operation, count)
    for name, shape in SHAPES.items()
    for operation, count in zip(("dump", "pre-dump"), shape[3:], strict=True)
]


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    try:
        return Tools(tmp_path_factory.mktemp("tools"))
    except RuntimeError as exc:
        pytest.skip(str(exc))


@pytest.fixture
async def guard(tmp_path: Path) -> AsyncIterator[DumpGuard]:
    guard = DumpGuard(tmp_path / "processors.json")
    await guard.start()
    yield guard
    await guard.aclose()


@pytest.mark.parametrize(("name", "operation", "count"), CASES)
async def test_goes_on(
    tools: Tools,
    guard: DumpGuard,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    name: str,
    operation: str,
    count: int,
) -> None:
    everything = pytestconfig.getoption("--all")
    outcomes = await _kill(tools, guard, tmp_path, name, operation, None if everything else count)
    bad = {instant: harm for instant, harm in outcomes.items() if harm}
    print(f"{name} {operation}: {len(outcomes)} instants, {len(bad)} did harm")
    assert bad == {}


async def test_without_a_guard(tools: Tools, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """The test above would notice; with --all, the numbers for the record."""
    everything = pytestconfig.getoption("--all")
    for name in ("computes", "eight-threads", "four-processes") if everything else ("computes",):
        (tmp_path / name).mkdir()
        outcomes = await _kill(tools, None, tmp_path / name, name, "dump", None if everything else 8)
        kinds = Counter("lost" if "has ended" in harm else "harmed" if harm else "good" for harm in outcomes.values())
        print(f"{name} without a guard: {dict(kinds)}")
        assert kinds["lost"] + kinds["harmed"] > 0


async def _kill(
    tools: Tools, guard: DumpGuard | None, directory: Path, name: str, operation: str, count: int | None
) -> dict[int, str]:
    """Of each instant, what harm it did."""
    shape = SHAPES[name][:3]
    criu = Criu(tools, directory / "criu", operation, guard)
    victim = Victim(tools, directory / "victim", *shape)
    outcomes = {}
    try:
        calls = await criu.instants(victim)
        assert victim.harm() == ""
        for instant in _chosen(calls, count, are_caught=may_be_real_time()):
            assert await criu.run(victim, KILLED_AT=str(instant)) == -9
            victim.patience_seconds = BEAT_SECONDS if guard else HARMED_SECONDS
            outcomes[instant] = victim.harm()
            if outcomes[instant]:
                victim.end()
                victim = Victim(tools, directory / f"victim-{instant}", *shape)
    finally:
        victim.end()
    return outcomes


def _chosen(calls: list[tuple[str, int]], count: int | None, *, are_caught: bool) -> list[int]:
    """Of the instants from the first that seizes the tree on, `count` at even distances, all of them if `None`.

    `are_caught`: those, too, in which a task does what criu has told it.
    """
    instants = list(range(len(calls)))
    if not are_caught:
        instants = [each for each in instants if calls[each][0] != "w" or calls[each - 1] != ("p", PTRACE_CONT)]
    if count is None:
        return instants
    instants = instants[_BEFORE_THE_TREE:]
    step = max(1, len(instants) // count)
    return instants[datetime.date.today().toordinal() % step :: step][:count]


_BEFORE_THE_TREE: Final = 20  #: calls by which criu looks what the kernel can do
