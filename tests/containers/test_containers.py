"""Containers move by name, with their root, their volume and their network, and never run twice."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.containers.containers import ADDRESS, BRIDGE, PORT, VICTIMS, Container, log_of
from tests.daemon import LOG_DIR
from tests.node.test_daemons import REFUSED, ROLLED_BACK, migrate
from tests.node.test_hooks import Script
from tests.node.test_move_address import progress, verdict
from tests.nodes import Node, Nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180)]


LOG: Final = LOG_DIR / "web.log"
SELDOM: Final = pytest.mark.seldom
#: Whether the container answers.
CONNECT: Final = f"""import socket
s = socket.create_connection(({ADDRESS!r}, {PORT}), 10)
s.sendall(b'x')
assert s.recv(1) == b'x'"""


def told(report: dict[str, Any]) -> str:
    """Why it did not move."""
    return json.dumps([report.get("error"), report.get("problems"), report.get("stderr")], indent=1)


def whole(lines: list[str], at_least: int) -> bool:
    """Whether every beat is there once, in order."""
    return len(lines) >= at_least and lines == [str(number) for number in range(len(lines))]


@pytest.mark.parametrize("runtime", ["runc", "crun"])
async def test_there_and_back(nodes: Nodes, tmp_path: Path, runtime: str) -> None:
    a, b, client = nodes
    container = await Container.start(a, runtime, tmp_path / "volume", output=str(LOG))
    result = tmp_path / "client.json"
    words = [sys.executable, "-IS", str(VICTIMS / "tcp_client.py"), str(result), ADDRESS, str(PORT), "3"]
    process = await client.start(words)
    await progress(result)
    before = container.count
    status, report = await migrate(a, str(container), b, "--tcp", "keep")
    assert status == 0, told(report)
    await progress(result)
    assert await container.beats() > before
    logged = (b.root / LOG.relative_to("/")).read_text().splitlines()
    assert whole(logged, before - 20)
    assert (await b.phaul("logs", f"{runtime}-{container.name}", "-n", "1", check=True)).stdout.strip().isdigit()
    assert await container.state(a) == {}
    state = await container.state(b)
    assert (state["status"], state["pid"]) == ("running", report["destination_pid"])
    assert whole(log_of(b, state), before)
    assert await mounts_at(b) == []
    if runtime == "runc":  # cgroups of version 2: a namespace of its own
        assert (await b.run(["runc", "exec", container.name, "cat", "/proc/1/cgroup"])).stdout.splitlines()[
            -1
        ] == "0::/"
    done = await b.run([runtime, *container.flags, "exec", container.name, "cat", "/proc/1/cmdline"])
    assert "in_container.py" in done.stdout
    as_a_workload = f"{runtime}-{container.name}"  # so it is called in `phaul ps`, and by `phaul drain`
    status, report = await migrate(b, as_a_workload, a, "--tcp", "keep")
    assert status == 0, told(report)
    await progress(result)
    state = await container.state(a)
    assert whole(log_of(a, state), await container.beats() - 20)
    assert await container.state(b) == {}
    seen = await verdict(process, result)
    print(f"pause {report['pause_ms']} ms, client {seen}")
    assert (seen["wrong"], seen["resets"], seen["idle_alive"]) == (0, 0, 3)
    await a.run([runtime, *container.flags, "kill", container.name, "KILL"])
    await a.run([runtime, *container.flags, "delete", "--force", container.name])


async def mounts_at(node: Node) -> list[str]:
    """Those that a restore needs, and nobody else."""
    mounts = (await node.run(["cat", "/proc/self/mountinfo"])).stdout
    return [line for line in mounts.splitlines() if "/phaul/state/" in line]


async def left_at(node: Node, container: Container) -> list[str]:
    """What there is of a container at a node where it does not run."""
    found = [] if await container.state(node) == {} else ["a record"]
    found += await mounts_at(node)
    bundles = node.root / "run/phaul/state/containers"
    found += [str(each) for each in bundles.iterdir()] if bundles.exists() else []
    found += (await node.run(["find", "/sys/fs/cgroup", "-name", container.name])).stdout.split()
    links = (await node.run(["ip", "-brief", "link", "show", "master", BRIDGE])).stdout.splitlines()
    return found + [line for line in links if not line.startswith("lan0")]


async def runs_only_at(nodes: Nodes, container: Container, expected: Node) -> None:
    """It goes on there, whole and with its network, and nothing of it is at the other node."""
    count = await container.beats()
    state = await container.state(expected)
    assert state["status"] == "running"
    assert whole(log_of(expected, state), count - 20)
    assert await mounts_at(expected) == []
    (other,) = [node for node in (nodes.a, nodes.b) if node is not expected]
    async with asyncio.timeout(20):
        while left := await left_at(other, container):
            await asyncio.sleep(0.1)
            print(left)
    await nodes.client.run(["python3", "-c", CONNECT])


async def stop_at(node: Node, container: Container, to: Node, hook: Script, where: str) -> asyncio.Task[Any]:
    """A migration that has come to a hook, and stays there until the hook is killed."""
    hook.order(where, "hang")
    migration = asyncio.create_task(migrate(node, str(container), to, "--hook", str(hook.path)))
    await until(lambda: where in hook.phases, 60)
    hook.order(where, "")
    return migration


@pytest.mark.parametrize(
    ("where", "killed", "runs_at"),
    [
        pytest.param("prepare-destination", "a", "a", marks=SELDOM),
        pytest.param("prepare-destination", "b", "a", marks=SELDOM),
        ("commit-source", "a", "b"),  # committed, and nothing has been sent: the recovery sends it
        pytest.param("commit-source", "b", "a", marks=SELDOM),  # the destination has lost its copy, which never ran
        pytest.param("commit-destination", "a", "b", marks=SELDOM),
        ("commit-destination", "b", "a"),
    ],
)
async def test_a_daemon_that_is_killed(nodes: Nodes, tmp_path: Path, where: str, killed: str, runs_at: str) -> None:
    a, b, _ = nodes
    container = await Container.start(a, "runc", tmp_path / "volume")
    migration = await stop_at(a, container, b, Script(tmp_path / "hooks/hook"), where)
    victim, expected = ({"a": a, "b": b}[name] for name in (killed, runs_at))
    await victim.kill_phauld()
    await victim.start_phauld()
    await runs_only_at(nodes, container, expected)
    await migration


@SELDOM
async def test_a_cancel_while_its_files_come(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    container = await Container.start(a, "runc", tmp_path / "volume")
    await a.limit_bandwidth(4 << 20)
    migration = asyncio.create_task(migrate(a, str(container), b))
    await until(lambda: any((b.root / "run/phaul/state/containers").glob("*/rootfs/*")), 30)
    (listed,) = (await a.phaul("status", "--json")).json()["migrations"]
    await a.phaul("cancel", listed["migration_id"])
    status, report = await migration
    assert status == ROLLED_BACK, told(report)
    await runs_only_at(nodes, container, a)


@SELDOM
async def test_what_cannot_move_is_told_beforehand(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    container = await Container.start(a, "runc", tmp_path / "volume")

    async def problem(name: str) -> str:
        done = await a.phaul("preflight", name, "--to", b.address, "--json")
        errors = [each for each in done.json().get("problems", ()) if each["severity"] == "error"]
        return str(errors[0]["message"] if errors else done.json().get("error", {}).get("message", ""))

    assert await problem(str(container)) == ""
    assert "podman" in await problem("podman:nobody")
    assert "no workload" in await problem("runc:nobody")
    assert "no runtime" in await problem("docker:web")
    piped = await Container.start(
        a, "runc", tmp_path / "piped", "piped", network=False, output=" >(cat >/dev/null 2>&1)"
    )
    assert "its other end is held by" in await problem(str(piped))
    await b.run(["ip", "link", "delete", BRIDGE])
    assert f"bridge {BRIDGE}" in await problem(str(container))
    await b.run(["ip", "link", "add", BRIDGE, "type", "bridge"])
    shutil.rmtree(b.root / "run/bundle", ignore_errors=True)
    other = await Container.start(b, "runc", tmp_path / "other", network=False)
    assert "exists" in await problem(str(container)) or "runs on this node" in await problem(str(container))
    status, report = await migrate(a, str(container), b)
    assert status == REFUSED, told(report)
    await other.beats()
    await container.beats()


@SELDOM
async def test_a_runtime_that_fails_there_leaves_it_here(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    container = await Container.start(a, "runc", tmp_path / "volume")
    await b.run(["sh", "-c", "mkdir -p /run/runc && mount -t tmpfs -o ro none /run/runc"])
    status, report = await migrate(a, str(container), b)
    assert status == ROLLED_BACK, told(report)
    assert "read-only file system" in report["error"]["message"]
    await runs_only_at(nodes, container, a)


@SELDOM
@pytest.mark.parametrize("options", [("--restore", "lazy"), ("--mode", "post-copy")], ids=lambda options: options[1])
async def test_memory_that_comes_later(nodes: Nodes, tmp_path: Path, options: tuple[str, ...]) -> None:
    a, b, _ = nodes
    container = await Container.start(a, "runc", tmp_path / "volume")
    status, report = await migrate(a, str(container), b, *options)
    assert status == 0, told(report)
    await runs_only_at(nodes, container, b)
