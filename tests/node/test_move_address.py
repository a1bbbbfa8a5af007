"""An address moves with its tree: clients see a stall and nothing else, and never do two nodes answer for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.node.test_daemons import migrate
from tests.nodes import LAN_LINK, Node, Nodes, Process, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

ADDRESS: Final = "10.77.2.100"
PORT: Final = 9000
PYTHON: Final = [sys.executable, "-I", "-S"]
VICTIMS: Final = Path(__file__).parents[1] / "victims"
RULES: Final = ("nft", "list", "tables")


async def has_address(node: Node) -> bool:
    return ADDRESS in (await node.run(["ip", "-oneline", "address", "show"])).stdout


async def give(node: Node) -> None:
    await node.run(["ip", "address", "add", f"{ADDRESS}/24", "dev", LAN_LINK])


async def start_echo(node: Node, client: Node, directory: Path, idle: int) -> tuple[Process, Path]:
    """The workload `echo`, and a client at work."""
    await give(node)
    words = [*PYTHON, str(VICTIMS / "tcp_echo.py"), ADDRESS, str(PORT)]
    await node.phaul("run", "--name", "echo", "--", *words, check=True)
    result = directory / "client.json"
    await listening(node, PORT + 1)
    arguments = [str(result), ADDRESS, str(PORT), str(idle)]
    process = await client.start([*PYTHON, str(VICTIMS / "tcp_client.py"), *arguments])
    await progress(result)
    return process, result


async def listening(node: Node, port: int) -> None:
    async with asyncio.timeout(10):
        while f"{ADDRESS}:{port} " not in (await node.run(["ss", "-Hltn"])).stdout:  # noqa: ASYNC110 - polled
            await asyncio.sleep(0.05)


async def progress(result: Path) -> None:
    """Wait until both streams have gone on by a megabyte."""

    def now() -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            seen: dict[str, Any] = json.loads(result.read_text())
            return seen
        return {"up": 0, "down": 0, "resets": 0}

    before = now()
    goal = 1 << 20
    await until(
        lambda: now()["resets"] or all(now()[name] > before[name] + goal for name in ("up", "down")), timeout_seconds=30
    )


async def verdict(process: Process, result: Path) -> dict[str, Any]:
    await process.stop(signal.SIGTERM)
    seen: dict[str, Any] = json.loads(result.read_text())  # noqa: ASYNC240 - small
    return seen


@contextlib.asynccontextmanager
async def at_one_node(nodes: Nodes, expected: Node) -> AsyncIterator[None]:
    """Afterwards only this node has it, and nothing mutes it."""
    yield
    for node in (nodes.a, nodes.b):
        assert await has_address(node) == (node is expected), node.name
        assert "phaul" not in (await node.run(RULES)).stdout
        assert "CRIU" not in (await node.run(RULES)).stdout


@pytest.mark.parametrize("idle", [0, 1000])
async def test_clients_see_a_stall_and_nothing_else(daemons: Nodes, tmp_path: Path, idle: int) -> None:
    a, b, client = daemons
    process, result = await start_echo(a, client, tmp_path, idle)
    async with at_one_node(daemons, b):
        status, report = await migrate(a, "echo", b, "--move-address", ADDRESS)
        assert status == 0, report
        await progress(result)
    seen = await verdict(process, result)
    print(f"pause {report['pause_ms']} ms, client {seen}")
    assert (seen["wrong"], seen["resets"], seen["idle_alive"]) == (0, 0, idle)


async def test_a_move_that_fails_leaves_it_where_it_was(daemons: Nodes, tmp_path: Path) -> None:
    a, b, client = daemons
    process, result = await start_echo(a, client, tmp_path, 3)
    async with at_one_node(daemons, a):
        status, report = await migrate(a, "echo", b, "--move-address", ADDRESS, "--freeze-budget", "30ms")
        assert status == 4, report
        await progress(result)
    seen = await verdict(process, result)
    assert (seen["wrong"], seen["resets"], seen["idle_alive"]) == (0, 0, 3)


async def test_what_is_wrong_with_an_address_is_told_beforehand(daemons: Nodes, tmp_path: Path) -> None:
    a, b, _ = daemons
    await a.phaul("run", "--name", "idle", "--", "sleep", "1000", check=True)

    async def codes(*options: str) -> set[str]:
        done = await a.phaul("preflight", "idle", "--to", b.address, "--json", *options)
        return {each["code"] for each in done.json()["problems"] if each["severity"] == "error"}

    assert await codes("--move-address", ADDRESS) == {"address-not-here"}
    await give(a)
    assert await codes("--move-address", ADDRESS) == set()
    assert await codes("--move-address", f"{ADDRESS}@nowhere0") == {"interface-missing"}
    await give(b)
    assert await codes("--move-address", ADDRESS) == {"address-taken"}


@pytest.mark.parametrize("victim", ["a", "b"])
@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.25])
async def test_a_daemon_that_is_killed_under_way(daemons: Nodes, tmp_path: Path, victim: str, seconds: float) -> None:
    a, b, client = daemons
    process, result = await start_echo(a, client, tmp_path, 3)
    killed = a if victim == "a" else b
    migration = asyncio.create_task(migrate(a, "echo", b, "--move-address", ADDRESS))
    await asyncio.sleep(seconds)
    await killed.kill_phauld()
    await killed.start_phauld()
    await migration
    await progress(result)
    holders = [node for node in (a, b) if await has_address(node)]
    assert len(holders) == 1
    async with at_one_node(daemons, holders[0]):
        pass
    seen = await verdict(process, result)
    assert (seen["wrong"], seen["resets"], seen["idle_alive"]) == (0, 0, 3)


@pytest.mark.skipif(shutil.which("redis-cli") is None, reason="redis is not installed")
async def test_redis_with_a_client_that_does_not_connect_again(daemons: Nodes, tmp_path: Path) -> None:
    a, b, client = daemons
    await give(a)
    words = [
        "redis-server",
        "--bind",
        ADDRESS,
        "--port",
        str(PORT),
        "--save",
        "",
        "--dir",
        "/",
        "--protected-mode",
        "no",
    ]
    await a.phaul("run", "--name", "redis", "--", *words, check=True)
    await listening(a, PORT)
    program = (
        "import socket,sys,time\n"
        f"s = socket.create_connection(('{ADDRESS}', {PORT})); n = 0\n"
        "while True:\n"
        "    s.sendall(b'INCR n\\r\\n'); n += 1; got = s.recv(64)\n"
        "    if got != b':%d\\r\\n' % n: print('wrong', n, got, flush=True); break\n"
        "    if n % 100 == 0: print(n, flush=True)\n"
    )
    counting = await client.start([*PYTHON, "-c", program], log=tmp_path / "count.log")

    def lines() -> list[str]:
        log = tmp_path / "count.log"
        return log.read_text().split("\n")[:-1] if log.exists() else []

    await until(lambda: len(lines()) > 5)
    async with at_one_node(daemons, b):
        status, report = await migrate(a, "redis", b, "--move-address", ADDRESS)
        assert status == 0, report
        count = len(lines())
        await until(lambda: len(lines()) > count + 5)
    assert all(line.isdigit() for line in lines())
    await counting.stop()
