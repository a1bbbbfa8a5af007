"""Ends a `criu restore` that would wait for ever for a task that is dead.

After `post-restore` criu ignores SIGCHLD, attaches to the tasks without looking whether it could, and waits in a futex
until each has said that it is ready (criu/cr-restore.c, restore_root_task). One that is killed just then, by hand, for
want of memory or by its guard, says nothing any more: criu would wait, the session with it, and the source in doubt.

The invariant: criu alone is killed here. What became of the tree is then for its shim to say, as whenever criu dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Mapping
from typing import Any, Final

from phaul_client.tree import identity
from phauld.destination import unattended
from phauld.guarding.lazy_guard import parent

logger = logging.getLogger(__name__)

PATIENCE_SECONDS: Final = 1.0  #: with a root that is dead; criu may have noticed
DEADLINE_SECONDS: Final = 30.0  #: from the commit: criu still has to touch each thread a few times, no more
_LOOK_SECONDS: Final = 0.2


def find(root: int, shim_pid: int) -> dict[str, Any]:
    """The identity of the criu whose child the root of a held tree is; empty if it is gone, and the tree its shim's."""
    pid = above = parent(root)
    while above > 1:
        above = parent(above)
        if above == shim_pid:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                return identity(pid)
    return {}


async def end_if_stuck(criu: Mapping[str, Any], root: Mapping[str, Any]) -> None:
    """Returns once this criu, which was told to let the tree go, has ended: by itself, or killed when it is stuck."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    patience = time.monotonic() + PATIENCE_SECONDS
    await asyncio.sleep(_LOOK_SECONDS)  # the freeze ends first
    while criu and unattended.lives(criu):
        now = time.monotonic()
        root_is_dead = not unattended.lives(root)
        if not root_is_dead:
            patience = now + PATIENCE_SECONDS
        if now > min(patience, deadline):
            logger.error("criu is stuck and is killed criu=%s root=%s root_is_dead=%s", criu, root, root_is_dead)
            os.kill(criu["pid"], signal.SIGKILL)
            return
        await asyncio.sleep(_LOOK_SECONDS)
