"""Containers that cannot move: what is told beforehand, and that one runs on here when its runtime fails there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.containers.containers import BRIDGE, Kind
from tests.containers.moves import problem, runs_only_at, told
from tests.containers.podman import IMAGE, lines
from tests.containers.test_containers import PODMAN, RUNC, SELDOM
from tests.node.test_daemons import REFUSED, ROLLED_BACK, migrate
from tests.nodes import Nodes

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180), SELDOM]


@pytest.mark.parametrize("kind", [RUNC], ids=str)
async def test_what_cannot_move_is_told_beforehand(nodes: Nodes, tmp_path: Path, kind: Kind) -> None:
    a, b, _ = nodes
    container = await kind.start(a, tmp_path / "volume")
    assert await problem(a, container, b) == ""
    assert "podman" in await problem(a, "podman:nobody", b)
    assert "no workload" in await problem(a, "runc:nobody", b)
    assert "no runtime" in await problem(a, "docker:web", b)
    piped = await kind.start(a, tmp_path / "piped", "piped", network=False, output=" >(cat >/dev/null 2>&1)")
    assert "its other end is held by" in await problem(a, piped, b)
    await b.run(["ip", "link", "delete", BRIDGE])
    assert f"bridge {BRIDGE}" in await problem(a, container, b)
    await b.run(["ip", "link", "add", BRIDGE, "type", "bridge"])
    shutil.rmtree(b.root / "run/bundle", ignore_errors=True)
    other = await kind.start(b, tmp_path / "other", network=False)
    said = await problem(a, container, b)
    assert "exists" in said or "runs on this node" in said
    status, report = await migrate(a, str(container), b)
    assert status == REFUSED, told(report)
    await other.beats()
    await container.beats()


@pytest.mark.parametrize("kind", [RUNC], ids=str)
async def test_a_runtime_that_fails_there_leaves_it_here(nodes: Nodes, tmp_path: Path, kind: Kind) -> None:
    a, b, _ = nodes
    container = await kind.start(a, tmp_path / "volume")
    await b.run(["sh", "-c", "mkdir -p /run/runc && mount -t tmpfs -o ro none /run/runc"])
    status, report = await migrate(a, str(container), b)
    assert status == ROLLED_BACK, told(report)
    assert "read-only file system" in report["error"]["message"]
    await runs_only_at(nodes, container, a)


@pytest.mark.parametrize("kind", [PODMAN], ids=str)
async def test_what_podman_cannot_give_away_is_told_beforehand(nodes: Nodes, tmp_path: Path, kind: Kind) -> None:
    a, b, _ = nodes
    container = await kind.start(a, tmp_path / "volume")
    assert await problem(a, container, b) == ""
    identity = (await container.state(a))["id"]
    assert await problem(a, f"runc:{identity}", b) == ""
    assert "no workload" in await problem(a, "podman:nobody", b)
    for flags, why in (
        (["--restart", "always"], "restart policy"),
        (["--rm"], "--rm"),
        (["--volume", "kept:/kept"], "volume that podman keeps"),
        (["--interactive"], "standard input"),
        (["--health-cmd", "true"], "health check"),
    ):
        await lines(a, "run", "--detach", "--name", "other", "--network", "none", *flags, IMAGE, "sleep", "99")
        assert why in await problem(a, "podman:other", b), flags
        await lines(a, "rm", "--force", "--time", "0", "other")
    await b.run(["sed", "-i", "/additionalimagestores/d", "/etc/containers/storage.conf"])
    assert "image" in await problem(a, container, b)
    status, report = await migrate(a, str(container), b)
    assert status == REFUSED, told(report)
    await runs_only_at(nodes, container, a)


@pytest.mark.parametrize("kind", [PODMAN], ids=str)
async def test_a_podman_that_fails_there_leaves_it_here(nodes: Nodes, tmp_path: Path, kind: Kind) -> None:
    a, b, _ = nodes
    container = await kind.start(a, tmp_path / "volume")
    await b.run(["sh", "-c", "rm -r /run/addresses 2>/dev/null; touch /run/addresses"])  # no address for it
    status, report = await migrate(a, str(container), b)
    assert status in (REFUSED, ROLLED_BACK), told(report)
    await runs_only_at(nodes, container, a)
