"""Two real daemons: what is refused or rolled back leaves nothing, and what moves, moves however often."""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from phaul.v1 import node_pb2, node_pb2_grpc
from phaul_criu.install import find_binary
from tests.inventory import Inventory, at_rest, processes
from tests.nodes import Node, Nodes, until
from tests.victims.heartbeat import read_beats

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

HEARTBEAT: Final = [sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "victims/heartbeat.py")]
SLOW_BYTES_PER_SECOND: Final = 8 << 20
ROLLED_BACK: Final = 4
REFUSED: Final = 3
#: Under a shim, where trees are restored, it is not allowed to make namespaces; elsewhere it is criu.
CRIPPLED_CRIU: Final = """#!/bin/sh
case $(tr '\\0' ' ' </proc/$PPID/cmdline) in
*"shim restore "*) exec setpriv --bounding-set -sys_admin --inh-caps -sys_admin "{criu}" "$@" ;;
*) exec "{criu}" "$@" ;;
esac
"""


class Victim:
    """A workload that beats; its file is seen from both nodes."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.file = file

    @classmethod
    async def start(cls, node: Node, directory: Path, name: str = "victim", mib: int = 8) -> Victim:
        victim = cls(name, directory / f"{name}.beats")
        words = [*HEARTBEAT, str(victim.file), "--mib", str(mib)]
        await node.phaul("run", "--name", name, "--", *words, check=True)
        await victim.beats()
        return victim

    async def beats(self) -> None:
        """Wait for ten more beats. Raises TimeoutError."""
        count = read_beats(self.file).count
        await until(lambda: read_beats(self.file).count > count + 10)

    def pids(self, node: Node) -> list[int]:
        """Where it runs, as the node counts; without its init."""
        return [pid for pid, line in processes(node) if str(self.file) in line and "tini -- " not in line]

    async def stands_still(self) -> None:
        """Wait until it is frozen."""
        count = -1
        async with asyncio.timeout(20):
            while (seen := read_beats(self.file).count) != count:
                count = seen
                await asyncio.sleep(0.1)


async def migrate(node: Node, what: str, to: Node, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report."""
    done = await node.phaul("migrate", what, "--to", to.address, "--json", *options)
    events = [*done.events(), {}]
    report: dict[str, Any] = next((each for each in events if each.get("event") == "report"), {"stderr": done.stderr})
    return done.returncode, report


async def assert_nothing_more(nodes: list[Node], before: list[Inventory]) -> None:
    """What ends by itself has two seconds for it."""
    for node, earlier in zip(nodes, before, strict=True):
        for _ in range(20):
            more = (await node.inventory()).more_than(earlier)
            if not more:
                break
            await asyncio.sleep(0.1)
        assert more == {}, node.name


async def test_a_restore_that_fails_is_rolled_back_again_and_again(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    crippled = tmp_path / "criu"
    crippled.write_text(CRIPPLED_CRIU.format(criu=find_binary()))
    crippled.chmod(0o755)
    await a.start_phauld()
    await b.start_phauld(criu=crippled)
    victim = await Victim.start(a, tmp_path)
    (pid,) = victim.pids(a)
    before = [await at_rest(node) for node in (a, b)]
    for _ in range(3):
        exit_code, report = await migrate(a, "victim", b)
        assert exit_code == ROLLED_BACK, report
        assert report["outcome"] == "rolled-back"
        assert "RESTORE_FAILED" in str(report)
        await victim.beats()
    assert victim.pids(a) == [pid]
    assert victim.pids(b) == []
    await assert_nothing_more([a, b], before)


async def test_a_name_that_is_taken_there_is_refused_beforehand_or_rolled_back(daemons: Nodes, tmp_path: Path) -> None:
    a, b, _ = daemons
    victim = await Victim.start(a, tmp_path)
    await b.phaul("run", "--name", "victim", "--", "sleep", "100", check=True)
    await migrate(a, "victim", b)
    before = [await at_rest(node) for node in (a, b)]
    exit_code, report = await migrate(a, "victim", b)
    assert exit_code in (REFUSED, ROLLED_BACK), report
    assert "victim" in str(report)
    await victim.beats()
    assert not report.get("timeline"), report  # it was not even frozen
    await assert_nothing_more([a, b], before)


async def test_a_destination_that_is_not_there_is_refused(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    await a.start_phauld()
    victim = await Victim.start(a, tmp_path)
    before = await at_rest(a)
    exit_code, report = await migrate(a, "victim", b)
    assert exit_code != 0
    assert "not reachable" in str(report)
    assert not report.get("timeline"), report
    await victim.beats()
    await assert_nothing_more([a], [before])


@pytest.mark.parametrize("stopped", ["source", "destination"])
async def test_a_daemon_is_stopped_in_the_middle_of_a_freeze(daemons: Nodes, tmp_path: Path, stopped: str) -> None:
    """SIGTERM, as systemd sends it: the migration is rolled back before the daemon ends."""
    a, b, _ = daemons
    victim = await Victim.start(a, tmp_path, mib=64)
    before = [await at_rest(node) for node in (a, b)]
    await a.limit_bandwidth(SLOW_BYTES_PER_SECOND)
    moving = asyncio.create_task(migrate(a, "victim", b, "--mode", "stop-copy"))
    await victim.stands_still()
    node = a if stopped == "source" else b
    assert await node.kill_phauld(signal.SIGTERM) == 0
    await victim.beats()
    exit_code, report = await moving
    assert exit_code != 0, report
    await a.limit_bandwidth(None)
    await node.start_phauld()
    assert len(victim.pids(a)) == 1
    assert victim.pids(b) == []
    await assert_nothing_more([a, b], before)
    exit_code, report = await migrate(a, "victim", b)
    assert exit_code == 0, report
    await victim.beats()
    assert len(victim.pids(b)) == 1


async def test_many_at_once_to_and_fro(daemons: Nodes, tmp_path: Path) -> None:
    a, b, _ = daemons
    leaving = [await Victim.start(a, tmp_path, f"from-a-{number}") for number in range(2)]
    coming = [await Victim.start(b, tmp_path, f"from-b-{number}") for number in range(2)]
    moves = [migrate(a, victim.name, b) for victim in leaving] + [migrate(b, victim.name, a) for victim in coming]
    for exit_code, report in await asyncio.gather(*moves):
        assert exit_code == 0, report
    for victim in (*leaving, *coming):
        await victim.beats()
    assert [len(victim.pids(b)) for victim in (*leaving, *coming)] == [1, 1, 0, 0]
    assert [len(victim.pids(a)) for victim in (*leaving, *coming)] == [0, 0, 1, 1]


async def test_the_same_process_twice_at_once_moves_once(daemons: Nodes, tmp_path: Path) -> None:
    a, b, _ = daemons
    victim = await Victim.start(a, tmp_path)
    ends = await asyncio.gather(*(migrate(a, "victim", b) for _ in range(3)))
    assert sorted(exit_code == 0 for exit_code, _ in ends) == [False, False, True], ends
    await victim.beats()
    assert (len(victim.pids(a)), len(victim.pids(b))) == (0, 1)


async def test_a_process_that_phaul_did_not_start_moves_by_its_pid_again_and_again(
    daemons: Nodes, tmp_path: Path
) -> None:
    """In the node's own PID namespace: it has the same PID everywhere."""
    a, b, _ = daemons
    file = tmp_path / "plain.beats"
    words = shlex.join([*HEARTBEAT, str(file)])
    script = f"echo 20000 >/proc/sys/kernel/ns_last_pid; setsid {words} </dev/null >/dev/null 2>&1 &"
    await a.run(["sh", "-c", script])
    victim = Victim("plain", file)
    await victim.beats()
    (pid,) = victim.pids(a)
    before = None
    for trip in range(5):
        for here, there in ((a, b), (b, a)):
            exit_code, report = await migrate(here, str(pid), there)
            assert exit_code == 0, (trip, report)
            await victim.beats()
            assert victim.pids(there) == [pid]
            assert victim.pids(here) == []
        if before is None:
            before = [await at_rest(node) for node in (a, b)]
    assert before is not None
    await assert_nothing_more([a, b], before)


async def test_the_exit_status_follows_the_process(daemons: Nodes, tmp_path: Path) -> None:
    a, b, _ = daemons
    stop = tmp_path / "stop"
    script = f"while ! [ -e {stop} ]; do sleep 0.05; done; echo the end; exit 7"
    await a.phaul("run", "--name", "job", "--", "sh", "-c", script, check=True)
    await a.phaul("migrate", "job", "--to", b.address, "-q", check=True)
    stop.touch()
    async with b.daemon.channel() as channel:
        stub: node_pb2_grpc.NodeAsyncStub = node_pb2_grpc.NodeStub(channel)
        ended = (await stub.WaitWorkload(node_pb2.WaitWorkloadRequest(name="job"), timeout=20)).workload
    assert ended.state == node_pb2.WORKLOAD_STATE_EXITED
    assert ended.exit_status.exit_code == 7
    assert (await b.phaul("logs", "job")).stdout == "the end\n"
