"""A criu page server that receives the pages of one dump from one connected socket."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Self

from phaul_criu.diagnosis import add_log, failure, forget_log
from phaul_criu.errors import CriuError, PageServerFailed
from phaul_criu.requests import PageServerOptions, page_server_request, wait_pid_request
from phaul_criu.swrk import Swrk
from phaul_criu.urgency import hurry


class PageServer:
    """A running page server. It is single-use: one connection, one `wait`. Closing it earlier kills it."""

    def __init__(self, swrk: Swrk, options: PageServerOptions) -> None:
        self._swrk = swrk
        self._options = options
        self._pid = 0
        self._pidfd: int | None = None

    @classmethod
    async def start(
        cls, swrk: Swrk, options: PageServerOptions, socket_fd: int, *, timeout_seconds: float | None
    ) -> Self:
        """Start serving `socket_fd`, which criu was started with. The caller closes its own copy of the socket.

        Raises PageServerFailed, CriuDied, CriuTimeout; then criu is gone.
        """
        server = cls(swrk, options)
        try:
            forget_log(options)
            request = page_server_request(options, socket_fd)
            response = await swrk.request(request, timeout_seconds=timeout_seconds)
            if not response.success:
                raise failure(PageServerFailed, "page-server", response, options)
            server._pid = response.ps.pid
            with suppress(ProcessLookupError):
                server._pidfd = os.pidfd_open(server._pid)
        except CriuError as exc:
            await server.aclose()
            add_log(exc, options)
            raise
        except BaseException:
            await server.aclose()
            raise
        return server

    async def wait(self, *, timeout_seconds: float | None = None) -> None:
        """Wait until the other end has sent everything. Raises PageServerFailed, CriuDied, CriuTimeout."""
        try:
            response = await self._swrk.request(wait_pid_request(self._pid), timeout_seconds=timeout_seconds)
            if not response.success or response.status != 0:
                raise failure(PageServerFailed, "page-server", response, self._options)
        except CriuError as exc:
            add_log(exc, self._options)
            raise
        finally:
            await self.aclose()

    def hurry(self) -> None:
        """Let it go first until its end: a tree stands still."""
        for pid in (self._pid, self._swrk.pid):
            hurry(pid or 0)

    def kill(self) -> None:
        """Kill the page server if it still runs; a `wait` for it fails then."""
        if self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def aclose(self) -> None:
        """Kill the page server if it still runs, and its criu. On return both are gone."""
        self.kill()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        await self._swrk.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()
