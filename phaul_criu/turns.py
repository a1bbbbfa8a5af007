"""Turns for the one thing that two dumps cannot do at once.

A root that has a PID namespace of its own, but not a /proc of it, makes a directory of a fixed name in its working
directory at the start of its dump, and mounts a proc file system on it (criu/pie/parasite.c, get_proc_fd). A second
dump from the same directory would fail: "Can't create a directory (-17)".

A turn is a lock (flock) on the working directory: it holds between daemons, too, and ends with whoever has it.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

logger = logging.getLogger(__name__)

#: Somebody else may have another use for a lock on the directory.
PATIENCE_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.005
_MOUNT_POINT: Final = "proc.crtools"


@asynccontextmanager
async def turn_to_dump(pid: int) -> AsyncIterator[Callable[[], None]]:
    """Wait until no other dump begins in the working directory of `pid`; gives a function that ends the turn.

    What a killed criu has left there is removed.
    """
    if not _needs_turn(pid):
        yield lambda: None
        return
    directory = os.open(f"/proc/{pid}/cwd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    ended = False

    def end() -> None:
        nonlocal ended
        if not ended:
            ended = True
            os.close(directory)

    try:
        if await _locked(directory):
            with suppress(OSError):
                os.rmdir(_MOUNT_POINT, dir_fd=directory)
        yield end
    finally:
        end()


def _needs_turn(pid: int) -> bool:
    try:
        own_namespace = os.stat(f"/proc/{pid}/ns/pid").st_ino != os.stat("/proc/self/ns/pid").st_ino
        return own_namespace and os.path.isdir(f"/proc/{pid}/cwd")
    except OSError:  # it has ended; criu will say so
        return False


async def _locked(directory: int) -> bool:
    deadline_seconds = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline_seconds:
                logger.warning("somebody keeps a lock on the working directory; dumping all the same")
                return False
            await asyncio.sleep(_POLL_SECONDS)
        except OSError:  # a file system without locks
            return False
