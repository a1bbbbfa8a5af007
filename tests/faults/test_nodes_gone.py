"""A whole node is killed in the moment of truth: the tree is held, until the policy or an operator declares it gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from phaul.v1 import migrations_pb2, types_pb2
from phaul.v1.types_pb2 import Options
from tests.faults.bench import Bench, bench
from tests.faults.judge import judge
from tests.faults.victims import Victim

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


@pytest.mark.parametrize("resume", [True])
async def test_an_operator_is_heard_at_once_though_the_node_is_silent(tmp_path: Path, resume: bool) -> None:
    """No reset, no refusal: packets go nowhere, and each question is waited for until its deadline."""
    async with bench(tmp_path) as made:
        await made.start()
        victim = await made.run_victim()
        stalled = asyncio.Event()

        async def stall() -> None:
            made.link.stall()
            stalled.set()

        made.gates.plan(COMMITTED if resume else RAN, stall)
        asked = Options(restore_mode=types_pb2.RESTORE_MODE_EAGER)
        asked.in_doubt_timeout.FromMilliseconds(500)
        await made.migrate(victim, migration_id="gone", options=asked)
        async with asyncio.timeout(20):
            await stalled.wait()
        await made.nodes["b"].end()
        await made.settle("gone", held=True)
        resolution = migrations_pb2.RESOLUTION_RESUME if resume else migrations_pb2.RESOLUTION_KILL
        request = migrations_pb2.ResolveRequest(migration_id="gone", resolution=resolution, reason="burnt down")
        answer = await made.migrations("a").Resolve(request, timeout=9)
        again = await made.migrations("a").Resolve(request, timeout=9)
        assert answer == again
        assert answer.migration.resolution == resolution
        if resume:
            await _until(lambda: _beats(made, victim))
        else:
            assert not await _beats(made, victim)
        said = answer.migration.error.message if resume else answer.migration.status_text
        assert "an operator (burnt down)" in said


@pytest.mark.parametrize("at", ["a:dump:pre-dump:notify", "a>b:Restore:request"])
async def test_a_node_that_falls_silent_ends_the_freeze_within_seconds(tmp_path: Path, at: str) -> None:
    async with bench(tmp_path) as made:
        await made.start()
        victim = await made.run_victim(mib=16)

        async def vanish() -> None:
            made.link.stall()
            made.gates.clear()

        made.gates.plan(at, vanish)
        asked = Options(restore_mode=types_pb2.RESTORE_MODE_EAGER)
        asked.freeze_budget.FromMilliseconds(600_000)
        await made.migrate(victim, migration_id="gone", options=asked)
        await made.settle("gone")
        await _until(lambda: _beats(made, victim))
        record = await made.record("gone")
        assert record is not None
        assert record.phase == types_pb2.MIGRATION_PHASE_ROLLED_BACK
        assert record.error.reason == types_pb2.ERROR_REASON_PEER_UNREACHABLE
        made.link.mend()
        judgement = await judge(made, victim, "gone")
        assert (judgement.alive, judgement.leftovers, judgement.complaints) == (1, (), ()), judgement


async def test_a_destination_that_was_started_anew_says_so(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        await made.start()
        victim = await made.run_victim()

        async def kill() -> None:
            await made.kill_daemon("b", restart_after_seconds=0)

        made.gates.plan(COMMITTED, kill)
        await made.migrate(victim, migration_id="anew", options=Options())
        await made.settle("anew")
        judgement = await judge(made, victim, "anew")
        assert (judgement.outcome, judgement.alive, judgement.leftovers) == ("resumed", 1, ()), judgement
        assert judgement.reason == "DAEMON_RESTARTED", judgement


def _processes(made: Bench) -> list[tuple[int, str]]:
    from tests.inventory import processes

    return list(processes(made.nodes["a"]))
