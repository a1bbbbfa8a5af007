"""criu lazy-pages dies while it still fills a tree from local images: no task ever reads a zero in place of a page."""

from __future__ import annotations

import asyncio
import json
from typing import Final

import pytest

from tests.inventory import processes
from tests.node.checksummed import run_checksummed
from tests.nodes import Nodes

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

MIB: Final = 256


async def test_killed_in_the_middle(daemons: Nodes) -> None:
    a, b, _ = daemons
    done = a.directory / "done"
    await run_checksummed(a, MIB, done)
    killed: list[int] = []

    async def kill() -> None:
        while not killed:
            for pid, words in processes(b):
                if "lazy-pages" in words and "-D" in words:
                    killed.append(pid)
            await asyncio.sleep(0)

    hunt = asyncio.create_task(kill())
    report = json.loads(
        (
            await a.phaul("migrate", "victim", "--to", b.address, "--restore", "lazy", "--json", check=True)
        ).stdout.splitlines()[-1]
    )
    await b.run(["kill", "-KILL", str(killed[0])], check=False)
    hunt.cancel()
    assert report["outcome"] == "moved", report
    done.touch()
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
    async with asyncio.timeout(10):
        while list((b.root / "dev/shm/phaul").glob(f"in-{report['migration_id']}")):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
