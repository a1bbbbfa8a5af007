"""criu lazy-pages dies while it still fills a tree from local images: no task ever reads a zero in place of a page."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Final

import pytest

from tests.faults.faults import signal_lazy_pages
from tests.faults.gates import CriuGate, Gates
from tests.inventory import processes
from tests.node.checksummed import run_checksummed
from tests.nodes import Node, Nodes

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

MIB: Final = 256


async def test_killed_in_the_middle(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    gates = Gates()
    async with CriuGate(gates, "b", tmp_path / "gate") as gate:
        await a.start_phauld()
        await b.start_phauld(criu=gate.program)
        done = a.directory / "done"
        await run_checksummed(a, MIB, done)

        async def kill() -> None:  # it runs, and nothing is filled yet but what somebody asked for
            signal_lazy_pages(b)

        gates.plan("b:restore:post-resume:notify", kill)
        migrating = await a.phaul("migrate", "victim", "--to", b.address, "--restore", "lazy", "--json", check=True)
        await _ends_with_a_word(b, json.loads(migrating.stdout.splitlines()[-1]), done)


async def _ends_with_a_word(b: Node, report: dict[str, Any], done: Path) -> None:
    assert report["outcome"] == "moved", report
    done.touch()  # noqa: ASYNC240
    async with asyncio.timeout(30):  # what it says must not be "lost"; it ends, and the log says why
        while "pages lost, the tree was killed" not in (b.directory / "phauld.log").read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        while heart := [words for _, words in processes(b) if "-ISc" in words]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert not heart
    assert (await b.phaul("logs", "victim")).stdout.split() == ["ready"]
    ended = (await b.phaul("ps", "--all")).stdout
    assert "signal 9" in ended, ended  # killed, not a crash on zeros
    await b.phaul("rm", "victim")
    async with asyncio.timeout(30):
        while list((b.root / "dev/shm/phaul").glob(f"in-{report['migration_id']}")):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
