"""Two nodes for a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.node.criu_victims import Victim, no_leaks, start_victim, subreaper
from tests.nodes import Nodes, two_nodes


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    """Two nodes and a client, without daemons."""
    async with two_nodes(tmp_path / "nodes") as nodes:
        yield nodes


@pytest.fixture
async def daemons(nodes: Nodes) -> Nodes:
    """Two nodes with a phauld each, and a client."""
    await nodes.a.start_phauld()
    await nodes.b.start_phauld()
    return nodes


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    """A tree of two, a child of ours; nothing of it is left afterwards."""
    with subreaper(), no_leaks():
        started = start_victim(tmp_path, workers=1)
        yield started
        started.kill()
