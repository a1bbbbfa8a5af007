"""A tree that is still being filled after a lazy restore is moved again: not one page may be missing."""

from __future__ import annotations

import asyncio
import json
from typing import Final

import pytest

from tests.node.checksummed import run_checksummed
from tests.nodes import Nodes

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180)]

MIB: Final = 384
MOVES: Final = 4


async def test_moved_again_at_once(daemons: Nodes) -> None:
    a, b, _ = daemons
    here, there = a, b
    done = a.directory / "done"
    await run_checksummed(a, MIB, done)
    for _ in range(MOVES):
        words = ["migrate", "victim", "--to", there.address, "--restore", "lazy", "--json"]
        report = json.loads((await here.phaul(*words, check=True, timeout_seconds=120)).stdout.splitlines()[-1])
        assert report["outcome"] == "moved", report
        assert report["bytes"] >= MIB << 20
        here, there = there, here
    done.touch()
    async with asyncio.timeout(60):
        while (said := (await here.phaul("logs", "victim")).stdout.split()[-1:]) == ["ready"]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert said == ["intact"]
    await here.phaul("stop", "victim", check=True)
