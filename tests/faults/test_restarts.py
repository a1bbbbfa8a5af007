"""A workload with `--restart always` ends in the midst of a move, daemons are killed beside it: one copy in the end.

What runs says which start of it this is, and how far it is (`tests/restarting.py`): two at a time, a start too many and
a lost beat are all seen. All cases share a pair of nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from phaul.v1 import migrations_pb2, node_pb2, types_pb2
from phaul.v1.types_pb2 import Options, RestartPolicy, WorkloadSpec
from tests.daemon import LOG_DIR
from tests.faults.bench import Bench, bench
from tests.faults.faults import signal_one
from tests.faults.judge import leftovers
from tests.nodes import until
from tests.restarting import Restarting

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

REACH_SECONDS = 20.0
QUIET_SECONDS = 0.4  #: for a second copy to show itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The tree of a node is killed at a boundary, and perhaps its phauld, or the other's."""

    name: str
    at: str
    dies_on: str
    daemons: str = ""  #: whose phauld is killed beside it
    ends: frozenset[tuple[str, int]]  #: the node that it runs on in the end, and the number of starts


HERE_AGAIN = ("a", 2)
THERE = ("b", 1)
THERE_AGAIN = ("b", 2)
CASES = [
    Case(name="before-anything-froze", at="a>b:OpenSession:reply", dies_on="a", ends=frozenset({HERE_AGAIN})),
    # The other copy is complete by then, or fails: either way it is the only one.
    Case(name="frozen", at="a:dump:post-dump:notify", dies_on="a", ends=frozenset({HERE_AGAIN, THERE})),
    Case(name="prepared", at="b:restore:post-restore:notify", dies_on="a", ends=frozenset({HERE_AGAIN, THERE})),
    Case(
        name="frozen-and-the-source-is-killed",
        at="a:dump:post-dump:notify",
        dies_on="a",
        daemons="a",
        ends=frozenset({HERE_AGAIN}),
    ),
    Case(name="committed", at="a>b:Commit:reply", dies_on="b", ends=frozenset({THERE_AGAIN})),
    Case(
        name="committed-and-the-source-is-killed",
        at="a>b:Commit:reply",
        dies_on="b",
        daemons="a",
        ends=frozenset({THERE_AGAIN}),
    ),
    Case(
        name="let-go-and-the-destination-is-killed",
        at="b:restore:post-resume:notify",
        dies_on="b",
        daemons="b",
        ends=frozenset({THERE_AGAIN}),
    ),
]


async def test_one_copy_in_the_end(tmp_path: Path) -> None:
    wrong = []
    async with bench(tmp_path / "bench") as made:
        await made.start()
        for case in CASES:
            try:
                async with asyncio.timeout(60):
                    await _run(made, case, tmp_path)
            except Exception as exc:
                wrong.append(f"{case.name}: {type(exc).__name__} {exc}; seen {made.gates.seen[-6:]}")
    assert not wrong, "\n".join(wrong)


async def _run(made: Bench, case: Case, directory: Path) -> None:
    tree = Restarting(case.name, directory)
    restart = RestartPolicy(mode=types_pb2.RESTART_MODE_ALWAYS)
    spec = WorkloadSpec(name=tree.name, argv=tree.argv, working_directory="/run", restart=restart)
    request = node_pb2.RunWorkloadRequest(spec=spec)
    await made.node_service("a").RunWorkload(request, wait_for_ready=True, timeout=20)
    await tree.beats(1)
    made.gates.clear()
    happened = asyncio.Event()
    made.gates.plan(case.at, _then(happened, lambda: _damage(made, case, tree)))
    options = Options(restore_mode=types_pb2.RESTORE_MODE_EAGER)
    options.freeze_budget.FromSeconds(30)
    move = migrations_pb2.StartMigrationRequest(
        migration_id=case.name, destination=made.link.address, options=options, workload=tree.name
    )
    with contextlib.suppress(Exception):  # the daemon may be killed before it has answered
        await made.migrations("a").StartMigration(move, timeout=10)
    async with asyncio.timeout(REACH_SECONDS):
        await happened.wait()
    await made.settle(case.name)
    await _judge(made, case, tree)


async def _damage(made: Bench, case: Case, tree: Restarting) -> None:
    if case.daemons == case.dies_on == "b":
        tree.end(1)  # killed by a stranger, it could not be told from one that criu has killed
        await until(lambda: not tree.order.exists())
    if case.daemons:
        await made.kill_daemon(case.daemons)
    if case.daemons != case.dies_on or case.dies_on == "a":
        signal_one(made.nodes[case.dies_on], f"tini -- {tree.argv[0]} -IS {tree.argv[2]} {tree.file}")


def _then(happened: asyncio.Event, damage: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    async def do() -> None:
        try:
            await damage()
        finally:
            happened.set()

    return do


async def _judge(made: Bench, case: Case, tree: Restarting) -> None:
    async with asyncio.timeout(REACH_SECONDS):
        while not await _running(made, tree):  # noqa: ASYNC110 - it is in other processes
            await asyncio.sleep(0.05)
    await asyncio.sleep(QUIET_SECONDS)
    await tree.beats(tree.starts)
    (running,) = await _running(made, tree)
    assert (running.name, tree.starts) in case.ends, (running.name, tree.starts)
    assert running.workload.restarts == tree.starts - 1, running
    stop = node_pb2.StopWorkloadRequest(name=tree.name, signal=9)
    stopped = await made.node_service(running.name).StopWorkload(stop, timeout=20)
    assert stopped.workload.state == node_pb2.WORKLOAD_STATE_EXITED
    for name, node in made.nodes.items():
        with contextlib.suppress(grpc.aio.AioRpcError):  # it never came there
            await made.node_service(name).RemoveWorkload(node_pb2.RemoveWorkloadRequest(name=tree.name), timeout=10)
        (node.root / LOG_DIR.relative_to("/") / f"{tree.name}.log").unlink(missing_ok=True)
    assert await leftovers(made) == ()


class Found(NamedTuple):
    """Where a workload runs."""

    name: str
    workload: node_pb2.Workload


async def _running(made: Bench, tree: Restarting) -> list[Found]:
    found = []
    for name in made.nodes:
        listed = await made.node_service(name).ListWorkloads(node_pb2.ListWorkloadsRequest(), timeout=10)
        found += [Found(name, each) for each in listed.workloads if each.name == tree.name and each.pid]
    return found
