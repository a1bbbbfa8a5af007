"""The network lock of a tree that is dumped: made by us where that is possible, else by criu.

criu takes two transactions of the kernel for each TCP connection, we take one for all (`connection_lock.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path

from phaul_client.images import open_directory
from phaul_client.tree import descendants, shares_namespace
from phaul_criu.connection_lock import ConnectionLock
from phaul_criu.network_lock import remove_network_lock
from phaul_criu.requests import DumpOptions, NetworkLock

logger = logging.getLogger(__name__)


class TreeLock:
    """Of one migration. `TreeLock()` locks nothing, and leaves it to criu."""

    def __init__(self, lock: ConnectionLock | None = None) -> None:
        self._lock = lock

    @classmethod
    def prepare(cls, migration_id: str, options: DumpOptions) -> TreeLock:
        """For the dump with these options: what can be done before the freeze.

        A tree without connections needs none. One with a network namespace of its own criu locks as a whole.
        """
        if not options.tcp_established or options.network_lock is not None:
            return cls()
        try:
            if not shares_namespace(options.pid, "net"):
                return cls()
            lock = ConnectionLock.open("phaul_lock_" + migration_id.replace("-", "_"))
        except OSError as exc:
            logger.warning("criu locks the connections, which takes longer migration_id=%s error=%s", migration_id, exc)
            return cls()
        with contextlib.suppress(OSError):  # then it is to be done in the freeze, or fails there
            lock.foresee(descendants(options.pid))
        return cls(lock)

    def options(self, options: DumpOptions) -> DumpOptions:
        """So that criu locks nothing, and holds the lock as long as it holds the tree."""
        if self._lock is None:
            return options
        return dataclasses.replace(options, network_lock=NetworkLock.SKIP, kept_fds=(self._lock.fileno(),))

    def lock(self, pid: int) -> None:
        """criu holds every task of the tree and has looked at no socket yet. Raises `OSError`."""
        if self._lock is not None:
            self._lock.lock(descendants(pid))

    def unlock(self) -> None:
        """The tree is about to run on, or is gone. What fails is logged: then it ends with criu, and with phauld."""
        lock, self._lock = self._lock, None
        if lock is not None:
            try:
                lock.release()
            except OSError as exc:
                logger.warning("network lock not removed: %s", exc)

    def leave(self) -> None:
        """It ends with the criu that holds the tree, if there still is one."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()


def unlock_network(directory: Path) -> None:
    """Remove the network lock of the last dump, whose images lie there, if it made one and it still holds."""
    try:
        with open_directory(directory) as descriptor:
            remove_network_lock(descriptor)
    except FileNotFoundError:
        pass  # the dump did not come that far
    except (OSError, ValueError) as exc:  # the tree is where it should be all the same
        logger.warning("network lock not removed directory=%s error=%s", directory, exc)
