"""Fifty moves to and fro of one process: nothing of either node grows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import pytest

from tests.inventory import at_rest
from tests.nodes import Nodes, until
from tests.victims.heartbeat import read_beats

pytestmark = [pytest.mark.criu, pytest.mark.slow, pytest.mark.timeout(300)]

HEARTBEAT: Final = [sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "victims/heartbeat.py")]
MOVES: Final = 50
WARM_UP: Final = 2  #: what is made once, such as gRPC's channels and criu's cache, is there after these
#: Python's allocator keeps some of what a moment needed; a leak of 100 KiB a move would show.
GROWTH_BYTES: Final = 4 << 20


async def test_nothing_grows(daemons: Nodes, tmp_path: Path) -> None:
    """Processes, descriptors, mounts, nftables rules and files are the same before and after; memory nearly so."""
    beats = tmp_path / "beats"
    nodes = (daemons.a, daemons.b)
    await daemons.a.phaul("run", "--name", "victim", "--", *HEARTBEAT, beats, "--mib", "8", "--dirty", "2", check=True)
    await until(lambda: read_beats(beats).count > 20)
    before = None
    for move in range(WARM_UP + MOVES):
        if move == WARM_UP:
            before = [await at_rest(node) for node in nodes]
        here, there = nodes if move % 2 == 0 else reversed(nodes)
        await here.phaul("migrate", "victim", "--to", there.address, "-q", check=True)
    count = read_beats(beats).count
    await until(lambda: read_beats(beats).count > count)
    after = [await at_rest(node) for node in nodes]
    assert before is not None
    for old, new in zip(before, after, strict=True):
        sys.stdout.write(f"before {old.counts()}\nafter  {new.counts()}\n")
        assert new.more_than(old) == {}
        assert new.daemon_memory_bytes - old.daemon_memory_bytes < GROWTH_BYTES
