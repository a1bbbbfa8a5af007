"""What the processes of a tree share since a fork is counted beforehand, and decides about the restore."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Final

import pytest

from phaul_client.forked_memory import forked_memory
from tests.nodes import Nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

MIB: Final = 32
CHILDREN: Final = 4
PROGRAM: Final = f"""
import mmap, os, time
memory = mmap.mmap(-1, {MIB} << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for _ in range({MIB}): memory.write(os.urandom(1 << 20))
for number in range({CHILDREN}):
    if os.fork() == 0: break
else:
    open("READY", "w").close()
time.sleep(1000)
"""


def root_of(words: str) -> int:
    """The process with these words of which no parent has them."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if words in (path / "cmdline").read_text():
                found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    (root,) = [pid for pid, parent in found.items() if parent not in found]
    return root


async def test_it_stays_shared(daemons: Nodes, tmp_path: Path) -> None:
    a, b, _ = daemons
    ready = tmp_path / "ready"
    await a.phaul(
        "run", "--name", "victim", "--", sys.executable, "-ISc", PROGRAM.replace("READY", str(ready)), check=True
    )
    await until(ready.exists, 60)
    before = forked_memory(root_of(str(ready)))
    assert before.own_bytes < 2 * MIB << 20 < before.shared_bytes
    moved = await a.phaul("migrate", "victim", "--to", b.address, "--mode", "stop-copy", "--json")
    assert moved.returncode == 0, moved.stderr
    report = moved.events()[-1]
    assert report["restore_mode"] == "eager", report
    assert "shared since a fork" in report["restore_mode_reason"]
    after = forked_memory(root_of(str(ready)))
    assert after.own_bytes < 2 * MIB << 20 < after.shared_bytes
