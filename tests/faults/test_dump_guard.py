"""Whom the guard of a dump watches: a criu that has not begun yet, and none at all."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phaul_criu.child import Child, spawn
from phaul_criu.install import find_binary
from phauld.guarding.dump_hold import DumpGuard
from phauld.guarding.lazy_guard import tracer
from phauld.proc import children
from tests.nodes import until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(60)]

_POLLS = 5
#: Its child is a part of it until it may begin.
_STARTER = """
import os, sys
child = os.fork()
if child == 0:
    os.read(0, 1)
    os.execv(sys.argv[1], [sys.argv[1], "swrk", sys.argv[2]])
print(child, flush=True)
os.wait()
"""


@pytest.fixture
async def guard() -> AsyncIterator[DumpGuard]:
    guard = DumpGuard()
    yield guard
    await guard.aclose()


@pytest.fixture
async def tree() -> AsyncIterator[Child]:
    async with await spawn(["sleep", "100"]) as child:
        yield child


async def test_a_criu_that_has_not_begun_is_waited_for(guard: DumpGuard, tree: Child) -> None:
    """`subprocess` of Python 3.13 returns before its child runs another program, on a slow machine long before."""
    before = set(children())
    await guard.start()
    (its_pid,) = set(children()) - before
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told, tells = os.pipe()
    begun, begins = os.pipe()
    argv: list[str | Path] = [sys.executable, "-I", "-S", "-c", _STARTER, find_binary(), str(theirs.fileno())]
    async with await spawn(argv, stdin=begun, stdout=tells, pass_fds=(theirs.fileno(),)):
        theirs.close()
        criu = int(await asyncio.to_thread(os.read, told, 100))
        pauses = _pauses(its_pid)
        watching = asyncio.create_task(guard.watch(criu, tree.pid))
        await until(lambda: watching.done() or _pauses(its_pid) > pauses + _POLLS)
        os.write(begins, b"x")
        await watching
        assert tracer(criu) == its_pid
        ours.close()
        await guard.settled()
    for descriptor in (told, tells, begun, begins):
        os.close(descriptor)


def _pauses(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches:"))


async def test_after_nobody_was_to_be_watched_the_next_one_is(guard: DumpGuard, tree: Child) -> None:
    """What starts criu may have ended before it was known who is criu."""
    for _ in range(3):
        async with await spawn(["sleep", "100"]) as starter:
            await guard.watch(starter.pid, tree.pid)
            assert tracer(starter.pid) == 0
        await guard.settled()
