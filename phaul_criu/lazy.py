"""The `criu lazy-pages` child: fills the memory of a tree that already runs, from local images or from its source.

It listens on `lazy-pages.socket` in the work directory; a restore with `lazy_pages` and the same work directory finds
it there.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from phaul_criu import child as children
from phaul_criu.diagnosis import add_log, forget_log
from phaul_criu.errors import CriuMissing, CriuTimeout, LazyPagesFailed
from phaul_criu.requests import DirectoryOptions
from phaul_criu.urgency import hurry

_OP = "lazy-pages"
_SOCKET = "lazy-pages.socket"


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyPagesOptions(DirectoryOptions):
    """Options of a lazy-pages child."""

    log_file: str = "lazy-pages.log"
    #: A socket connected to the dump that left its pages in the source; None: the pages are in the images. Close your
    #: own copy once the child has started: the serving criu waits for every copy to be closed.
    page_server_fd: int | None = None


class LazyPages:
    """A running lazy-pages child, ready for the restore. Closing it early kills it, and the tree that needs it."""

    def __init__(self, child: children.Child, options: LazyPagesOptions) -> None:
        self._child = child
        self._options = options

    @classmethod
    async def start(
        cls,
        binary: str | Path,
        options: LazyPagesOptions,
        *,
        timeout_seconds: float | None = 30,
        spawn: children.Spawn = children.spawn,
    ) -> Self:
        """Start the child and wait until it listens. Raises LazyPagesFailed, CriuTimeout, CriuMissing."""
        forget_log(options)
        with suppress(FileNotFoundError):  # of an earlier one: criu would fail to bind
            os.unlink(_SOCKET, dir_fd=options.log_dir_fd)
        ready, theirs = socket.socketpair()
        ready.setblocking(False)
        with ready:
            with theirs:
                argv = _argv(binary, options, theirs.fileno())
                page_fds = () if options.page_server_fd is None else (options.page_server_fd,)
                try:
                    child = await spawn(argv, pass_fds=(theirs.fileno(), *page_fds))
                except OSError as exc:
                    message = f"cannot start {binary}: {exc.strerror}"
                    raise CriuMissing(_OP, message, errno=exc.errno) from exc
            hurry(child.pid)  # until the caller knows that the tree runs
            lazy_pages = cls(child, options)
            try:
                await lazy_pages._wait_ready(ready, timeout_seconds)
            except BaseException:
                await lazy_pages.aclose()
                raise
            return lazy_pages

    @property
    def pid(self) -> int:
        """The PID of the child."""
        return self._child.pid

    async def wait(self, *, timeout_seconds: float | None = None) -> None:
        """Wait until every page has arrived and the child has ended. Raises LazyPagesFailed, CriuTimeout."""
        try:
            async with asyncio.timeout(timeout_seconds):
                returncode = await self._child.wait()
        except TimeoutError as exc:
            raise CriuTimeout(_OP, f"not done after {timeout_seconds:g} s") from exc
        if returncode != 0:
            raise self._failure()

    @property
    def has_ended(self) -> bool:
        """Whether the child has been reaped: its PID may be another process's by now."""
        return self._child.returncode is not None

    async def aclose(self) -> None:
        """Kill the child if it still runs. On return it has been reaped."""
        await self._child.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    async def _wait_ready(self, ready: socket.socket, timeout_seconds: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_seconds):
                if await asyncio.get_running_loop().sock_recv(ready, 1):
                    return
                await self._child.wait()
        except TimeoutError as exc:
            raise CriuTimeout(_OP, f"not ready after {timeout_seconds:g} s") from exc
        raise self._failure()

    def _failure(self) -> LazyPagesFailed:
        error = LazyPagesFailed(_OP, f"ended with {self._child.returncode}", log_tail=self._child.stderr_tail)
        add_log(error, self._options)
        return error


def _argv(binary: str | Path, options: LazyPagesOptions, status_fd: int) -> Sequence[str | Path]:
    ours = f"/proc/{os.getpid()}/fd"
    argv = [binary, _OP, "-D", f"{ours}/{options.images_dir_fd}", "-W", f"{ours}/{options.log_dir_fd}"]
    argv += ["-o", options.log_file, f"-v{options.log_level}", "--status-fd", str(status_fd)]
    if options.page_server_fd is not None:
        argv += ["--page-server", "--ps-socket", str(options.page_server_fd)]
    return argv
