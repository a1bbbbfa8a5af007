"""An address moves with its tree: clients see a stall and nothing else, and never do two nodes answer for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.namespaces import LAN_LINK
from tests.node.test_daemons import migrate
from tests.nodes import Node, Nodes, until
from tests.started import Process

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

ADDRESS: Final = "10.77.2.100"
ADDRESS6: Final = "fd77:2::100"
#: Of each node in the network of ADDRESS6.
OWN6: Final = {"client": "fd77:2::1", "a": "fd77:2::11", "b": "fd77:2::12"}
GIGABIT: Final = 125_000_000
PORT: Final = 9000
PYTHON: Final = [sys.executable, "-I", "-S"]
VICTIMS: Final = Path(__file__).parents[1] / "victims"
RULES: Final = ("nft", "list", "tables")


async def has_address(node: Node, address: str = ADDRESS) -> bool:
    return f"{address}/" in (await node.run(["ip", "-oneline", "address", "show"])).stdout


async def give(node: Node, address: str = ADDRESS) -> None:
    words = [f"{address}/64", "nodad"] if ":" in address else [f"{address}/24"]
    await node.run(["ip", "address", "add", *words, "dev", LAN_LINK])


async def start_echo(
    node: Node, client: Node, directory: Path, idle: int, address: str = ADDRESS
) -> tuple[Process, Path]:
    """The workload `echo`, and a client at work."""
    await give(node, address)
    words = [*PYTHON, str(VICTIMS / "tcp_echo.py"), address, str(PORT)]
    await node.phaul("run", "--name", "echo", "--", *words, check=True)
    result = directory / "client.json"
    await listening(node, PORT + 1)
    arguments = [str(result), address, str(PORT), str(idle)]
    process = await client.start([*PYTHON, str(VICTIMS / "tcp_client.py"), *arguments])
    await progress(result)
    return process, result


async def listening(node: Node, port: int) -> None:
    async with asyncio.timeout(30):
        while f":{port} " not in (await node.run(["ss", "-Hltn"])).stdout:  # noqa: ASYNC110 - polled
            await asyncio.sleep(0.05)


async def progress(result: Path, goal: int = 1 << 20) -> None:
    """Wait until both streams have gone on by a megabyte, and the download by `goal`."""

    def now() -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            seen: dict[str, Any] = json.loads(result.read_text())
            return seen
        return {"up": 0, "down": 0, "resets": 0}

    before = now()
    goals = {"up": 1 << 20, "down": goal}
    await until(
        lambda: now()["resets"] or all(now()[name] > before[name] + goals[name] for name in goals), timeout_seconds=60
    )


async def verdict(process: Process, result: Path) -> dict[str, Any]:
    await process.stop(signal.SIGTERM)
    seen: dict[str, Any] = json.loads(result.read_text())  # noqa: ASYNC240 - small
    return seen


@contextlib.asynccontextmanager
async def at_one_node(nodes: Nodes, expected: Node, address: str = ADDRESS) -> AsyncIterator[None]:
    """Afterwards only this node has it, and nothing mutes it."""
    yield
    for node in (nodes.a, nodes.b):
        assert await has_address(node, address) == (node is expected), node.name
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


@pytest.mark.parametrize(
    ("address", "options"),
    [
        (ADDRESS6, ("--restore", "eager")),
        (ADDRESS, ("--restore", "lazy")),
        (ADDRESS6, ("--mode", "post-copy")),
    ],
    ids=["ipv6", "lazy", "ipv6-post-copy"],
)
async def test_in_both_families_and_every_way_of_restoring(
    daemons: Nodes, tmp_path: Path, address: str, options: tuple[str, ...]
) -> None:
    a, b, client = daemons
    for node in daemons:
        await give(node, OWN6[node.name])
    process, result = await start_echo(a, client, tmp_path, 3, address)
    for source, destination in ((a, b), (b, a)):
        async with at_one_node(daemons, destination, address):
            status, report = await migrate(source, "echo", destination, "--move-address", address, *options)
            assert status == 0, report
            await progress(result)
    seen = await verdict(process, result)
    print(f"pause {report['pause_ms']} ms, client {seen}")
    assert (seen["wrong"], seen["resets"], seen["idle_alive"]) == (0, 0, 3)


async def test_a_half_closed_connection_stays_so(daemons: Nodes, tmp_path: Path) -> None:
    """Its client has said all that it had to say, and the server has read nothing of it before the move."""
    a, b, client = daemons
    await give(a)
    go, log = tmp_path / "go", tmp_path / "half.log"
    server = (
        "import os,socket,time\n"
        f"s = socket.create_server(('{ADDRESS}', {PORT})); c, _ = s.accept()\n"
        f"while not os.path.exists('{go}'): time.sleep(0.01)\n"
        "got = b''\n"
        "while part := c.recv(64): got += part\n"
        "c.sendall(got); c.close(); time.sleep(1000)\n"
    )
    await a.phaul("run", "--name", "half", "--", *PYTHON, "-c", server, check=True)
    await listening(a, PORT)
    asking = (
        "import socket\n"
        f"s = socket.create_connection(('{ADDRESS}', {PORT})); s.sendall(b'all'); s.shutdown(socket.SHUT_WR)\n"
        "print('said', flush=True); print(s.recv(64), s.recv(64), flush=True)\n"
    )
    peer = await client.start([*PYTHON, "-c", asking], log=log)
    await until(lambda: log.exists() and "said" in log.read_text())
    async with at_one_node(daemons, b):
        status, report = await migrate(a, "half", b, "--move-address", ADDRESS)
        assert status == 0, report
        assert "CLOSE-WAIT" in (await b.run(["ss", "-Htan", "src", ADDRESS])).stdout
        go.touch()
        await peer.wait(20)
    assert log.read_text().splitlines() == ["said", "b'all' b''"]


async def test_a_stream_at_one_gigabit(daemons: Nodes, tmp_path: Path, json_report: dict[str, Any]) -> None:
    """Shaped on both nodes. What the machine gets through is in the report; what counts is that no byte is wrong."""
    a, b, client = daemons
    for node in (a, b):
        shape = ["tbf", "rate", "1gbit", "burst", "1mb", "latency", "50ms"]
        await node.run(["tc", "qdisc", "add", "dev", LAN_LINK, "root", *shape])
    process, result = await start_echo(a, client, tmp_path, 0)
    async with at_one_node(daemons, b):
        started, before = time.monotonic(), json.loads(result.read_text())
        status, report = await migrate(a, "echo", b, "--move-address", ADDRESS)
        assert status == 0, report
        await progress(result, 64 << 20)
        seconds, after = time.monotonic() - started, json.loads(result.read_text())
    seen = await verdict(process, result)
    rate = (after["down"] - before["down"]) / seconds
    figures = {"pause_ms": report["pause_ms"], "down_bytes_per_second": round(rate), **seen}
    json_report["tcp_gigabit"] = figures
    print(f"{100 * rate / GIGABIT:.0f} % of 1 Gbit/s through the move: {figures}")
    assert (seen["wrong"], seen["resets"]) == (0, 0)


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
