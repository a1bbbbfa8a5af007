"""Sixteen migrations at once between two daemons; one more is refused with a hint when to try again."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from phaul.v1 import types_pb2
from phaul.v1.types_pb2 import Options
from tests.conftest import Report
from tests.faults.bench import Bench, bench
from tests.faults.gates import until
from tests.faults.judge import beating_on, end_victim, leftovers
from tests.faults.victims import Victim

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180)]

AT_ONCE = 16


async def _gone_over(made: Bench, victim: Victim, migration_id: str) -> None:
    judged = await beating_on(made, victim)
    assert judged == ["b"], f"{victim.name} beats on {judged}: {await made.record(migration_id)}"
    assert made.read(victim, "b").failures == 0
    log = made.read_log(victim, "b") or []
    assert [int(line.split()[1]) for line in log] == list(range(1, len(log) + 1))


async def test_sixteen_at_once_and_one_more(tmp_path: Path, json_report: Report) -> None:
    options = Options(restore_mode=types_pb2.RESTORE_MODE_EAGER)
    async with bench(tmp_path, images_bytes=2 << 30) as made:
        await made.start(lease_seconds=60.0)  # sixteen may be too much for a busy machine to keep short ones
        victims = [await made.run_victim(mib=2) for _ in range(AT_ONCE + 1)]
        *sixteen, last = victims
        gate = asyncio.Event()  # all of them are under way before the first can end

        async def hold() -> None:
            await gate.wait()

        made.gates.plan("a>b:StartIter:request", hold, always=True)
        started = time.monotonic()
        await asyncio.gather(
            *(made.migrate(each, migration_id=f"load-{each.name}", options=options) for each in sixteen)
        )
        await until(lambda: made.gates.seen.count("a>b:StartIter:request") == AT_ONCE, 20)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await made.migrate(last, migration_id="one-more", options=options)
        gate.set()
        await asyncio.gather(*(made.settle(f"load-{each.name}") for each in sixteen))
        seconds = time.monotonic() - started
        for each in sixteen:
            await _gone_over(made, each, f"load-{each.name}")
        await made.migrate(last, migration_id="one-more", options=options)
        await made.settle("one-more")
        await _gone_over(made, last, "one-more")
        for each in victims:
            await end_victim(made, each, ["b"])
        assert not await leftovers(made)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(refused.value)  # type: ignore[arg-type]
    assert status is not None
    hint = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(hint) for detail in status.details)
    assert hint.retry_delay.ToMilliseconds() > 0
    json_report["sixteen_at_once_seconds"] = round(seconds, 1)
    print(f"\n{AT_ONCE} migrations at once in {seconds:.1f} s")


async def test_the_destination_refuses_one_too_many(tmp_path: Path) -> None:
    options = Options(restore_mode=types_pb2.RESTORE_MODE_EAGER)
    async with bench(tmp_path) as made:
        await made.start(max_incoming=1)
        first, second = [await made.run_victim(mib=2) for _ in range(2)]
        gate = asyncio.Event()

        async def hold() -> None:
            await gate.wait()

        made.gates.plan("a>b:StartIter:request", hold)
        await made.migrate(first, migration_id="first", options=options)
        await until(lambda: "a>b:StartIter:request" in made.gates.seen, 20)
        await made.migrate(second, migration_id="second", options=options)
        await made.settle("second")
        record = await made.record("second")
        assert record is not None
        assert record.phase == types_pb2.MIGRATION_PHASE_REFUSED
        assert record.error.reason == types_pb2.ERROR_REASON_TOO_MANY_MIGRATIONS
        gate.set()
        await made.settle("first")
        await _gone_over(made, first, "first")
        await made.migrate(second, migration_id="again", options=options)
        await made.settle("again")
        await _gone_over(made, second, "again")
