"""A tree that a test moves, and its move; a destination."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from phaul_client import coordinator
from tests.contract.local_move import (
    Move,
    Tree,
)
from tests.contract.remote_destination import Destination, destination
from tests.fakes.remote import ScriptedRemote
from tests.node.criu_victims import no_leaks, start_victim


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    victim = start_victim(tmp_path, workers=1, own_pid_namespace=False)
    yield Tree(victim)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(victim.popen.pid, signal.SIGKILL)
    victim.popen.wait()


@pytest.fixture
async def move(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Move]:
    monkeypatch.setattr(coordinator, "LAST_PATIENCE_SECONDS", 0.1)
    (tmp_path / "images").mkdir()
    with no_leaks():
        remote = ScriptedRemote()
        yield Move(tree, remote, tmp_path / "images")
        remote.close()


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Destination]:
    async with destination(tmp_path / "node-b") as there:
        yield there
