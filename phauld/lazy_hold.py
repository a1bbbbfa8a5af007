"""Copies of the userfaultfds of a tree that is being filled, so that the death of `criu lazy-pages` is no zero page.

The kernel answers a missing page with zeros as soon as nobody has the userfaultfd any more. As long as there is a copy
of it, a task that wants the page waits: it can be killed, but it cannot run on with memory that is not its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, Self

from phaul_client.tree import Tree, is_alive
from phauld.relay import userfaultfds


class Held:
    """The copies; `close` them when every page is in, or when no task is left that could read a zero."""

    def __init__(self, descriptors: list[int]) -> None:
        self._descriptors = descriptors

    @classmethod
    def of(cls, lazy_pages_pid: int) -> Self:
        """Those that a `criu lazy-pages` has. Raises `OSError`, also if it has ended."""
        pidfd = os.pidfd_open(lazy_pages_pid)
        try:
            return cls(userfaultfds(lazy_pages_pid, pidfd))
        finally:
            os.close(pidfd)

    def close(self) -> None:
        """What waits for a page gets zeros."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)


async def kill_tree(root: Mapping[str, Any]) -> None:
    """Kill what was restored, to the last task."""
    if root and is_alive(root):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError), Tree.below(root["pid"]) as tree:
            await tree.kill()
