"""Nodes that run containers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.containers.containers import cgroups_swept, missing, prepare
from tests.nodes import Nodes, two_nodes


@pytest.fixture(scope="session")
def runtimes() -> None:
    """Skip if there is no runtime here, and none can be had."""
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture
async def nodes(runtimes: None, tmp_path: Path, runtime: str) -> AsyncIterator[Nodes]:
    """Two nodes with a phauld each, cgroups of their own and a bridge; and a client."""
    names = [f"phaul-test-{tmp_path.name}-{name}" for name in "ab"]
    with cgroups_swept(names, tmp_path):
        async with two_nodes(tmp_path / "nodes") as nodes:
            for node, name in zip(nodes, names, strict=False):
                await prepare(node, "v1" if runtime == "crun" else "v2", name)
                await node.start_phauld(hook_seconds=8.0)
            yield nodes


@pytest.fixture
def runtime() -> str:
    """Which one; a test may say otherwise by a parameter."""
    return "runc"
