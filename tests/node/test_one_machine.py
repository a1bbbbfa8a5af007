"""Two daemons on one machine, as someone does who tries phaul out: both see the same files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import pytest

from tests.daemon import BINARY, LOG_DIR
from tests.nodes import Node, Nodes, until
from tests.started import Completed

pytestmark = pytest.mark.criu

SOCKET: Final = "/run/phaul/second.sock"
DESTINATION: Final = "127.0.0.1:7717"
#: Writes a line every 10 ms.
COUNTER: Final = "import itertools, time\nfor n in itertools.count(): print(n, flush=True); time.sleep(0.01)"


async def two_daemons(node: Node) -> None:
    """A second phauld beside the node's own."""
    await node.start_phauld()
    words = ["--listen", DESTINATION, "--data-port", "7718", "--unix", SOCKET, "--state-dir", "/run/phaul/second"]
    await node.start(
        [BINARY, *words, "--images-dir", "/run/phaul/second/images", "--log-dir", LOG_DIR, "--node-name", "second"],
        log=node.directory / "second.log",
    )
    await until(lambda: (node.root / SOCKET[1:]).is_socket())


async def run_counter(node: Node) -> Path:
    """Start the counter; its log, as seen from here."""
    await node.phaul("run", "--name", "counter", "--", sys.executable, "-c", COUNTER, check=True)
    log = node.root / LOG_DIR.relative_to("/") / "counter.log"
    await until(lambda: log.exists() and len(log.read_text().splitlines()) > 20)
    return log


async def second(node: Node, *arguments: str) -> Completed:
    """Ask the second daemon."""
    return await node.phaul("--daemon", SOCKET, *arguments)


def numbers(log: Path) -> list[int]:
    """What was counted; the last line may be half written."""
    return [int(line) for line in log.read_text().splitlines()[:-1]]


async def test_a_process_moves_to_and_fro_between_two_daemons(nodes: Nodes) -> None:
    await two_daemons(nodes.a)
    log = await run_counter(nodes.a)

    assert (await nodes.a.phaul("migrate", "counter", "--to", DESTINATION)).returncode == 0
    assert (await second(nodes.a, "migrate", "counter", "--to", nodes.a.address)).returncode == 0

    seen = len(numbers(log))
    await until(lambda: len(numbers(log)) > seen + 10)
    assert numbers(log) == list(range(len(numbers(log))))


async def test_a_roll_back_keeps_the_log_that_was_there(nodes: Nodes) -> None:
    await two_daemons(nodes.a)
    log = await run_counter(nodes.a)

    moved = await nodes.a.phaul("migrate", "counter", "--to", DESTINATION, "--freeze-budget", "1ms")
    assert moved.returncode == 4, moved.stderr

    seen = numbers(log)
    await until(lambda: len(numbers(log)) > len(seen))
    assert seen[0] == 0


async def test_a_preflight_tells_the_tree(nodes: Nodes) -> None:
    for node in (nodes.a, nodes.b):
        await node.start_phauld()
    await run_counter(nodes.a)
    done = await nodes.a.phaul("preflight", "counter", "--to", nodes.b.address, "--json", check=True)
    tree = done.json()["tree"]
    assert tree["root_pid"] == tree["processes"][0]["pid"]
    assert tree["memory_bytes"] > 0
    told = await nodes.a.phaul("preflight", "counter", "--to", nodes.b.address, check=True)
    assert "tree" in told.stdout


async def test_a_move_to_the_node_itself_is_refused_beforehand(nodes: Nodes) -> None:
    await nodes.a.start_phauld()
    await run_counter(nodes.a)
    for command in ("preflight", "migrate"):
        refused = await nodes.a.phaul(command, "counter", "--to", nodes.a.address)
        assert refused.returncode == 3
        assert "is the node that the tree runs on" in refused.stdout + refused.stderr
