"""Containers of each kind move by name, with root, volume and network; who kept one keeps it, and none runs twice."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.containers.containers import ADDRESS, LOG, PORT, VICTIMS, Container, Kind
from tests.containers.moves import moved, runs_only_at, stop_at, told
from tests.containers.podman import PodmanContainer
from tests.node.test_daemons import ROLLED_BACK, migrate
from tests.node.test_hooks import Script
from tests.node.test_move_address import progress, verdict
from tests.nodes import Node, Nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180)]

SELDOM: Final = pytest.mark.seldom
RUNC: Final = Kind(Container, "runc")
PODMAN: Final = Kind(PodmanContainer, "runc")
LOGGED: Final = {"output": str(LOG)}
EITHER: Final = [pytest.param(kind, id=str(kind)) for kind in (RUNC, PODMAN)]


@pytest.mark.parametrize(
    "kind",
    [
        Kind(Container, "runc", LOGGED),
        Kind(Container, "crun", LOGGED),
        PODMAN,
        pytest.param(Kind(PodmanContainer, "crun"), marks=SELDOM),
    ],
    ids=str,
)
async def test_there_and_back(nodes: Nodes, tmp_path: Path, kind: Kind) -> None:
    a, b, client = nodes
    container = await kind.start(a, tmp_path / "volume")
    await container.change(a)
    result = tmp_path / "client.json"
    words = [sys.executable, "-IS", str(VICTIMS / "tcp_client.py"), str(result), ADDRESS, str(PORT), "3"]
    process = await client.start(words)
    await progress(result)
    before = container.count
    report = await moved(a, str(container), b, "--tcp", "keep")
    await progress(result)
    await runs_only_at(nodes, container, b)
    await container.look_inside(b, report["destination_pid"], before)
    report = await moved(b, container.workload, a, "--tcp", "keep")
    await progress(result)
    await runs_only_at(nodes, container, a)
    seen = await verdict(process, result)
    print(f"pause {report['pause_ms']} ms, client {seen}")
    assert (seen["wrong"], seen["resets"], seen["idle_alive"]) == (0, 0, 3)
    await container.end(a)


#: A hook at which a migration stands, whose phauld is killed then, and where the container must run on.
DEATHS: Final = {
    ("prepare-destination", "a"): "a",
    ("prepare-destination", "b"): "a",
    ("commit-source", "a"): "b",  # committed, and nothing has been sent: the recovery sends it
    ("commit-source", "b"): "a",  # the destination has lost its copy, which never ran
    ("commit-destination", "a"): "b",
    ("commit-destination", "b"): "a",
}
#: By kind, those that are tried in every run.
OFTEN: Final = {
    RUNC: {("commit-source", "a"), ("commit-destination", "b")},
    PODMAN: {("commit-source", "a")},
}


@pytest.mark.parametrize(
    ("kind", "where", "killed"),
    [
        pytest.param(kind, *death, marks=() if death in often else SELDOM, id=f"{kind}-{'-'.join(death)}")
        for kind, often in OFTEN.items()
        for death in DEATHS
    ],
)
async def test_a_daemon_that_is_killed(nodes: Nodes, tmp_path: Path, kind: Kind, where: str, killed: str) -> None:
    a, b, _ = nodes
    container = await kind.start(a, tmp_path / "volume")
    migration = await stop_at(a, container, b, Script(tmp_path / "hooks/hook"), where)
    victim, expected = ({"a": a, "b": b}[name] for name in (killed, DEATHS[where, killed]))
    await victim.kill_phauld()
    await victim.start_phauld()
    await runs_only_at(nodes, container, expected)
    await migration


@SELDOM
@pytest.mark.parametrize("kind", EITHER)
async def test_a_cancel_while_its_files_come(nodes: Nodes, tmp_path: Path, kind: Kind) -> None:
    a, b, _ = nodes
    container = await kind.start(a, tmp_path / "volume")
    await a.limit_bandwidth(4 << 20)
    migration = asyncio.create_task(migrate(a, str(container), b))
    await until(lambda: files_come(a, b), 30)
    (listed,) = (await a.phaul("status", "--json")).json()["migrations"]
    await a.phaul("cancel", listed["migration_id"])
    status, report = await migration
    assert status == ROLLED_BACK, told(report)
    await runs_only_at(nodes, container, a)


def files_come(source: Node, destination: Node) -> bool:
    """Whether the first are there, in a bundle of phaul's; those of podman's come into podman's storage."""
    places = destination.root / "run/phaul/state/containers"
    if any(places.glob("podman-*")):
        return "phase=ITERATING" in (source.directory / "phauld.log").read_text()
    return any(places.glob("*/rootfs/*"))


@SELDOM
@pytest.mark.parametrize("kind", EITHER)
@pytest.mark.parametrize("options", [("--restore", "lazy"), ("--mode", "post-copy")], ids=lambda options: options[1])
async def test_memory_that_comes_later(nodes: Nodes, tmp_path: Path, kind: Kind, options: tuple[str, ...]) -> None:
    a, b, _ = nodes
    container = await kind.start(a, tmp_path / "volume")
    await moved(a, str(container), b, *options)
    await runs_only_at(nodes, container, b)
