"""Nodes that run containers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.containers.containers import Kind, cgroups_swept
from tests.nodes import Nodes, two_nodes


@pytest.fixture
async def nodes(tmp_path: Path, kind: Kind) -> AsyncIterator[Nodes]:
    """Two nodes with a phauld, cgroups, a bridge and what that kind of container needs; and a client."""
    if reason := kind.container.missing():
        pytest.skip(reason)
    names = [f"phaul-test-{tmp_path.name}-{name}" for name in "ab"]
    with cgroups_swept(names, tmp_path):
        async with two_nodes(tmp_path / "nodes") as nodes:
            for node, name in zip(nodes, names, strict=False):
                await kind.container.prepare(node, kind.runtime, name)
                await node.start_phauld(hook_seconds=8.0)
            yield nodes
