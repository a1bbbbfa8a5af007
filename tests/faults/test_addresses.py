"""A daemon is killed at a named step while an address moves: one node has it, and its clients see a stall at most."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Final

import pytest

from phaul.v1 import migrations_pb2, node_pb2, types_pb2
from phaul.v1.types_pb2 import Options
from tests.faults.bench import bench
from tests.node.test_move_address import ADDRESS, PORT, VICTIMS, at_one_node, give, has_address, listening, progress
from tests.node.test_postcopy import large_pipes
from tests.nodes import Node, Nodes

__all__ = ["large_pipes"]  # for every test here

pytestmark = [pytest.mark.criu, pytest.mark.timeout(300)]

STOP_COPY: Final = Options(mode=types_pb2.MODE_STOP_COPY, restore_mode=types_pb2.RESTORE_MODE_EAGER)
POST_COPY: Final = Options(mode=types_pb2.MODE_POST_COPY)
#: Of source S and destination D, whose daemon is killed there, or the source's criu, and how it moves.
STEPS: Final = (
    ("S:dump:post-dump:notify", "criu", STOP_COPY),
    ("S>D:Restore:reply", "criu", STOP_COPY),
    ("S:dump:query-ext-files:notify", "D", STOP_COPY),
    ("D:restore:post-restore:notify", "S", STOP_COPY),
    ("S>D:Commit:request", "S", STOP_COPY),
    ("S>D:Commit:request", "D", STOP_COPY),
    ("D:restore:post-restore:answer", "D", STOP_COPY),
    ("S>D:Commit:reply", "S", STOP_COPY),
    ("S>D:Commit:reply", "S", POST_COPY),
)


async def test_a_daemon_killed_at_a_named_step(tmp_path: Path) -> None:
    async with bench(tmp_path / "bench") as made:
        nodes = Nodes(made.nodes["a"], made.nodes["b"], made.client)
        await made.start()
        await give(nodes.a)
        python = [sys.executable, "-I", "-S"]
        argv = [*python, str(VICTIMS / "tcp_echo.py"), ADDRESS, str(PORT)]
        spec = types_pb2.WorkloadSpec(name="echo", argv=argv)
        await made.node_service("a").RunWorkload(node_pb2.RunWorkloadRequest(spec=spec), timeout=20)
        await listening(nodes.a, PORT + 1)
        for node in made.nodes.values():  # else see forgets
            await node.run(["sysctl", "-qw", "net.ipv4.tcp_orphan_retries=1"], check=True)
        result = tmp_path / "client.json"
        words = [*python, str(VICTIMS / "tcp_client.py"), str(result), ADDRESS, str(PORT), "3"]
        client = await nodes.client.start(words)
        await progress(result)
        for number, (step, killed, options) in enumerate(STEPS):
            source = "a" if await has_address(nodes.a) else "b"
            roles = roles_of(source)
            who, colon, what = step.partition(":")
            boundary = "".join(roles.get(letter, letter) for letter in who) + colon + what
            happened = asyncio.Event()

            async def kill(killed: str = killed, source: str = source, happened: asyncio.Event = happened) -> None:
                happened.set()
                if killed == "criu":
                    made.gates.kill_criu(f"{source}:dump")
                else:
                    await made.kill_daemon(roles_of(source)[killed])

            made.gates.clear()
            made.gates.plan(boundary, kill)
            request = migrations_pb2.StartMigrationRequest(
                migration_id=f"step-{number}",
                workload="echo",
                destination=made.links[source].address,
                options=options,
            )
            request.options.move_addresses.append(ADDRESS)
            request.options.tcp_policy = types_pb2.TCP_POLICY_KEEP
            await made.migrations(source).StartMigration(request, wait_for_ready=True, timeout=20)
            async with asyncio.timeout(30):
                await happened.wait()
            await made.settle(f"step-{number}", source=source)
            await progress(result)
            here = "a" if await has_address(nodes.a) else "b"
            await forgets(made.nodes["b" if here == "a" else "a"])
            async with at_one_node(nodes, made.nodes[here]):
                print(f"{boundary}, {killed} killed: {source} -> {here}")
        await client.stop()
        seen = json.loads(result.read_text())
        print(seen)
        assert (seen["wrong"], seen["resets"], seen["idle_alive"]) == (0, 0, 3)


def roles_of(source: str) -> dict[str, str]:
    """Which node is the source S, and which the destination D."""
    return {"S": source, "D": "b" if source == "a" else "a"}


async def forgets(node: Node) -> None:
    """Wait for the kernel's end of connections of a tree that phaul, not criu, had to kill there.

    Until it has given up to tell the other end of them (minutes; a sysctl), the tree cannot come back: criu cannot make
    the same connection a second time, and the move is rolled back.
    """
    async with asyncio.timeout(60):
        while (await node.run(["ss", "-Htan", "src", ADDRESS], check=True)).stdout.strip():  # noqa: ASYNC110
            await asyncio.sleep(0.2)
