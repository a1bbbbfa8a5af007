"""Whom the guard of a dump watches, and what is left of it if it is killed with the tree on one processor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from phaul.v1 import types_pb2
from phaul.v1.types_pb2 import Options
from phaul_criu.child import Child, spawn
from phaul_criu.criu import Criu
from phaul_criu.install import find_binary
from phaul_criu.urgency import hurry
from phauld.guarding.cure import Area, place_of_code
from phauld.guarding.dump_hold import DumpGuard
from phauld.guarding.lazy_guard import tracer
from phauld.proc import children
from tests.faults.bench import bench
from tests.faults.faults import signal_one
from tests.faults.instants import may_be_real_time
from tests.faults.judge import judge
from tests.inventory import processes
from tests.nodes import Node, until

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
async def guard(tmp_path: Path) -> AsyncIterator[DumpGuard]:
    guard = DumpGuard(tmp_path / "processors.json")
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


def test_criu_puts_no_code_into_the_kernels_own_page() -> None:
    """A process that is about to begin another program has no other area for a moment."""
    text = Area(0x400000, 0x402000, "r-xp", 0, "/bin/true")
    vsyscall = Area(0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, "--xp", 0, "[vsyscall]")
    assert place_of_code([vsyscall]) is None
    assert place_of_code([text, vsyscall]) == text


async def test_a_guard_that_is_killed_leaves_the_tree_where_it_may_run(guard: DumpGuard, tree: Child) -> None:
    before = os.sched_getaffinity(tree.pid)
    async with await Criu(find_binary()).prestart() as swrk:
        assert swrk.pid is not None
        hurry(swrk.pid)
        earlier = set(children())
        await guard.start()
        (its_pid,) = set(children()) - earlier
        await guard.watch(swrk.pid, tree.pid)
        await guard.note_frozen()
        assert len(os.sched_getaffinity(tree.pid)) == (1 if may_be_real_time() else len(before))
        os.kill(its_pid, signal.SIGKILL)
        assert await guard.note_whole()
    await guard.settled()
    assert os.sched_getaffinity(tree.pid) == before
    async with await Criu(find_binary()).prestart() as swrk:
        await guard.watch(swrk.pid or 0, tree.pid)  # another guard
        assert tracer(swrk.pid or 0) not in (0, its_pid)
    await guard.settled()


async def test_guard_and_phauld_die_with_the_tree_on_one_processor(tmp_path: Path) -> None:
    """In the freeze; the next phauld gives it back by that where it may run."""
    async with bench(tmp_path / "bench") as made:
        await made.start()
        node = made.nodes["a"]
        victim = await made.run_victim(children=1, threads=2)
        before = _allowed(node)
        kept = asyncio.get_running_loop().create_future()

        async def damage() -> None:
            kept.set_result(set(_allowed(node).values()))
            signal_one(node, "dump_guard")
            await made.kill_daemon("a")

        made.gates.clear()
        made.gates.plan("a:dump:query-ext-files:answer", damage)
        options = Options(mode=types_pb2.MODE_STOP_COPY, restore_mode=types_pb2.RESTORE_MODE_EAGER)
        with contextlib.suppress(grpc.aio.AioRpcError):  # the daemon may be killed before it has answered
            await made.migrate(victim, migration_id="both-die", options=options)
        allowed = await asyncio.wait_for(kept, 20)
        await made.settle("both-die")
        if may_be_real_time():
            assert len(allowed) == 1
            assert allowed.pop().isdecimal()  # one processor
        assert _allowed(node) == before
        judgement = await judge(made, victim, "both-die")
        assert (judgement.outcome, judgement.alive, judgement.leftovers) == ("resumed", 1, ())


def _allowed(node: Node) -> dict[int, str]:
    """Of each task of the victim, where it may run."""
    found = {}
    for pid, line in processes(node):
        for task in (node.root / f"proc/{pid}/task").iterdir() if "victim.py" in line else ():
            lines = (task / "status").read_text().splitlines()
            found[int(task.name)] = next(each.split()[1] for each in lines if each.startswith("Cpus_allowed_list:"))
    assert found
    return found
