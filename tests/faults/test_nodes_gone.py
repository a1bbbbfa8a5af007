"""A whole node is killed in the moment of truth: the tree is held, until the policy or an operator declares it gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from phaul.v1 import migrations_pb2, types_pb2
from phaul.v1.types_pb2 import Options
from tests.faults.bench import Bench, Victim, bench

pytestmark = pytest.mark.criu

COMMITTED = "a>b:Commit:request"
RAN = "a>b:Commit:reply"


async def _start(made: Bench, at: str, **options: Any) -> Victim:
    """Kill node b for good at a boundary; the call is not answered."""
    await made.start()
    victim = await made.run_victim()
    killed = asyncio.Event()

    async def kill() -> None:
        made.link.cut()  # its kernel is gone, too
        await made.nodes["b"].end()
        killed.set()

    made.gates.plan(at, kill)
    asked = Options(restore_mode=types_pb2.RESTORE_MODE_EAGER, **options)
    asked.in_doubt_timeout.FromMilliseconds(500)
    await made.migrate(victim, migration_id="gone", options=asked)
    async with asyncio.timeout(20):
        await killed.wait()
    return victim


async def _beats(made: Bench, victim: Victim) -> bool:
    before = made.read(victim, "a").counts
    await asyncio.sleep(0.3)
    return made.read(victim, "a").counts > before


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - what is looked at is in another process
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("at", [COMMITTED, RAN])
async def test_held_until_an_operator_says_that_it_is_gone(tmp_path: Path, at: str) -> None:
    async with bench(tmp_path) as made:
        victim = await _start(made, at)
        await made.settle("gone", held=True)
        record = await made.record("gone")
        assert record is not None
        assert record.in_doubt
        assert not await _beats(made, victim)
        await made.kill_daemon("a", restart_after_seconds=0)  # neither a restart changes that
        await made.settle("gone", held=True)
        assert not await _beats(made, victim)
        resume = migrations_pb2.ResolveRequest(migration_id="gone", resolution=migrations_pb2.RESOLUTION_RESUME)
        await made.migrations("a").Resolve(resume, timeout=20)
        await _until(lambda: _beats(made, victim))
        assert made.read(victim, "a").failures == 0


async def test_the_policy_resumes(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        victim = await _start(made, COMMITTED, in_doubt_policy=types_pb2.IN_DOUBT_POLICY_RESUME)
        await made.settle("gone")
        await _until(lambda: _beats(made, victim))


async def test_the_policy_kills(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        victim = await _start(made, RAN, in_doubt_policy=types_pb2.IN_DOUBT_POLICY_KILL)
        await made.settle("gone")
        assert not await _beats(made, victim)
        words = [words for _, words in _processes(made)]
        assert not [each for each in words if victim.name in each]


async def test_a_destination_that_is_gone_before_the_commit_costs_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        victim = await _start(made, "a>b:Restore:request")
        await made.settle("gone")
        await _until(lambda: _beats(made, victim))


def _processes(made: Bench) -> list[tuple[int, str]]:
    from tests.inventory import processes

    return list(processes(made.nodes["a"]))
