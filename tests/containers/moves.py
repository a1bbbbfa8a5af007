"""Moves of containers, as tests tell them, and what must be true afterwards."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

from tests.containers.containers import ADDRESS, PORT, Container, mounts_at, whole
from tests.node.test_daemons import migrate
from tests.node.test_hooks import Script
from tests.nodes import Node, Nodes, until

#: Whether the container answers.
_CONNECT: Final = f"""import socket
s = socket.create_connection(({ADDRESS!r}, {PORT}), 10)
s.sendall(b'x')
assert s.recv(1) == b'x'"""


def told(report: dict[str, Any]) -> str:
    """Why it did not move."""
    return json.dumps([report.get("error"), report.get("problems"), report.get("stderr")], indent=1)


async def moved(source: Node, what: str, to: Node, *options: str) -> dict[str, Any]:
    """It moves; the report."""
    status, report = await migrate(source, what, to, *options)
    assert status == 0, told(report)
    return report


async def runs_only_at(nodes: Nodes, container: Container, expected: Node) -> None:
    """It goes on there, whole and with its network, and nothing of it is at the other node."""
    count = await container.beats()
    assert (await container.state(expected))["status"] == "running"
    for lines in await container.logs(expected):
        assert whole(lines, count - 20)
    (other,) = [node for node in (nodes.a, nodes.b) if node is not expected]
    await container.is_gone_from(other)
    assert await mounts_at(expected) == []
    await nodes.client.run(["python3", "-c", _CONNECT])


async def stop_at(node: Node, container: Container, to: Node, hook: Script, where: str) -> asyncio.Task[Any]:
    """A migration that has come to a hook, and stays there until the hook is killed."""
    hook.order(where, "hang")
    migration = asyncio.create_task(migrate(node, str(container), to, "--hook", str(hook.path)))
    await until(lambda: where in hook.phases, 60)
    hook.order(where, "")
    return migration


async def problem(node: Node, name: str | Container, to: Node) -> str:
    """What the preflight says stands in its way; empty for nothing."""
    done = await node.phaul("preflight", str(name), "--to", to.address, "--json")
    errors = [each for each in done.json().get("problems", ()) if each["severity"] == "error"]
    return str(errors[0]["message"] if errors else done.json().get("error", {}).get("message", ""))
