"""What a tree lives from while `criu lazy-pages` fills it, and what there is if that dies: see `lazy_guard.py`."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any, Final, Self

from phaul_client.tree import ended, is_alive
from phaul_criu.child import Child, spawn
from phauld.bare import bare_python

WATCH_SECONDS: Final = 5.0
PIDFD_GET_INFO: Final = 0xC040FF0B
PIDFD_INFO_EXIT: Final = 1 << 3
PIDFD_INFO_BYTES: Final = 64
EXIT_STATUS_AT: Final = 60
REAPED_SECONDS: Final = 1.0
POLL_SECONDS: Final = 0.01
_ANSWER_BYTES: Final = 256


class Guard:
    """A `lazy_guard.py`, which outlives phauld once it watches."""

    def __init__(self, child: Child, told: socket.socket) -> None:
        self._child = child
        self._told = told

    @classmethod
    async def start(cls) -> Self:
        """Beforehand: Python takes its time to start. Raises `OSError`."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                argv = [*bare_python("guarding.lazy_guard"), str(theirs.fileno())]
                return cls(await spawn(argv, pass_fds=(theirs.fileno(),)), ours)
        except BaseException:
            ours.close()
            raise

    async def watch(self, *pids: int) -> None:
        """From now on it acts: those of lazy-pages and of the tree. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(WATCH_SECONDS):
            await loop.sock_sendall(self._told, " ".join(map(str, pids)).encode())
            answer = await loop.sock_recv(self._told, _ANSWER_BYTES)
        self._told.close()
        if answer != b"ok":
            raise OSError(answer.decode() or "the guard has ended")

    async def aclose(self) -> None:
        """End it, if it does not watch; if it does, it ends with whom it watches."""
        if self._told.fileno() >= 0:
            self._told.close()
            await self._child.wait()


class Left:
    """A `criu lazy-pages` that an earlier phauld started. Raises `OSError`."""

    def __init__(self, process: Mapping[str, Any]) -> None:
        self._pidfd = os.pidfd_open(process["pid"])
        try:
            if not is_alive(process):  # the PID is somebody else's
                raise ProcessLookupError(process["pid"])
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
        os.close(self._pidfd)
