"""A workload that fills its memory, and says whether it is still what it was once it is asked to."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Final

from tests.nodes import Node

_PROGRAM: Final = """
import mmap, os, time, zlib
memory = mmap.mmap(-1, MIB << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for _ in range(MIB): memory.write(os.urandom(1 << 20))
checksum = zlib.crc32(memory)
print("ready", flush=True)
while not os.path.exists("DONE"): time.sleep(0.05)
print("intact" if zlib.crc32(memory) == checksum else "lost", flush=True)
time.sleep(1000)
"""


async def run_checksummed(node: Node, mib: int, done: Path) -> None:
    """Start it as `victim` and wait for its memory; it says "intact" or "lost" when `done` is there."""
    program = _PROGRAM.replace("MIB", str(mib)).replace("DONE", str(done))
    await node.phaul("run", "--name", "victim", "--", sys.executable, "-ISc", program, check=True)
    async with asyncio.timeout(60):
        while "ready" not in (await node.phaul("logs", "victim")).stdout:  # noqa: ASYNC110 - over an RPC
            await asyncio.sleep(0.1)
