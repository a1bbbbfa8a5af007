"""A timer that had expired when its tree was frozen ticks on after the move."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import pytest

from tests.node.test_daemons import migrate
from tests.nodes import Nodes, until

pytestmark = pytest.mark.criu

#: Expired and not read until the file `go` is there; then it must tick ten times.
PROGRAM: Final = """
import ctypes, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
timer = libc.timerfd_create(time.CLOCK_MONOTONIC, 0)
assert libc.timerfd_settime(timer, int(sys.argv[2]), struct.pack("qqqq", 0, 20_000_000, 0, 20_000_000), None) == 0
time.sleep(0.1)
open(sys.argv[1] + "/ready", "w").close()
while not os.path.exists(sys.argv[1] + "/go"):
    time.sleep(0.01)
for _ in range(10):
    assert struct.unpack("Q", os.read(timer, 8))[0] > 0
"""
ABSOLUTE: Final = 1  # TFD_TIMER_ABSTIME


@pytest.mark.parametrize(
    ("flags", "mode"),
    [(0, ("stop-copy", "--restore", "eager")), (ABSOLUTE, ("post-copy",))],
    ids=["relative", "absolute"],
)
async def test_it_ticks_on(daemons: Nodes, tmp_path: Path, flags: int, mode: tuple[str, ...]) -> None:
    a, b, _ = daemons
    words = [sys.executable, "-I", "-S", "-c", PROGRAM, str(tmp_path), str(flags)]
    await a.phaul("run", "--name", "clock", "--", *words, check=True)
    await until((tmp_path / "ready").exists)
    status, report = await migrate(a, "clock", b, "--mode", *mode)
    assert status == 0, report
    (tmp_path / "go").touch()
    assert (await b.phaul("wait", "clock")).returncode == 0
