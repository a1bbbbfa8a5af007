"""What shows only where the destination is another node: ends of connections that stay, and ends that come along."""

from __future__ import annotations

import asyncio
import sys
from typing import Final

import pytest

from tests.node.test_daemons import REFUSED, migrate
from tests.nodes import Node, Nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

#: A server of one connection and, unless that comes from elsewhere, its client; says what it got after each signal.
SERVER: Final = """
import os, signal, socket, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
server = socket.create_server(("127.0.0.1", 7001))
client = socket.create_connection(("127.0.0.1", 7001)) if sys.argv[1] == "inside" else None
connection, _ = server.accept()
print("connected", flush=True)
while True:
    signal.sigwait([signal.SIGUSR1])
    client.send(b"hello")
    print(connection.recv(5).decode(), flush=True)
"""
#: The kernel takes its connection before the server accepts it.
CLIENT: Final = """
import socket, time
while True:
    try:
        kept = socket.create_connection(("127.0.0.1", 7001))
    except ConnectionRefusedError:
        time.sleep(0.02)
    else:
        time.sleep(100)
"""


#: Connections between two processes, all of them full both ways; at a signal all must come out that went in.
FULL: Final = """
import os, signal, socket
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
server = socket.create_server(("::1", 7001), family=socket.AF_INET6)
clients = [socket.create_connection(("::1", 7001)) for _ in range(8)]
accepted = [server.accept()[0] for _ in clients]
def fill(ends):
    counts = []
    for end in ends:
        end.setblocking(False)
        counts.append(0)
        try:
            while True: counts[-1] += end.send(bytes(65536))
        except BlockingIOError:
            end.setblocking(True)
    return counts
sent, answered = fill(clients), fill(accepted)
child = os.fork()
for end in accepted if child else clients:
    end.close()
if child:
    print("full", flush=True)
signal.sigwait([signal.SIGUSR1])
if child:
    os.kill(child, signal.SIGUSR1)
for end, count in zip(clients, answered) if child else zip(accepted, sent):
    while count: count -= len(end.recv(count))
if child:
    print("empty" if os.waitpid(child, 0)[1] == 0 else "broken", flush=True)
"""

#: Both ends of a pseudo terminal; at a signal it says what comes through it.
TERMINAL: Final = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
master, slave = os.openpty()
print(os.ttyname(slave), flush=True)
signal.sigwait([signal.SIGUSR1])
os.write(slave, b"hello"); print(os.read(master, 5).decode(), flush=True)
signal.pause()
"""


async def start(node: Node, program: str, *words: str) -> None:
    python = [sys.executable, "-I", "-S", "-c", program]
    await node.phaul("run", "--name", "program", "--", *python, *words, check=True)


async def says(node: Node, lines: list[str]) -> None:
    """Wait until these are what it has said since its start, or its coming."""

    async def said() -> list[str]:
        return (await node.phaul("logs", "program")).stdout.split()

    async with asyncio.timeout(60):
        while (seen := await said()) != lines:
            assert seen == lines[: len(seen)], seen
            await asyncio.sleep(0.05)


async def ask(node: Node) -> None:
    pid = (await node.phaul("ps", "--json")).json()["workloads"][0]["pid"]
    await node.run(["kill", "-USR1", str(pid)])


async def errors(node: Node, to: Node, *options: str) -> set[str]:
    done = await node.phaul("preflight", "program", "--to", to.address, "--json", *options)
    return {each["code"] for each in done.json()["problems"] if each["severity"] == "error"}


@pytest.mark.parametrize("end", ["inside", "outside"])
async def test_the_other_end_of_a_connection_of_the_loopback_interface(daemons: Nodes, end: str) -> None:
    """One in the tree comes along; one that stays would be an end of nothing, and the tree's own be reset."""
    a, b, _ = daemons
    await start(a, SERVER, end)
    if end == "outside":
        await a.start([sys.executable, "-I", "-S", "-c", CLIENT])
    await says(a, ["connected"])

    assert await errors(a, b, "--tcp", "keep") == ({"tcp-peer-stays"} if end == "outside" else set())
    status, report = await migrate(a, "program", b, "--tcp", "keep")

    if end == "outside":
        assert status == REFUSED, report
        status, report = await migrate(a, "program", b, "--tcp", "close")
        assert status == 0, report
    else:
        assert status == 0, report
        await ask(b)
        await says(b, ["connected", "hello"])


async def test_full_connections_within_the_tree(daemons: Nodes) -> None:
    """criu makes their ends one after the other, and what the first sends is answered by a reset for want of the
    second.
    """
    a, b, _ = daemons
    await start(a, FULL)
    await says(a, ["full"])

    status, report = await migrate(a, "program", b)

    assert status == 0, report
    assert "phaul_restore" not in (await b.run(["nft", "list", "tables"])).stdout
    await ask(b)
    await says(b, ["full", "empty"])


async def test_a_terminal_within_the_tree_comes_along_if_its_number_is_free_there(daemons: Nodes) -> None:
    """criu opens terminals until it is given that number."""
    a, b, _ = daemons
    words = [sys.executable, "-I", "-S", "-u", "-c", TERMINAL]
    await start(a, TERMINAL)
    await says(a, ["/dev/pts/0"])
    other = await b.start(words)
    await until(lambda: (b.root / "dev/pts/0").exists())

    assert await errors(a, b) == {"terminal-taken"}
    status, report = await migrate(a, "program", b)
    assert status == REFUSED, report
    await other.stop(9)
    status, report = await migrate(a, "program", b)

    assert status == 0, report
    await ask(b)
    await says(b, ["/dev/pts/0", "hello"])
