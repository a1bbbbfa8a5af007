"""The harness itself, with plain criu: what a node isolates, that trees can be moved in it, that nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phaul_criu.install import find_binary
from tests.by_hand import move_by_hand, start_tree
from tests.inventory import processes
from tests.nodes import ROOT, Node, Nodes, two_nodes, until
from tests.started import CommandFailed
from tests.victims.heartbeat import Beats, read_beats

pytestmark = pytest.mark.criu

HEARTBEAT = [sys.executable, "-I", "-S", str(ROOT / "tests/victims/heartbeat.py")]


async def next_beat(file: Path) -> Beats:
    """The next beat."""
    seen = read_beats(file).count
    await until(lambda: read_beats(file).count > seen)
    return read_beats(file)


async def connects(node: Node, address: str) -> bool:
    """Whether packets go to and fro; a refused connection is an answer, too."""
    script = f"import socket; print(socket.socket().connect_ex(('{address}', 9)))"
    try:
        done = await node.run([sys.executable, "-I", "-S", "-c", script], timeout_seconds=1)
    except TimeoutError:
        return False
    return done.stdout.strip() == "111"


def exists(pid: int) -> bool:
    """Whether there is such a process on the host."""
    return Path(f"/proc/{pid}").exists()


def host_state() -> tuple[str, list[str]]:
    """What a harness could leave behind in the host's namespaces."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    return links, Path("/proc/self/mountinfo").read_text().splitlines()


async def test_moves_a_tree_with_plain_criu(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    beats = tmp_path / "beats"
    pid = await start_tree(a, [*HEARTBEAT, str(beats), "--mib", "16", "--dirty", "4"], tmp_path / "heartbeat.log")
    before = await next_beat(beats)

    await move_by_hand(a, b, pid)

    after = await next_beat(beats)
    assert after.count > before.count
    assert not [line for _, line in processes(a) if "heartbeat" in line]
    moved = next(pid for pid, line in processes(b) if "heartbeat" in line and "tini" not in line)
    await b.run(["kill", "-USR1", str(moved)])
    await until(lambda: read_beats(beats).checks)
    checked = read_beats(beats)
    assert checked.failures == 0
    assert checked.dirtied_pages > 0


async def test_a_node_sees_its_own_processes_and_name_only(nodes: Nodes) -> None:
    a, b, _ = nodes
    sleeper = await a.start(["sleep", "100"])
    assert (await a.run(["cat", "/proc/sys/kernel/hostname"])).stdout == "a\n"
    assert (await a.run(["cat", f"/proc/{sleeper.node_pid}/comm"])).stdout == "sleep\n"
    assert [line for _, line in processes(b)] == ["tini -- cat", "cat"]
    assert [pid for pid, line in processes(a) if line == "sleep 100"] == [sleeper.node_pid]


async def test_every_node_reaches_every_other(nodes: Nodes) -> None:
    a, b, client = nodes
    ways = [(a, b.address), (b, a.address), (client, a.lan_address), (client, b.lan_address), (a, b.lan_address)]
    assert [await connects(node, address) for node, address in ways] == [True] * len(ways)


async def test_a_cut_link_is_silent_until_it_is_mended(nodes: Nodes) -> None:
    a, b, client = nodes
    await a.cut()
    assert not await connects(a, b.address)
    assert not await connects(b, a.address)
    assert await connects(client, a.lan_address)
    await a.mend()
    assert await connects(a, b.address)


async def test_bandwidth_is_limited(nodes: Nodes) -> None:
    a, b, _ = nodes
    await a.limit_bandwidth(4 << 20)
    receiver = await b.start(
        [
            sys.executable,
            "-c",
            "import socket; s = socket.create_server(('', 9)); c, _ = s.accept()\nwhile c.recv(65536): pass",
        ]
    )
    send = f"""
import socket, time
while True:
    try: s = socket.create_connection(('{b.address}', 9)); break
    except ConnectionRefusedError: time.sleep(0.01)
started = time.monotonic(); s.sendall(bytes(4 << 20)); s.shutdown(1); s.recv(1); print(time.monotonic() - started)
"""
    seconds = float((await a.run([sys.executable, "-c", send])).stdout)
    assert await receiver.wait() == 0
    assert seconds > 0.7  # one at the rate that was set; without the limit, milliseconds


async def test_orphans_are_reaped(nodes: Nodes) -> None:
    a = nodes.a
    before = await a.inventory()
    await a.run(["sh", "-c", "sh -c 'sleep 0.05 &'"])
    await asyncio.sleep(0.3)
    assert (await a.inventory()).more_than(before) == {}


async def test_a_command_that_fails_or_takes_too_long(nodes: Nodes) -> None:
    a = nodes.a
    with pytest.raises(CommandFailed, match="ended with 3: out of luck"):
        await a.run(["sh", "-c", "echo out of luck >&2; exit 3"])
    with pytest.raises(TimeoutError):
        await a.run(["sleep", "100"], timeout_seconds=0.2)
    assert [line for _, line in processes(a)] == ["tini -- cat", "cat"]


async def test_a_stopped_process_goes_on(nodes: Nodes) -> None:
    process = await nodes.a.start(["sleep", "0.5"])
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        await process.wait(timeout_seconds=0.8)
    process.send_signal(signal.SIGCONT)
    assert await process.wait() == 0


async def test_a_dead_process_is_seen_with_its_signal(nodes: Nodes) -> None:
    process = await nodes.a.start(["sleep", "100"])
    assert await process.stop(signal.SIGKILL) == -signal.SIGKILL


async def test_nothing_is_left_on_the_host(tmp_path: Path) -> None:
    before = host_state()
    async with two_nodes(tmp_path / "nodes") as (a, b, _):
        sleepers = [await node.start(["sh", "-c", "trap '' TERM; sleep 100 & sleep 100"]) for node in (a, b)]
    assert host_state() == before
    assert [await process.wait() for process in sleepers] == [-signal.SIGKILL] * 2
    assert not any(exists(process.pid) for process in sleepers)


async def test_nothing_outlives_a_killed_harness(tmp_path: Path) -> None:
    script = """
import asyncio, sys
from pathlib import Path
from tests.nodes import two_nodes
async def main():
    async with two_nodes(Path(sys.argv[1])) as (a, b, _):
        sleeper = await b.start(["setsid", "sleep", "100"])
        print(a.pid, b.pid, sleeper.pid, flush=True)
        await asyncio.sleep(100)
asyncio.run(main())
"""
    harness = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(tmp_path / "nodes")),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert harness.stdout is not None
    pids = [int(word) for word in (await harness.stdout.readline()).split()]
    assert len(pids) == 3
    harness.kill()
    await harness.wait()
    await until(lambda: not any(map(exists, pids)))


async def test_criu_keeps_what_it_found_out_in_the_nodes_own_run(nodes: Nodes) -> None:
    await nodes.a.run([find_binary(), "check"])
    assert (nodes.a.root / "run/criu.kdat").exists()
    assert not (nodes.b.root / "run/criu.kdat").exists()
