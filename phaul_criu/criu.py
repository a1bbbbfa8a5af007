"""criu as an object: dump, pre-dump, restore, page server, checks. Each operation has a criu child of its own.

On return, on failure and on cancellation alike no child, zombie or descriptor is left, and a tree is in one of its two
proper states: after a failed dump it runs on, after a failed restore no part of it runs.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from phaul_criu import child as children
from phaul_criu import requests, stats
from phaul_criu.diagnosis import add_log, failure, forget_log
from phaul_criu.errors import CheckFailed, CriuError, DumpFailed, PreDumpFailed, RestoreFailed
from phaul_criu.held import HeldTree
from phaul_criu.page_server import PageServer
from phaul_criu.requests import (
    CriuRequest,
    CriuResponse,
    DirectoryOptions,
    DumpOptions,
    PageServerOptions,
    RestoreOptions,
    TreeOptions,
)
from phaul_criu.stats import DumpStats, RestoreStats
from phaul_criu.swrk import Notification, OnNotify, Swrk, operation
from phaul_criu.turns import turn_to_dump
from phaul_criu.version import Version

#: Deadline of the questions that need no tree.
_CHECK_SECONDS = 30.0
_CONFIG = "criu.conf"

Options = TypeVar("Options", bound=TreeOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What this criu can do on this kernel."""

    #: Soft-dirty tracking: pre-dump works.
    mem_track: bool
    #: userfaultfd with its non-cooperative events: lazy restore and post-copy work.
    lazy_pages: bool
    #: pidfd_open and pidfd_getfd.
    pidfd_store: bool


class Criu:
    """Operations of one criu binary. `swrk` arguments take a connection prepared by `prestart`; it is used up."""

    def __init__(
        self, binary: str | Path, *, spawn: children.Spawn = children.spawn, log_level: int | None = None
    ) -> None:
        """`log_level` is that of trees' dumps and restores, whatever their options say; `None`: what they say."""
        self.binary = Path(binary)
        self._spawn = spawn
        self._log_level = log_level

    async def prestart(self, passed_fds: Sequence[int] = ()) -> Swrk:
        """Start criu ahead of an operation whose options have these `passed_fds`: its start then costs no pause."""
        return await Swrk.open(self.binary, pass_fds=passed_fds, spawn=self._spawn)

    async def dump(
        self,
        options: DumpOptions,
        *,
        on_notify: OnNotify | None = None,
        timeout_seconds: float | None = None,
        swrk: Swrk | None = None,
    ) -> DumpStats:
        """Dump the tree and kill it (unless `leave_running`).

        criu's notifications: pre-dump, (network-lock), query-ext-files, post-dump, (status-ready). From `post-dump` on
        the tree stands still and the images are complete. If `on_notify` raises, the tree runs on and the exception is
        raised here. On a failure `page_server_fd` is shut down, so that criu does not wait for it; it must be open in
        this process too. Of a dump with lazy pages criu keeps no statistics: they are all zero. It serves them on
        `lazy_pages_fd` until the other end sends a close or ends: then, too, it kills the tree. An unknown command
        makes it let the tree run on. It waits, while the tree runs, for other dumps that must not overlap with it.
        Raises DumpFailed, CriuDied, CriuTimeout, CriuMissing.
        """
        async with AsyncExitStack() as stack:
            if swrk is not None:
                stack.push_async_callback(swrk.aclose)
            end_turn = await stack.enter_async_context(turn_to_dump(options.pid))

            async def notified(notification: Notification) -> None:
                if notification.name == "post-dump":
                    end_turn()
                if on_notify is not None:
                    await on_notify(notification)

            cut = stack.enter_context(_page_socket(options))
            request = requests.dump_request(self._logged(options), _write_config(options))
            await self._operate(DumpFailed, request, options, swrk, notified, timeout_seconds, cut)
        return stats.NO_DUMP_STATS if options.lazy_pages_fd is not None else read_dump_stats(options)

    async def pre_dump(
        self,
        options: DumpOptions,
        *,
        timeout_seconds: float | None = None,
        swrk: Swrk | None = None,
    ) -> DumpStats:
        """Copy the memory of the tree, which runs on. Raises PreDumpFailed, CriuDied, CriuTimeout, CriuMissing."""
        with _page_socket(options) as cut:
            request = requests.pre_dump_request(self._logged(options))
            await self._operate(PreDumpFailed, request, options, swrk, None, timeout_seconds, cut)
        return read_dump_stats(options)

    async def restore(
        self,
        options: RestoreOptions,
        *,
        on_notify: OnNotify | None = None,
        timeout_seconds: float | None = None,
        swrk: Swrk | None = None,
    ) -> int:
        """Restore the tree; the PID of its root.

        criu's notifications: pre-restore, (setup-namespaces, post-setup-namespaces), post-restore (with the PID: the
        whole tree exists, none of it has run), pre-resume, post-resume. Whatever goes wrong before `pre-resume` was
        notified, no part of the tree is left when the exception is raised here; from `pre-resume` on the tree runs,
        whatever `on_notify` raises. If criu is somebody else's child (`Swrk.attach`) and dies, the tree is for that one
        to judge and to kill. Raises RestoreFailed, CriuDied, CriuTimeout, CriuMissing.
        """
        held = HeldTree()
        is_ours = swrk is None or swrk.pid is not None

        async def watch(notification: Notification) -> None:
            if notification.pid is not None and is_ours:
                held.note(notification.pid)
            if notification.name == "pre-resume":  # only now it is certain that criu has read our consent
                held.release()
            if on_notify is not None:
                await on_notify(notification)

        try:
            request = requests.restore_request(self._logged(options))
            response = await self._operate(RestoreFailed, request, options, swrk, watch, timeout_seconds)
        finally:
            held.kill()
        pid: int = response.restore.pid
        return pid

    async def page_server(
        self,
        options: PageServerOptions,
        socket_fd: int,
        *,
        timeout_seconds: float | None = _CHECK_SECONDS,
        swrk: Swrk | None = None,
    ) -> PageServer:
        """Start a page server on a connected socket; `async with` it, and `wait` for it inside.

        Close your own copy of the socket afterwards: the page server waits for the other end, not for you, but the
        other end may wait for every copy to be closed. Raises PageServerFailed, CriuDied, CriuTimeout, CriuMissing.
        """
        connection = swrk or await self.prestart((socket_fd,))
        return await PageServer.start(connection, options, socket_fd, timeout_seconds=timeout_seconds)

    async def version(self) -> Version:
        """The version of criu."""
        async with await self.prestart() as swrk:
            version = (await swrk.request(requests.version_request(), timeout_seconds=_CHECK_SECONDS)).version
        return Version(version.major_number, version.minor_number, version.sublevel)

    async def features(self) -> Features:
        """What criu can do on this kernel. Raises CheckFailed if it cannot tell."""
        async with await self.prestart() as swrk:
            response = await swrk.request(requests.feature_request(), timeout_seconds=_CHECK_SECONDS)
        if not response.success:
            raise CheckFailed("feature-check", "failed")
        found = response.features
        return Features(mem_track=found.mem_track, lazy_pages=found.lazy_pages, pidfd_store=found.pidfd_store)

    async def check(self) -> None:
        """Ask criu whether the kernel has all that it needs at least. Raises CheckFailed with what is missing."""
        with tempfile.TemporaryDirectory(prefix="phaul-check-") as directory, _opened(directory) as dir_fd:
            options = DirectoryOptions(images_dir_fd=dir_fd, log_file="check.log")
            await self._operate(CheckFailed, requests.check_request(options), options, None, None, _CHECK_SECONDS)

    async def cpuinfo_dump(self, dir_fd: int) -> None:
        """Write what this CPU can do into cpuinfo.img of the directory. Raises CheckFailed."""
        options = DirectoryOptions(images_dir_fd=dir_fd, log_file="cpuinfo-dump.log")
        await self._operate(CheckFailed, requests.cpuinfo_dump_request(options), options, None, None, _CHECK_SECONDS)

    async def cpuinfo_check(self, dir_fd: int) -> None:
        """Compare this CPU with cpuinfo.img of the directory. Raises CheckFailed if a feature is missing here."""
        options = DirectoryOptions(images_dir_fd=dir_fd, log_file="cpuinfo-check.log")
        await self._operate(CheckFailed, requests.cpuinfo_check_request(options), options, None, None, _CHECK_SECONDS)

    def _logged(self, options: Options) -> Options:
        return options if self._log_level is None else replace(options, log_level=self._log_level)

    async def _operate(
        self,
        kind: type[CriuError],
        request: CriuRequest,
        options: DirectoryOptions,
        swrk: Swrk | None,
        on_notify: OnNotify | None,
        timeout_seconds: float | None,
        cut: Callable[[], None] = lambda: None,
    ) -> CriuResponse:
        """Do one operation on one criu, and turn its failure into an error that says the cause."""
        op = operation(request)
        async with swrk or await self.prestart(options.passed_fds) as connection:
            try:
                forget_log(options)
                response = await connection.request(request, on_notify=on_notify, timeout_seconds=timeout_seconds)
            except CriuError as exc:
                cut()
                if exc.op == op:  # it may also be the callback's own
                    add_log(exc, options)
                raise
            except BaseException:
                cut()
                raise
        if not response.success:
            raise failure(kind, op, response, options)
        return response


def read_dump_stats(options: DumpOptions) -> DumpStats:
    """The statistics of the dump that has just ended. Raises StatsError, OSError."""
    return stats.parse_dump_stats(_read(stats.DUMP_STATS_FILE, options))


def read_restore_stats(options: RestoreOptions) -> RestoreStats:
    """The statistics of the restore that has just ended. Raises StatsError, OSError."""
    return stats.parse_restore_stats(_read(stats.RESTORE_STATS_FILE, options))


def _read(name: str, options: DirectoryOptions) -> bytes:
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=options.log_dir_fd), "rb") as file:
        return file.read()


def _write_config(options: DumpOptions) -> str | None:
    """Put what criu takes from a file only beside the images; its path, if there is any."""
    config = requests.dump_config(options)
    if not config:
        return None
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with open(os.open(_CONFIG, flags, 0o600, dir_fd=options.images_dir_fd), "w", encoding="ascii") as file:
        file.write(config)
    return f"/proc/{os.getpid()}/fd/{options.images_dir_fd}/{_CONFIG}"


@contextmanager
def _opened(directory: str) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _page_socket(options: DumpOptions) -> Iterator[Callable[[], None]]:
    """Gives a function that cuts the page stream of a dump: a criu that waits in it would not notice a refusal."""
    if options.page_server_fd is None:
        yield lambda: None
        return
    with socket.socket(fileno=os.dup(options.page_server_fd)) as page_socket:

        def cut() -> None:
            with suppress(OSError):  # never connected, or gone already
                page_socket.shutdown(socket.SHUT_RDWR)

        yield cut
