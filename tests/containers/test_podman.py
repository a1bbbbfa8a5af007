"""A container of podman's moves by name, podman knows it at the other node, and it never runs twice."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from tests.containers import podman
from tests.containers.containers import ADDRESS, BRIDGE, PORT, VICTIMS, cgroups_swept
from tests.containers.containers import prepare as prepare_cgroups
from tests.containers.podman import PodmanContainer
from tests.containers.test_containers import CONNECT, SELDOM, mounts_at, stop_at, told, whole
from tests.node.test_daemons import REFUSED, ROLLED_BACK, migrate
from tests.node.test_hooks import Script
from tests.node.test_move_address import progress, verdict
from tests.nodes import Node, Nodes, two_nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180)]
STANDS_IN: Final = "podman_runtime.py"


@pytest.fixture(scope="session")
def podmans(runtimes: None) -> None:
    """Skip if there is no podman here, and none can be had."""
    if reason := podman.missing():
        pytest.skip(reason)


@pytest.fixture
async def nodes(podmans: None, tmp_path: Path, runtime: str) -> AsyncIterator[Nodes]:
    """Two nodes with a phauld and a podman each, cgroups of their own and a bridge; and a client."""
    names = [f"phaul-test-{tmp_path.name}-{name}" for name in "ab"]
    with cgroups_swept(names, tmp_path):
        async with two_nodes(tmp_path / "nodes") as nodes:
            for node, name in zip(nodes, names, strict=False):
                await prepare_cgroups(node, "v1" if runtime == "crun" else "v2", name)
                await podman.prepare(node, runtime)
                await node.start_phauld(hook_seconds=8.0)
            yield nodes


async def lines(node: Node, *words: str) -> list[str]:
    """What podman says."""
    return (await node.run(["podman", *words])).stdout.splitlines()


async def is_whole(node: Node, container: PodmanContainer, at_least: int) -> None:
    """Its log and the file in its root have every beat once, in order."""
    assert whole(await lines(node, "logs", container.name), at_least)
    assert whole(await lines(node, "exec", container.name, "cat", "/var/app/log"), at_least)


async def left_at(node: Node, container: PodmanContainer) -> list[str]:
    """What there is of a container at a node where it does not run."""
    found = await lines(node, "ps", "--all", "--quiet")
    found += await mounts_at(node)
    found += (
        await node.run(["find", "/sys/fs/cgroup", "-name", "libpod-*", "-not", "-name", "*conmon*"])
    ).stdout.split()
    found += (await node.run(["sh", "-c", f"ls /run/{container.runtime} 2>/dev/null || true"])).stdout.split()
    links = (await node.run(["ip", "-brief", "link", "show", "master", BRIDGE])).stdout.splitlines()
    found += [line for line in links if not line.startswith("lan0")]
    directory = node.root / "run/phaul/state/containers"
    found += [str(each) for each in directory.iterdir()] if directory.exists() else []
    processes = (await node.run(["ps", "-eo", "args"])).stdout.splitlines()
    return found + [line for line in processes if STANDS_IN in line or "conmon" in line or "in_container" in line]


async def runs_only_at(nodes: Nodes, container: PodmanContainer, expected: Node) -> None:
    """It goes on there, whole and with its network, and nothing of it is at the other node."""
    count = await container.beats()
    assert (await container.state(expected))["status"] == "running"
    await is_whole(expected, container, count - 20)
    (other,) = [node for node in (nodes.a, nodes.b) if node is not expected]
    async with asyncio.timeout(20):
        while left := await left_at(other, container):
            await asyncio.sleep(0.1)
            print(left)
    assert await mounts_at(expected) == []
    await nodes.client.run(["python3", "-c", CONNECT])


@pytest.mark.parametrize("runtime", ["runc", pytest.param("crun", marks=SELDOM)])
async def test_there_and_back(nodes: Nodes, tmp_path: Path, runtime: str) -> None:
    a, b, client = nodes
    container = await PodmanContainer.start(a, runtime, tmp_path / "volume")
    await a.run(["podman", "exec", container.name, "sh", "-c", "echo shared >/dev/shm/here; rm /etc/fstab"])
    result = tmp_path / "client.json"
    words = [sys.executable, "-IS", str(VICTIMS / "tcp_client.py"), str(result), ADDRESS, str(PORT), "3"]
    process = await client.start(words)
    await progress(result)
    before = container.count
    identity = (await container.state(a))["id"]
    status, report = await migrate(a, str(container), b, "--tcp", "keep")
    assert status == 0, told(report)
    await progress(result)
    await runs_only_at(nodes, container, b)
    assert (await container.state(b))["id"] == identity
    assert container.count > before
    inside = ("exec", container.name, "sh", "-c", "cat /dev/shm/here; ls /etc/fstab 2>&1; cat /proc/1/cmdline")
    said = (await b.run(["podman", *inside])).stdout
    assert said.startswith("shared\n")
    assert "No such file" in said
    assert "in_container.py" in said
    assert any("in_container.py" in line for line in await lines(b, "top", container.name, "args"))
    status, report = await migrate(b, f"podman-{container.name}", a, "--tcp", "keep")
    assert status == 0, told(report)
    await progress(result)
    await runs_only_at(nodes, container, a)
    seen = await verdict(process, result)
    print(f"pause {report['pause_ms']} ms, client {seen}")
    assert (seen["wrong"], seen["resets"], seen["idle_alive"]) == (0, 0, 3)
    await a.run(["podman", "stop", container.name])  # it ends by itself, and podman hears how
    state = await container.state(a)
    assert (state["status"], state["ExitCode"]) == ("exited", 0)
    await a.run(["podman", "rm", container.name])
    assert await left_at(a, container) == []


@pytest.mark.parametrize(
    ("where", "killed", "runs_at"),
    [
        pytest.param("prepare-destination", "a", "a", marks=SELDOM),
        pytest.param("prepare-destination", "b", "a", marks=SELDOM),
        ("commit-source", "a", "b"),  # committed, and nothing has been sent: the recovery sends it
        pytest.param("commit-source", "b", "a", marks=SELDOM),  # its copy never ran, and podman there forgets it
        pytest.param("commit-destination", "a", "b", marks=SELDOM),
        pytest.param("commit-destination", "b", "a", marks=SELDOM),
    ],
)
async def test_a_daemon_that_is_killed(nodes: Nodes, tmp_path: Path, where: str, killed: str, runs_at: str) -> None:
    a, b, _ = nodes
    container = await PodmanContainer.start(a, "runc", tmp_path / "volume")
    migration = await stop_at(a, container, b, Script(tmp_path / "hooks/hook"), where)
    victim, expected = ({"a": a, "b": b}[name] for name in (killed, runs_at))
    await victim.kill_phauld()
    await victim.start_phauld()
    await runs_only_at(nodes, container, expected)
    await migration


@SELDOM
async def test_a_cancel_while_its_files_come(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    container = await PodmanContainer.start(a, "runc", tmp_path / "volume")
    await a.limit_bandwidth(4 << 20)
    migration = asyncio.create_task(migrate(a, str(container), b))
    await until(lambda: any((b.root / "run/phaul/state/containers").glob("podman-*/create.log")) or sent(a), 30)
    (listed,) = (await a.phaul("status", "--json")).json()["migrations"]
    await a.phaul("cancel", listed["migration_id"])
    status, report = await migration
    assert status == ROLLED_BACK, told(report)
    await runs_only_at(nodes, container, a)


def sent(node: Node) -> bool:
    return "phase=ITERATING" in (node.directory / "phauld.log").read_text()


@SELDOM
async def test_what_cannot_move_is_told_beforehand(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes

    async def problem(name: str) -> str:
        done = await a.phaul("preflight", name, "--to", b.address, "--json")
        errors = [each for each in done.json().get("problems", ()) if each["severity"] == "error"]
        return str(errors[0]["message"] if errors else done.json().get("error", {}).get("message", ""))

    container = await PodmanContainer.start(a, "runc", tmp_path / "volume")
    assert await problem(str(container)) == ""
    identity = (await container.state(a))["id"]
    assert await problem(f"runc:{identity}") == ""
    assert "no workload" in await problem("podman:nobody")
    for flags, why in (
        (["--restart", "always"], "restart policy"),
        (["--rm"], "--rm"),
        (["--volume", "kept:/kept"], "volume that podman keeps"),
        (["--interactive"], "standard input"),
        (["--health-cmd", "true"], "health check"),
    ):
        words = [
            "podman",
            "run",
            "--detach",
            "--name",
            "other",
            "--network",
            "none",
            *flags,
            podman.IMAGE,
            "sleep",
            "99",
        ]
        await a.run(words)
        assert why in await problem("podman:other"), flags
        await a.run(["podman", "rm", "--force", "--time", "0", "other"])
    await b.run(["sed", "-i", "/additionalimagestores/d", "/etc/containers/storage.conf"])
    assert "image" in await problem(str(container))
    status, report = await migrate(a, str(container), b)
    assert status == REFUSED, told(report)
    await runs_only_at(nodes, container, a)


@SELDOM
@pytest.mark.parametrize("options", [("--restore", "lazy"), ("--mode", "post-copy")], ids=lambda options: options[1])
async def test_memory_that_comes_later(nodes: Nodes, tmp_path: Path, options: tuple[str, ...]) -> None:
    a, b, _ = nodes
    container = await PodmanContainer.start(a, "runc", tmp_path / "volume")
    status, report = await migrate(a, str(container), b, *options)
    assert status == 0, told(report)
    await runs_only_at(nodes, container, b)


@SELDOM
async def test_a_podman_that_fails_there_leaves_it_here(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    container = await PodmanContainer.start(a, "runc", tmp_path / "volume")
    await b.run(["sh", "-c", "rm -r /run/addresses 2>/dev/null; touch /run/addresses"])  # no address for it
    status, report = await migrate(a, str(container), b)
    assert status in (REFUSED, ROLLED_BACK), told(report)
    await runs_only_at(nodes, container, a)
