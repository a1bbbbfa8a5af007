"""A restored tree whose shim was killed before it had said whether the tree runs: phauld looks for itself.

The invariant: on return the tree was let go and runs, or nothing is left of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from phaul_client.tree import Tree, descendants, is_alive
from phauld.proc import is_dead
from phauld.trees.let_go import LOOK_SECONDS, was_let_go

LOOKS: Final = 100  #: criu may still be about to let it go: it did not die with its parent


async def runs(root: Mapping[str, Any], criu: Path) -> bool:
    """Whether every task of the tree was let go. If not within five seconds, it is killed to the last task."""
    if not root:
        return False
    for _ in range(LOOKS):
        if not lives(root):
            return False
        if await asyncio.to_thread(_were_let_go, root["pid"], criu):
            return lives(root)
        await asyncio.sleep(LOOK_SECONDS)
    await kill(root)
    return False


async def kill(root: Mapping[str, Any]) -> None:
    """Kill what was restored, to the last task."""
    if root and is_alive(root):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError), Tree.below(root["pid"]) as tree:
            await tree.kill()


def _were_let_go(root_pid: int, criu: Path) -> bool:
    return all([was_let_go(pid, os.fspath(criu)) for pid in descendants(root_pid)])


def lives(root: Mapping[str, Any]) -> bool:
    """Whether its root runs on; one that was killed, or is about to be, does not."""
    return is_alive(root) and not is_dead(root["pid"])
