"""Post-copy of processes that share memory since a fork: what each works with is there before it runs."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Final

import pytest

from phaul_criu.pagemaps import PAGE_BYTES, left_behind
from tests.faults.gates import CriuGate, Gates
from tests.node.test_postcopy import large_pipes
from tests.nodes import Nodes, until

__all__ = ["large_pipes"]  # a fixture

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

CHILDREN: Final = 6
PAGES: Final = 64
WRITTEN: Final = 16  #: by each child, of these
#: Each process says where its memory is, and, asked to, whether it is what it wrote.
PROGRAM: Final = f"""
import ctypes, mmap, os, time, zlib
os.mkdir("BEATS")
memory = mmap.mmap(-1, {PAGES * PAGE_BYTES}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.write(os.urandom(len(memory)))
address, number = ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0
for number in range(1, {CHILDREN} + 1):
    if os.fork() == 0:
        for page in range({WRITTEN}):
            memory[page * {PAGE_BYTES}] = number
        break
else:
    number = 0
checksum = zlib.crc32(memory)
def say(word):
    with open(f"BEATS/.{{number}}", "w") as file:
        file.write(f"{{address}} {{word}}")
    os.rename(f"BEATS/.{{number}}", f"BEATS/{{number}}")
say("ready")
while not os.path.exists("BEATS/done"): time.sleep(0.02)
say("intact" if zlib.crc32(memory) == checksum else "lost")
time.sleep(1000)
"""


def words(place: Path) -> dict[str, tuple[int, str]]:
    """Of each process, the address of its memory, and what it said last."""
    found = {}
    for path in place.glob("[0-9]*"):
        address, word = path.read_text().split()
        found[path.name] = int(address), word
    return found


async def test_what_each_works_with_is_there_before_it_runs(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    place, gates, left = tmp_path / "place", Gates(), []
    async with CriuGate(gates, "b", tmp_path / "gate") as gate:
        await a.start_phauld()
        await b.start_phauld(criu=gate.program)
        program = PROGRAM.replace("BEATS", str(place))
        await a.phaul("run", "--name", "victim", "--", sys.executable, "-ISc", program, check=True)
        await until(lambda: len(words(place)) == CHILDREN + 1, 60)
        (address,) = {address for address, _ in words(place).values()}

        async def look() -> None:
            for path in (b.root / "dev/shm/phaul").glob("in-*/*/pagemap-[0-9]*.img"):
                pages = {
                    start + n * PAGE_BYTES for start, count in left_behind(path.read_bytes()) for n in range(count)
                }
                left.append([number for number in range(PAGES) if address + number * PAGE_BYTES in pages])

        gates.plan("b:restore:post-restore:notify", look)
        moved = await a.phaul("migrate", "victim", "--to", b.address, "--mode", "post-copy", "--json")
        assert moved.returncode == 0, moved.stderr
    # what each has for itself came with its images, what all share is left behind, and tini has none of it
    assert left.count([*range(WRITTEN, PAGES)]) == CHILDREN + 1, left
    (place / "done").touch()
    await until(lambda: all(word != "ready" for _, word in words(place).values()), 30)
    assert {word for _, word in words(place).values()} == {"intact"}


async def test_a_tree_of_which_nothing_is_left_behind(daemons: Nodes) -> None:
    """All of a small program fits into its images: there is nothing to fill."""
    await daemons.a.phaul("run", "--name", "victim", "--", "sleep", "1000", check=True)
    moved = await daemons.a.phaul("migrate", "victim", "--to", daemons.b.address, "--mode", "post-copy", "--json")
    assert moved.returncode == 0, moved.stderr
    assert moved.events()[-1]["outcome"] == "moved"
    async with asyncio.timeout(30):
        while "RUNNING" not in (await daemons.b.phaul("ps")).stdout.upper():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
