"""Copies of the userfaultfds of a tree that is being filled, so that the death of `criu lazy-pages` is no zero page.

The kernel answers a missing page with zeros as soon as nobody has the userfaultfd any more. As long as there is a copy
of it, a task that wants the page waits: it can be killed, but it cannot run on with memory that is not its own.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Mapping
from typing import Any, Final, Self

from phaul_client.tree import ended, is_alive
from phauld.relay import userfaultfds

PIDFD_GET_INFO: Final = 0xC040FF0B
PIDFD_INFO_EXIT: Final = 1 << 3
PIDFD_INFO_BYTES: Final = 64
EXIT_STATUS_AT: Final = 60
REAPED_SECONDS: Final = 1.0
POLL_SECONDS: Final = 0.01


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


class Left:
    """A `criu lazy-pages` that an earlier phauld started, and copies of its userfaultfds. Raises `OSError`."""

    def __init__(self, process: Mapping[str, Any]) -> None:
        self._pidfd = os.pidfd_open(process["pid"])
        try:
            if not is_alive(process):  # the PID is somebody else's
                raise ProcessLookupError(process["pid"])
            self._held = Held(userfaultfds(process["pid"], self._pidfd))
        except BaseException:
            os.close(self._pidfd)
            raise

    async def wait(self) -> int | None:
        """Wait for its end: its exit status, or minus a signal; `None` if the kernel is too old to tell (6.15)."""
        await ended(self._pidfd)
        try:
            async with asyncio.timeout(REAPED_SECONDS):
                while (status := self._status()) is None:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_SECONDS)  # init has to reap it first
        except (TimeoutError, OSError):
            return None
        return os.waitstatus_to_exitcode(status)

    def _status(self) -> int | None:
        """Raises `OSError` if the kernel does not know the question."""
        info = bytearray(PIDFD_INFO_BYTES)
        struct.pack_into("=Q", info, 0, PIDFD_INFO_EXIT)
        fcntl.ioctl(self._pidfd, PIDFD_GET_INFO, info)
        (mask,) = struct.unpack_from("=Q", info)
        (status,) = struct.unpack_from("=i", info, EXIT_STATUS_AT)
        return status if mask & PIDFD_INFO_EXIT else None

    def close(self) -> None:
        """What waits for a page gets zeros."""
        self._held.close()
        os.close(self._pidfd)
