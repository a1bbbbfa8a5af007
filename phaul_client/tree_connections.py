"""The TCP connections of a tree while criu has it: locked, and guarded in case that this criu is killed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from phaul_client.tree_lock import TreeLock
from phaul_criu.requests import DumpOptions


class Guard(Protocol):
    """Sees to a tree's connections if the criu that holds it is killed."""

    async def watch(self, root_pid: int) -> None:
        """From now on, for the tree that criu holds. Raises `OSError`."""

    async def aclose(self) -> None:
        """It is not needed any more."""


StartGuard = Callable[[], Awaitable[Guard]]


class TreeConnections:
    """Of one migration. `TreeConnections()` does nothing, and leaves their lock to criu."""

    def __init__(self, lock: TreeLock | None = None, guard: Guard | None = None) -> None:
        self._lock = lock or TreeLock()
        self._guard = guard

    @classmethod
    async def prepare(cls, migration_id: str, options: DumpOptions, start_guard: StartGuard | None) -> TreeConnections:
        """For the dump with these options: what can be done before the freeze."""
        lock = TreeLock.prepare(migration_id, options)
        if not options.tcp_established or start_guard is None:
            return cls(lock)
        try:
            return cls(lock, await start_guard())
        except BaseException:
            lock.leave()
            raise

    def options(self, options: DumpOptions) -> DumpOptions:
        """So that criu leaves the lock to us, where that is ours."""
        return self._lock.options(options)

    async def hold(self, pid: int) -> None:
        """criu holds every task of the tree and has looked at no socket yet. Raises `OSError`."""
        self._lock.lock(pid)
        if self._guard is not None:
            await self._guard.watch(pid)

    def unlock(self) -> None:
        """The tree is about to run on, or is gone."""
        self._lock.unlock()

    async def leave(self) -> None:
        """The lock ends with the criu that holds the tree, if there still is one; the guard now."""
        self._lock.leave()
        if self._guard is not None:
            await self._guard.aclose()
