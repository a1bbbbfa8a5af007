"""`Outgoing` with a real journal, and what it tells of a migration whose end was not what it should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client.commit import Phase
from phaul_client.errors import PhaulError
from phaul_client.recovery import Recovery
from phauld.costs import CostBook
from phauld.guard import open_channel
from phauld.journal import Journal
from phauld.source.outgoing import Outgoing
from phauld.source.target import Target
from tests.idle_node import idle_node
from tests.nodes import until

NOBODY = "127.0.0.1:1"
DETAIL: dict[str, object] = {"root": None, "stopped_before": [], "destination_node_id": "b", "tree": []}


class Bench:
    """One migration of an earlier phauld, whose tree is gone and whose destination never answers."""

    def __init__(self, journal: Journal, directory: Path) -> None:
        node = idle_node(directory)
        self.journal = journal
        self.outgoing = Outgoing(
            "move",
            Target(pid=2**22, identity=None, process_name="gone", workload=None),
            NOBODY,
            types_pb2.Options(),
            node=node,
            directory=directory / "out-move",
            journal=journal.outgoing("move"),
            costs=CostBook(),
        )

    async def resume(self, phase: Phase) -> None:
        await self.journal.outgoing("move").record(phase, **DETAIL)
        entry = await self.journal.get_outgoing("move")
        assert entry is not None
        self.outgoing.resume(entry)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    journal = await Journal.open(tmp_path / "journal.db")
    bench = Bench(journal, tmp_path)
    yield bench
    await bench.outgoing.stop()
    await journal.aclose()


async def test_an_attempt_that_fails_in_doubt_is_made_again_and_can_be_resolved(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    run = Recovery.run

    async def fail_once(self: Recovery) -> Phase:
        runs.append(1)
        if len(runs) == 1:
            raise RuntimeError("nobody thought of this")
        return await run(self)

    monkeypatch.setattr(Recovery, "run", fail_once)
    await bench.resume(Phase.HELD)
    await until(lambda: len(runs) == 1 and bench.outgoing.record.HasField("error"))
    assert not bench.outgoing.is_over
    kill = migrations_pb2.ResolveRequest(resolution=migrations_pb2.RESOLUTION_KILL, reason="burnt down")
    assert not await bench.outgoing.resolve(kill)  # nobody would hear it
    async with asyncio.timeout(20):
        while not await bench.outgoing.resolve(kill):  # noqa: ASYNC110 - nothing tells when it may be
            await asyncio.sleep(0.05)
    assert len(runs) == 2
    assert bench.outgoing.record.resolution == migrations_pb2.RESOLUTION_KILL
    assert "an operator (burnt down)" in bench.outgoing.record.status_text
    assert bench.outgoing.record.phase == types_pb2.MIGRATION_PHASE_DONE
    assert not bench.outgoing.record.HasField("error")


async def test_a_switch_before_the_first_round_is_not_forgotten(bench: Bench) -> None:
    bench.outgoing.record.mode = types_pb2.MODE_HYBRID
    await bench.outgoing.update(migrations_pb2.UpdateMigrationRequest(switch_to_post_copy=True))
    assert bench.outgoing._attempts.controls.policy.is_asked


async def test_a_recovery_that_cannot_even_begin_is_not_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the certificates or the policy cannot be read: the tree is stopped, and somebody must still ask."""
    attempts: list[int] = []

    def refuse_once(*args: Any, **options: Any) -> grpc.aio.Channel:
        attempts.append(1)
        if len(attempts) == 1:
            raise PhaulError("the policy cannot be read", reason="UNAUTHORIZED")
        return open_channel(*args, **options)

    monkeypatch.setattr("phauld.source.attempts.open_channel", refuse_once)
    await bench.resume(Phase.ROLLING_BACK)
    await until(lambda: len(attempts) == 2, timeout_seconds=10)
    async with asyncio.timeout(20):
        await bench.outgoing.wait()
    entry = await bench.journal.get_outgoing("move")
    assert entry is not None
    assert entry.phase is Phase.ROLLED_BACK


async def test_an_error_behind_the_end_does_not_make_it_a_roll_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Recovery.run

    async def fail_afterwards(self: Recovery) -> Phase:
        await run(self)
        raise asyncio.CancelledError

    monkeypatch.setattr(Recovery, "run", fail_afterwards)
    await bench.resume(Phase.CONFIRMED)
    async with asyncio.timeout(10):
        await bench.outgoing.wait()
    assert bench.outgoing.record.phase == types_pb2.MIGRATION_PHASE_DONE
    entry = await bench.journal.get_outgoing("move")
    assert entry is not None
    assert entry.report is not None
    assert entry.report["phase"] == "MIGRATION_PHASE_DONE"


@pytest.mark.parametrize("phase", [Phase.CONFIRMED, Phase.ROLLING_BACK])
async def test_a_stop_in_the_middle_of_the_end_reports_no_end(
    bench: Bench, phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = asyncio.Event()

    async def hang(self: Recovery) -> Phase:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(Recovery, "run", hang)
    await bench.resume(phase)
    async with asyncio.timeout(10):
        await reached.wait()
        await bench.outgoing.stop()
    assert not bench.outgoing.is_over
    assert not bench.outgoing.record.HasField("error")
    entry = await bench.journal.get_outgoing("move")
    assert entry is not None
    assert (entry.phase, entry.report) == (phase, None)
