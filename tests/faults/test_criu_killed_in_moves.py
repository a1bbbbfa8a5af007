"""SIGKILL for the source's criu at an exact instant, with two phaulds around it: one copy in the end, undamaged.

`test_criu_killed.py` has each instant of a bare dump. Here the roll-back goes on around it, or the commit: whatever the
instant, one copy runs, its registers are as they were, its connections live, and nothing is left of the attempt. A run
without `--all` takes some instants of each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from phaul.v1 import migrations_pb2, node_pb2, types_pb2
from phaul.v1.types_pb2 import Options
from tests.faults.bench import Bench, bench
from tests.faults.instants import PTRACE_CONT, Tools, may_be_real_time
from tests.faults.moving import KillableCriu, Workload
from tests.faults.test_addresses import forgets
from tests.inventory import Inventory, at_rest
from tests.node.test_move_address import ADDRESS, PORT, VICTIMS, at_one_node, give, has_address, listening, progress
from tests.node.test_postcopy import large_pipes
from tests.nodes import Nodes, log_tail

__all__ = ["large_pipes"]  # for every test here

pytestmark = [
    pytest.mark.criu,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the guard knows the registers of x86-64 only"),
]

STOP_COPY: Final = Options(mode=types_pb2.MODE_STOP_COPY, restore_mode=types_pb2.RESTORE_MODE_EAGER)
POST_COPY: Final = Options(mode=types_pb2.MODE_POST_COPY)
SOME: Final = 4  #: instants of each, without --all, beside the first and the last
#: PTRACE_SETREGS, PTRACE_SETREGSET
CHANGES: Final = frozenset({"p 13", "p 16901"})
SHAPE: Final = (1, 2, 3)  #: of `Workload`: one thread waits in a futex, the other computes
CLEAN_SECONDS: Final = 30.0
LAST: Final = 4  #: calls of a dump that another one may not come to, as they depend on what its tasks were doing


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    try:
        return Tools(tmp_path_factory.mktemp("tools"))
    except RuntimeError as exc:
        pytest.skip(str(exc))


class Pair:
    """Two nodes; the criu of node a, and of b, which dumps for the way back, can be killed."""

    def __init__(self, made: Bench, criu: dict[str, KillableCriu], name: str, options: Options) -> None:
        self.made = made
        self.criu = criu
        self._name = name
        self._options = options
        self._count = 0
        self.before: dict[str, Inventory] = {}
        self.all_of_it = False  #: with --all, phauld's descriptors are counted, too

    async def move(self, source: str) -> migrations_pb2.Migration:
        """The record of an attempt that is over."""
        self._count += 1
        migration_id = f"move-{self._count}"
        request = migrations_pb2.StartMigrationRequest(
            migration_id=migration_id,
            workload=self._name,
            destination=self.made.links[source].address,
            options=self._options,
        )
        await self.made.migrations(source).StartMigration(request, wait_for_ready=True, timeout=20)
        await self.made.settle(migration_id, source=source)
        record = await self.made.record(migration_id, source)
        assert record is not None
        return record

    async def moves(self, source: str) -> None:
        """As nobody is killed."""
        record = await self.move(source)
        assert record.phase == types_pb2.MIGRATION_PHASE_DONE, f"{record}\n{self.logs()}"

    async def calls(self) -> dict[int, str]:
        """Of a dump at a. It has been to b and back before the nodes are looked at."""
        with self.criu["a"].counting():
            await self.moves("a")
        await self.moves("b")
        nodes = self.made.nodes
        self.before = dict(zip(nodes, await asyncio.gather(*map(at_rest, nodes.values())), strict=True))
        return self.criu["a"].calls()

    async def left(self) -> str:
        """What there is more than before, once it had time to go."""
        more: dict[str, Any] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLEAN_SECONDS):
                while True:
                    more = {name: (await node.inventory()).more_than(self.before[name]) for name, node in
                            self.made.nodes.items()}  # fmt: skip
                    for each in (
                        more.values()
                    ):  # not yet: in post-copy a socket stays when criu dies while its first images leave
                        each.pop("descriptors", None)
                    if not any(more.values()):
                        return ""
                    await asyncio.sleep(0.1)
        return f"left: {more}"

    def logs(self) -> str:
        """The ends of what the daemons have said."""
        return "\n".join(
            f"--- {name}\n{log_tail(node.directory / 'phauld.log', 80)}" for name, node in self.made.nodes.items()
        )


@contextlib.asynccontextmanager
async def pair(tools: Tools, directory: Path, name: str, options: Options) -> AsyncIterator[Pair]:
    try:
        criu = {name: KillableCriu(tools, directory / f"killable-{name}") for name in ("a", "b")}
    except RuntimeError as exc:
        pytest.skip(str(exc))
    async with bench(directory / "bench") as made:
        for node in criu:
            made.use_criu(node, criu[node].program)
        await made.start()
        yield Pair(made, criu, name, options)


def chosen(calls: dict[int, str], config: pytest.Config) -> list[int]:
    """All instants; or the first, the last, and some in which a task has other registers than its own.

    Where criu and its guard cannot go first, a task that does what criu has told it is not caught for certain.
    """
    instants = list(calls)
    if not may_be_real_time():
        instants = [at for at in instants if calls[at][0] != "w" or calls.get(at - 1) != f"p {PTRACE_CONT}"]
    if config.getoption("--all"):
        return instants
    changed = [at for at in instants if calls[at] == f"p {PTRACE_CONT}" and calls.get(at - 1) in CHANGES]
    return [instants[0], *changed[:: -max(1, len(changed) // SOME)][:SOME], instants[-LAST]]


@pytest.mark.parametrize("options", [STOP_COPY, POST_COPY], ids=["stop-copy", "post-copy"])
async def test_registers(tools: Tools, tmp_path: Path, pytestconfig: pytest.Config, options: Options) -> None:
    bad = ""
    tally: Counter[str] = Counter()
    async with pair(tools, tmp_path, "victim", options) as both:
        victim = Workload(tools, tmp_path / "victim", both.made, *SHAPE)
        await victim.start()
        both.all_of_it = bool(pytestconfig.getoption("--all"))
        calls = await both.calls()
        assert victim.look() == ""
        for instant in chosen(calls, pytestconfig):
            with both.criu["a"].killed_at(instant):
                record = await both.move("a")
            killed = both.criu["a"].was_killed()
            moved = record.phase == types_pb2.MIGRATION_PHASE_DONE
            tally[f"{'killed' if killed else 'not killed'}, {'moved' if moved else 'resumed'}"] += 1
            wrong = "" if victim.where() == ["b" if moved else "a"] else f"it is on {victim.where()}: {record}"
            wrong = wrong or ("" if killed or moved else f"nobody was killed, and it did not move: {record}")
            wrong = wrong or victim.look()
            if not wrong and moved:
                await both.moves("b")
                wrong = victim.look()
            if wrong := wrong or await both.left():
                bad = f"killed at {instant}, {calls[instant]}: {wrong}\n{both.logs()}"
                break
        print(f"{len(calls)} instants; {dict(tally)}")
        await both.made.node_service("a").StopWorkload(node_pb2.StopWorkloadRequest(name="victim", signal=9))
    assert not bad, bad
    assert sum(count for what, count in tally.items() if what.startswith("killed")) >= SOME


async def test_connections(tools: Tools, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Of clients of an address that moves with the tree."""
    options = Options(tcp_policy=types_pb2.TCP_POLICY_KEEP, move_addresses=[ADDRESS])
    options.MergeFrom(STOP_COPY)
    tally: Counter[str] = Counter()
    async with pair(tools, tmp_path, "echo", options) as both:
        nodes = Nodes(both.made.nodes["a"], both.made.nodes["b"], both.made.client)
        await give(nodes.a)
        for node in nodes[:2]:  # see `forgets`
            await node.run(["sysctl", "-qw", "net.ipv4.tcp_orphan_retries=1"], check=True)
        python = [sys.executable, "-I", "-S"]
        spec = types_pb2.WorkloadSpec(name="echo", argv=[*python, str(VICTIMS / "tcp_echo.py"), ADDRESS, str(PORT)])
        await both.made.node_service("a").RunWorkload(node_pb2.RunWorkloadRequest(spec=spec), timeout=20)
        await listening(nodes.a, PORT + 1)
        result = tmp_path / "client.json"
        client = await nodes.client.start(
            [*python, str(VICTIMS / "tcp_client.py"), str(result), ADDRESS, str(PORT), "3"]
        )
        await progress(result)
        both.all_of_it = bool(pytestconfig.getoption("--all"))
        calls = await both.calls()
        for instant in chosen(calls, pytestconfig):
            with both.criu["a"].killed_at(instant):
                record = await both.move("a")
            killed = both.criu["a"].was_killed()
            moved = record.phase == types_pb2.MIGRATION_PHASE_DONE
            tally[f"{'killed' if killed else 'not killed'}, {'moved' if moved else 'resumed'}"] += 1
            async with at_one_node(nodes, nodes.b if moved else nodes.a):
                assert await has_address(nodes.a) is not moved, (instant, record)
            await progress(result)
            seen = json.loads(result.read_text())
            assert (seen["wrong"], seen["resets"]) == (0, 0), f"{instant}: {record} {seen}\n{both.logs()}"
            if moved:
                await forgets(nodes.a)
                await both.moves("b")
            assert (left := await both.left()) == "", f"{instant}: {left}\n{both.logs()}"
        print(f"{len(calls)} instants; {dict(tally)}")
        await client.stop()
        seen = json.loads(result.read_text())
    assert (seen["wrong"], seen["resets"], seen["idle_alive"]) == (0, 0, 3)
    assert sum(count for what, count in tally.items() if what.startswith("killed")) >= SOME
