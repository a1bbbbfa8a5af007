"""Post-copy between two real daemons: the tree moves first, its memory behind it, and never is there none or two."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from phaul.v1 import migrations_pb2, migrations_pb2_grpc
from tests.inventory import processes
from tests.nodes import Node, Nodes, until
from tests.started import Process
from tests.victims.heartbeat import read_beats

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

HEARTBEAT: Final = [sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "victims/heartbeat.py")]
PIPE_BYTES: Final = 4 << 20
SLOW_BYTES_PER_SECOND: Final = 16 << 20
CRAWLING_BYTES_PER_SECOND: Final = 128 << 10
#: At the destination: ends the connections to the data port, and refuses new ones.
CUT_DATA_PORT: Final = """
add table inet cut
add chain inet cut in { type filter hook input priority 0; }
add rule inet cut in tcp dport 7708 reject with tcp reset
"""


@pytest.fixture(autouse=True)
def large_pipes() -> Iterator[None]:
    """What phaul's preflight asks for, for as long as a test lasts, here or in another run on this machine."""
    setting = Path("/proc/sys/fs/pipe-max-size")
    with Path(tempfile.gettempdir(), "phaul-tests-pipes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        before = setting.read_text()
        if int(before) < PIPE_BYTES:
            try:
                setting.write_text(str(PIPE_BYTES))
            except OSError:
                pytest.skip("fs.pipe-max-size is below 4 MiB and may not be raised")
        yield
        with contextlib.suppress(OSError):  # somebody else still needs it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            setting.write_text(before)


class Victim:
    """A workload that beats, in a file that both nodes see."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @classmethod
    async def start(cls, node: Node, file: Path, mib: int, dirty: int = 0) -> Victim:
        words = [*HEARTBEAT, str(file), "--mib", str(mib), "--dirty", str(dirty)]
        await node.phaul("run", "--name", "victim", "--", *words, check=True)
        victim = cls(file)
        await until(lambda: victim.count > 20, 60)
        return victim

    @property
    def count(self) -> int:
        return read_beats(self.file).count

    async def beats_on(self, timeout_seconds: float = 30) -> None:
        count = self.count
        await until(lambda: self.count > count + 10, timeout_seconds)

    async def check(self, node: Node) -> None:
        """All its memory is what it wrote."""
        checks = read_beats(self.file).checks
        pids = heartbeats(node)
        assert len(pids) == 1, pids
        await node.run(["kill", f"-{signal.SIGUSR1.value}", str(pids[0])])
        await until(lambda: read_beats(self.file).checks > checks, 60)
        assert read_beats(self.file).failures == 0


def heartbeats(node: Node) -> list[int]:
    """The victim's processes on a node, without its init."""
    return [pid for pid, words in processes(node) if "heartbeat.py" in words and "tini" not in words.split()[0]]


async def phase(node: Node) -> dict[str, Any]:
    """The newest migration of a node."""
    answer = json.loads((await node.phaul("status", "--json", check=True)).stdout)
    migrations = answer["migrations"] if isinstance(answer, dict) else answer
    return dict(migrations[0]) if migrations else {}


async def until_phase(node: Node, wanted: str, timeout_seconds: float = 30) -> None:
    async with asyncio.timeout(timeout_seconds):
        while wanted not in json.dumps(await phase(node)).lower():  # noqa: ASYNC110 (over an RPC)
            await asyncio.sleep(0.05)


async def start_move(nodes: Nodes, *options: str) -> Process:
    words = ["migrate", "victim", "--to", nodes.b.address, "--mode", "post-copy", "--json", *options]
    return await nodes.a.start([Path(sys.executable).parent / "phaul", *words], log=nodes.a.directory / "move.log")


@pytest.fixture
async def slow(daemons: Nodes) -> Nodes:
    """The way from a to b takes a while."""
    await daemons.a.limit_bandwidth(SLOW_BYTES_PER_SECOND)
    return daemons


@pytest.mark.parametrize("mib", [64, 512])
async def test_it_moves_with_all_its_memory(daemons: Nodes, tmp_path: Path, mib: int) -> None:
    victim = await Victim.start(daemons.a, tmp_path / "beats", mib, dirty=2)
    before = [await node.inventory() for node in daemons[:2]]
    moved = await daemons.a.phaul("migrate", "victim", "--to", daemons.b.address, "--mode", "post-copy")
    assert moved.returncode == 0, moved.stderr
    await victim.beats_on()
    await victim.check(daemons.b)
    assert heartbeats(daemons.a) == []
    sys.stdout.write(f"{mib} MiB: longest gap {read_beats(victim.file).longest_gap_ns / 1e6:.0f} ms\n{moved.stdout}")
    after = [await node.inventory() for node in daemons[:2]]
    for node_before, node_after in zip(before, after, strict=True):
        more = node_after.more_than(node_before)
        assert not [words for words in more.get("processes", ()) if "relay" in words or "lazy-pages" in words]


@pytest.mark.parametrize(
    ("options", "page_stream"),
    [((), "lazy pages as criu sends them"), (("--compression", "lz4"), "lazy pages with checksums, lz4")],
    ids=["as criu sends them", "packed"],
)
async def test_a_cut_link_while_it_fills_is_made_again(
    slow: Nodes, tmp_path: Path, options: tuple[str, ...], page_stream: str
) -> None:
    victim = await Victim.start(slow.a, tmp_path / "beats", 128)
    move = await start_move(slow, *options)
    await until_phase(slow.a, "filling")
    for _ in range(2):
        await asyncio.sleep(0.7)
        await slow.b.run(["nft", "-f", "-"], stdin=CUT_DATA_PORT.encode())
        await asyncio.sleep(0.5)
        await slow.b.run(["nft", "delete", "table", "inet", "cut"])
    assert await move.wait(60) == 0, move.log.read_text()
    assert "page link made" in (slow.a.directory / "phauld.log").read_text()
    told = await phase(slow.a)
    assert told["page_stream"] == page_stream
    assert told["bytes"] > 128 << 20, "the last page was counted, too"
    await victim.beats_on()
    await victim.check(slow.b)


@pytest.mark.parametrize("options", [(), ("--checksum",)], ids=["as criu sends them", "packed"])
async def test_phaulds_killed_while_it_fills_find_it_again(
    slow: Nodes, tmp_path: Path, options: tuple[str, ...]
) -> None:
    victim = await Victim.start(slow.a, tmp_path / "beats", 128)
    move = await start_move(slow, "--detach", *options)
    await until_phase(slow.a, "filling")
    assert await move.wait(60) == 0
    await slow.a.kill_phauld()
    await slow.b.kill_phauld()
    await victim.beats_on()
    await slow.b.start_phauld()
    await slow.a.start_phauld()
    await until_phase(slow.a, "done", 60)
    await victim.check(slow.b)
    assert heartbeats(slow.a) == []


async def test_phauld_stopped_while_it_fills_goes_on_when_it_is_back(slow: Nodes, tmp_path: Path) -> None:
    victim = await Victim.start(slow.a, tmp_path / "beats", 128)
    await start_move(slow, "--detach")
    await until_phase(slow.a, "filling")
    assert await slow.a.kill_phauld(signal.SIGTERM) == 0
    assert await slow.b.kill_phauld(signal.SIGTERM) == 0
    await slow.b.start_phauld()
    await slow.a.start_phauld()
    await until_phase(slow.a, "done", 60)
    await victim.check(slow.b)


async def stall(nodes: Nodes, *options: str) -> tuple[Process, int]:
    """A move whose restore does not get on: the relay of the destination is stopped; its PID there."""
    await nodes.a.limit_bandwidth(CRAWLING_BYTES_PER_SECOND)  # so that the restore is not over before that
    move = await start_move(nodes, *options)
    relay = await until(lambda: found(nodes.b, "fetch") or 0)
    await nodes.b.run(["kill", "-STOP", str(relay)])
    await nodes.a.limit_bandwidth(None)
    await until_phase(nodes.a, "restoring")
    return move, relay


def found(node: Node, word: str) -> int | None:
    """The PID of the first process with this word in its command line."""
    return next((pid for pid, words in processes(node) if word in words.split()), None)


@pytest.mark.parametrize("killed", ["a", "b"])
async def test_a_phauld_killed_before_the_commit_leaves_it_at_the_source(
    daemons: Nodes, tmp_path: Path, killed: str
) -> None:
    victim = await Victim.start(daemons.a, tmp_path / "beats", 64)
    await stall(daemons, "--detach")
    node = daemons.a if killed == "a" else daemons.b
    await node.kill_phauld()
    await node.start_phauld()
    await victim.beats_on()
    await victim.check(daemons.a)
    await until(lambda: not heartbeats(daemons.b) and not found(daemons.b, "fetch") and not found(daemons.a, "serve"))


async def test_cancelled_before_the_commit_it_runs_on(daemons: Nodes, tmp_path: Path) -> None:
    victim = await Victim.start(daemons.a, tmp_path / "beats", 64)
    move, _ = await stall(daemons)
    migration = await phase(daemons.a)
    await daemons.a.phaul("cancel", migration.get("migration_id") or migration["id"], check=True)
    assert await move.wait(60) != 0
    await victim.beats_on()
    await victim.check(daemons.a)
    await until(lambda: not heartbeats(daemons.b) and not found(daemons.b, "fetch") and not found(daemons.a, "serve"))


@pytest.mark.parametrize("killed", ["a", "b"])
async def test_a_relay_killed_before_the_commit_leaves_it_at_the_source(
    daemons: Nodes, tmp_path: Path, killed: str
) -> None:
    victim = await Victim.start(daemons.a, tmp_path / "beats", 64)
    move, relay = await stall(daemons)
    if killed == "a":
        relay = found(daemons.a, "serve") or 0
    await (daemons.a if killed == "a" else daemons.b).run(["kill", "-9", str(relay)])
    assert await move.wait(60) != 0
    await victim.beats_on()
    await victim.check(daemons.a)


async def test_pages_lost_at_the_destination_leave_it_held_at_the_source(slow: Nodes, tmp_path: Path) -> None:
    """Memory that cannot come any more is never read as zeros: the copy is ended, and a person decides."""
    victim = await Victim.start(slow.a, tmp_path / "beats", 128)
    await start_move(slow, "--detach")
    await until_phase(slow.a, "filling")
    await slow.b.run(["kill", "-9", str(found(slow.b, "lazy-pages"))])
    await until_phase(slow.a, "held")
    assert heartbeats(slow.b) == []
    migration = await phase(slow.a)
    identity = migration.get("migration_id") or migration["id"]
    await slow.a.phaul("resolve", identity, "--resume", check=True)
    await victim.beats_on()
    await victim.check(slow.a)


async def test_a_bandwidth_limit_holds_and_is_lifted_while_it_fills(daemons: Nodes, tmp_path: Path) -> None:
    victim = await Victim.start(daemons.a, tmp_path / "beats", 256)
    await start_move(daemons, "--detach", "--bandwidth", "4M")
    await until_phase(daemons.a, "filling")
    identity = (await phase(daemons.a))["migration_id"]
    async with daemons.a.daemon.channel() as channel:
        stub: migrations_pb2_grpc.MigrationsAsyncStub = migrations_pb2_grpc.MigrationsStub(channel)
        get = migrations_pb2.GetMigrationRequest(migration_id=identity)
        first, started = (await stub.GetMigration(get)).migration.bytes_sent, time.monotonic()
        await asyncio.sleep(2)
        limited = (await stub.GetMigration(get)).migration.bytes_sent - first
        assert 0 < limited < (4 << 20) * (time.monotonic() - started + 2)
        wish = migrations_pb2.UpdateMigrationRequest(migration_id=identity, bandwidth_limit_bytes_per_second=0)
        await stub.UpdateMigration(wish)
        await until_phase(daemons.a, "done")  # within half of the minute that it would take with the limit
    await victim.check(daemons.b)
