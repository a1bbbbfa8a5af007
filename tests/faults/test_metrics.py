"""The gauges that wake somebody: in doubt and held, while a destination is gone, and no longer when it is settled."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from phaul.v1 import migrations_pb2, types_pb2
from phaul.v1.types_pb2 import Options
from tests.faults.bench import bench
from tests.prometheus import HTTP, scrape

pytestmark = pytest.mark.criu


async def test_held_and_in_doubt_are_told_until_an_operator_has_answered(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        await made.start(http_listen=HTTP)
        victim = await made.run_victim()
        killed = asyncio.Event()

        async def kill() -> None:
            made.link.cut()
            await made.nodes["b"].end()
            killed.set()

        made.gates.plan("a>b:Commit:request", kill)
        asked = Options(restore_mode=types_pb2.RESTORE_MODE_EAGER)
        asked.in_doubt_timeout.FromMilliseconds(500)
        await made.migrate(victim, migration_id="gone", options=asked)
        async with asyncio.timeout(20):
            await killed.wait()
        await made.settle("gone", held=True)
        node = made.nodes["a"]
        seen = await scrape(node)
        assert (seen.get("phaul_migrations_held"), seen.get("phaul_migrations_in_doubt")) == (1, 1)
        assert seen.get("phaul_migrations", phase="HELD") == 1
        await made.kill_daemon("a", restart_after_seconds=0)  # a restart forgets counts, not what is
        await made.settle("gone", held=True)
        seen = await scrape(node)
        assert (seen.get("phaul_migrations_held"), seen.get("phaul_migrations_in_doubt")) == (1, 1)
        resume = migrations_pb2.ResolveRequest(migration_id="gone", resolution=migrations_pb2.RESOLUTION_RESUME)
        await made.migrations("a").Resolve(resume, timeout=20)
        await made.settle("gone")
        seen = await scrape(node)
        assert (seen.get("phaul_migrations_held"), seen.get("phaul_migrations_in_doubt")) == (0, 0)
        assert seen.get("phaul_migrations_ended_total", outcome="rolled-back") == 1
