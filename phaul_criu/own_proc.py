"""One dump at a time in a working directory, where criu needs one for itself.

criu looks at /proc from inside the tree. If the tree's PID namespace is not the one that its /proc shows, as with a
workload of `phaul run`, criu makes a directory "proc.crtools" in the working directory of the tree's root, mounts a
/proc on it and takes it away again (criu/pie/parasite.c, get_proc_fd). Two dumps in one directory, "/" for instance,
fail each other with "Can't create a directory (-17)"; and a criu that was killed just then leaves it behind, so that
every later dump fails.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

logger = logging.getLogger(__name__)

DIRECTORY: Final = "proc.crtools"
_WAIT_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.01


class OwnProc:
    """Holds the working directory of a process for criu, by flock: other phaulds and their deaths are seen to, too."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._descriptor = -1

    async def __aenter__(self) -> Self:
        """Wait for our turn, but not for ever: the lock may be the program's own."""
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # criu will say what is wrong
            if os.readlink(f"/proc/{self._pid}/ns/pid") != os.readlink("/proc/self/ns/pid"):
                self._descriptor = os.open(f"/proc/{self._pid}/cwd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._descriptor >= 0:
            try:
                async with asyncio.timeout(_WAIT_SECONDS):
                    await self._lock()
                with suppress(OSError):  # there is none; or it is more than criu's, and not ours to take away
                    os.rmdir(DIRECTORY, dir_fd=self._descriptor)
            except TimeoutError:
                logger.warning("working directory is locked by another program pid=%d", self._pid)
            except BaseException:
                self.release()
                raise
        return self

    def release(self) -> None:
        """criu has done with it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    async def _lock(self) -> None:
        while True:
            try:
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(_POLL_SECONDS)
