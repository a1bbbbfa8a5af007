"""The matrix of faults: real daemons, real criu, a fault at a boundary of the protocol; exactly one copy, each time.

A run without `--all` takes every sixth point; which sixth turns with the day and the commit, and is printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.conftest import Report
from tests.faults.bench import Bench, bench
from tests.faults.faults import Run
from tests.faults.judge import Judgement
from tests.faults.points import POINTS, Point

pytestmark = [pytest.mark.criu, pytest.mark.timeout(1200)]

LANES: Final = 2
POINT_SECONDS: Final = 150.0
_NUMBERS: Final = itertools.count(1)
Outcome = Judgement | str  #: or what went wrong instead


def test_the_matrix_is_large_enough() -> None:
    assert len({point.name for point in POINTS}) == len(POINTS) >= 60


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, json_report: Report
) -> dict[str, Outcome]:
    """All selected points, run in lanes beside one another, before the first is asserted."""
    chosen = [item.callspec.params["point"] for item in request.session.items if hasattr(item, "callspec")
              and "outcomes" in item.fixturenames]  # type: ignore[attr-defined]  # fmt: skip
    started = time.monotonic()
    found = asyncio.run(_run_all(chosen, tmp_path_factory.mktemp("lanes")))
    seconds = time.monotonic() - started
    json_report["faults"] = [_row(point, found[point.name]) for point in chosen]
    json_report["faults_seconds"] = round(seconds, 1)
    print(f"\n{len(chosen)} of {len(POINTS)} points in {seconds:.0f} s")
    return found


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_exactly_one_copy(point: Point, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[point.name]
    assert isinstance(outcome, Judgement), outcome
    assert outcome.alive == 1, outcome
    assert outcome.data_intact, outcome
    assert not outcome.complaints, outcome
    assert not outcome.leftovers, outcome
    assert outcome.outcome in point.outcomes, outcome


def _row(point: Point, outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"point": point.at, "fault": point.fault, "tree": point.tree, "name": point.name}
    if isinstance(outcome, str):
        return {**row, "outcome": "broken", "alive": None, "data_intact": None, "leftovers": [], "failure": outcome}
    return {**row, **dataclasses.asdict(outcome)}


async def _run_all(points: Sequence[Point], directory: Path) -> dict[str, Outcome]:
    waiting = list(reversed(points))
    found: dict[str, Outcome] = {}
    async with asyncio.TaskGroup() as lanes:
        for number in range(min(LANES, len(points))):
            lanes.create_task(_lane(waiting, found, directory / str(number)))
    tally = Counter(each.outcome if isinstance(each, Judgement) else "broken" for each in found.values())
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in sorted(tally.items())))
    return found


async def _lane(waiting: list[Point], found: dict[str, Outcome], directory: Path) -> None:
    """Take points until there are none; a pair of nodes that a point has spoilt is replaced."""
    for number in range(len(waiting)):
        if not waiting:
            return
        async with bench(directory / str(number)) as made:
            await made.start()
            while waiting:
                point = waiting.pop()
                found[point.name] = outcome = await _run(made, point, f"p{next(_NUMBERS)}")
                if not _is_clean(outcome):
                    break


def _is_clean(outcome: Outcome) -> bool:
    return isinstance(outcome, Judgement) and outcome.alive == 1 and not outcome.leftovers and not outcome.complaints


async def _run(made: Bench, point: Point, migration_id: str) -> Outcome:
    starts = {name: log.stat().st_size for name, log in _logs(made).items() if log.exists()}
    try:
        async with asyncio.timeout(POINT_SECONDS):
            outcome: Outcome = await Run(made, point, migration_id).run()
    except Exception as exc:
        outcome = f"{type(exc).__name__}: {exc}"
    if not _is_clean(outcome) or (isinstance(outcome, Judgement) and outcome.outcome not in point.outcomes):
        print(f"\n### {point.name}: {outcome}\nseen: {made.gates.seen}")
        for name, log in _logs(made).items():
            with contextlib.suppress(FileNotFoundError):
                print(f"--- {name}\n{log.read_text(errors='replace')[starts.get(name, 0) :]}")
    return outcome


def _logs(made: Bench) -> dict[str, Path]:
    return {name: node.directory / "phauld.log" for name, node in made.nodes.items()}
