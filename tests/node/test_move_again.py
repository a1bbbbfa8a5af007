"""A tree that is still being filled after a lazy restore is moved again: not one page may be missing."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Final

import pytest

from tests.nodes import Nodes

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180)]

MIB: Final = 384
MOVES: Final = 4
PROGRAM: Final = f"""
import mmap, os, time, zlib
memory = mmap.mmap(-1, {MIB} << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for _ in range({MIB}): memory.write(os.urandom(1 << 20))
checksum = zlib.crc32(memory)
print("ready", flush=True)
while not os.path.exists("DONE"): time.sleep(0.05)
print("intact" if zlib.crc32(memory) == checksum else "lost", flush=True)
time.sleep(1000)
"""


async def test_moved_again_at_once(daemons: Nodes) -> None:
    a, b, _ = daemons
    here, there = a, b
    done = a.directory / "done"
    program = PROGRAM.replace("DONE", str(done))
    await a.phaul("run", "--name", "victim", "--", sys.executable, "-ISc", program, check=True)
    async with asyncio.timeout(60):
        while "ready" not in (await a.phaul("logs", "victim")).stdout:  # noqa: ASYNC110 - over an RPC
            await asyncio.sleep(0.1)
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
