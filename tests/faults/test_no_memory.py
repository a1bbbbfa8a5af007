"""A destination that is short of memory refuses before anything stands still, and keeps nothing of the tree."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from phaul.v1 import types_pb2
from phaul.v1.types_pb2 import Options
from tests.faults.bench import bench
from tests.faults.judge import judge

pytestmark = pytest.mark.criu

MEMINFO: Final = "MemTotal: 24000000 kB\nMemFree: 4096 kB\nMemAvailable: 4096 kB\n"


@pytest.mark.parametrize(
    ("at", "reason", "message"),
    [
        ("a>b:CheckTree:request", "PREFLIGHT_FAILED", "4194304 are available"),  # the preflight tells of it
        ("a>b:OpenSession:request", "NO_MEMORY", "4 MiB are free and not promised"),  # it came about since then
    ],
)
async def test_no_memory(tmp_path: Path, at: str, reason: str, message: str) -> None:
    async with bench(tmp_path) as made:
        await made.start()
        victim = await made.run_victim(mib=32)
        node = made.nodes["b"]
        (node.root / "run/meminfo").write_text(MEMINFO)

        async def eat_memory() -> None:
            await node.run(["mount", "--bind", "/run/meminfo", "/proc/meminfo"], check=True)

        made.gates.plan(at, eat_memory)
        await made.migrate(victim, migration_id="short", options=Options(restore_mode=types_pb2.RESTORE_MODE_EAGER))
        await made.settle("short")
        record = await made.record("short")
        await node.run(["umount", "/proc/meminfo"], check=True)
        (node.root / "run/meminfo").unlink()
        judgement = await judge(made, victim, "short")
    assert (judgement.outcome, judgement.alive, judgement.leftovers) == ("resumed", 1, ()), judgement
    assert judgement.data_intact
    assert judgement.reason == reason
    assert record is not None
    told = f"{record.error.message} {record.error.remedy} {record.problems}"
    assert message in told, told
    assert "memory" in record.error.remedy + "".join(each.remedy for each in record.problems), told
    assert not record.HasField("pause")
