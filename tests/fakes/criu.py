"""A `Criu` whose dump holds a real process tree with ptrace, and writes images that mean nothing.

What a dump does to the tree is what criu's does: it stands still from the start of the dump on, runs on if the dump is
refused, cancelled, or if criu dies, and is killed when `post-dump` was answered with success.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from phaul_criu.child import Child, finish, spawn
from phaul_criu.criu import Criu, Features
from phaul_criu.errors import CriuDied, DumpFailed
from phaul_criu.requests import DumpOptions
from phaul_criu.stats import DumpStats
from phaul_criu.swrk import Notification, OnNotify, Swrk
from tests.fakes import tracer

IMAGES = {"core-1.img": b"core", "fs-1.img": b"fs", "inventory.img": b"inventory"}
STATS = DumpStats(
    freezing_microseconds=100,
    frozen_microseconds=1000,
    memdump_microseconds=10,
    memwrite_microseconds=10,
    pages_scanned=10,
    pages_skipped_parent=0,
    pages_written=10,
    pages_lazy=0,
    shpages_scanned=0,
    shpages_skipped_parent=0,
    shpages_written=0,
)


class FakeSwrk(Swrk):
    """The tracer, started ahead."""

    def __init__(self, child: Child, to_child: int, from_child: int) -> None:
        self.child = child
        self._to_child = to_child
        self._from_child = os.fdopen(from_child, "rb", buffering=0)

    @property
    def pid(self) -> int | None:
        return self.child.pid

    async def tell(self, text: str) -> None:
        """Raises CriuDied."""
        try:
            os.write(self._to_child, f"{text}\n".encode())
        except BrokenPipeError:
            raise CriuDied("dump", "criu was killed by signal 9", signal=9) from None
        if not await asyncio.to_thread(self._from_child.readline):
            raise CriuDied("dump", "criu was killed by signal 9", signal=9)

    async def aclose(self, *, patience_seconds: float = 0) -> None:
        if self._to_child >= 0:
            os.close(self._to_child)
            self._to_child = -1
            await self.child.aclose()
            self._from_child.close()


@dataclass
class FakeCriu(Criu):
    """`fails_at` is "start" (before it has touched the tree) or "end" (after `post-dump` was answered well)."""

    fails_at: str = ""
    before_dump: Callable[[], Awaitable[None]] | None = None  # between the request and the freeze
    notified: list[str] = field(default_factory=list)
    swrk: FakeSwrk | None = None

    async def features(self) -> Features:
        return Features(mem_track=False, lazy_pages=False, pidfd_store=False)

    async def prestart(self, passed_fds: Sequence[int] = ()) -> Swrk:
        stdin, to_child = os.pipe()
        from_child, stdout = os.pipe()
        try:
            argv = [sys.executable, "-I", "-S", tracer.__file__]
            child = await spawn(argv, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL)
        finally:
            os.close(stdin)
            os.close(stdout)
        self.swrk = FakeSwrk(child, to_child, from_child)
        return self.swrk

    async def dump(
        self,
        options: DumpOptions,
        *,
        on_notify: OnNotify | None = None,
        timeout_seconds: float | None = None,
        swrk: Swrk | None = None,
    ) -> DumpStats:
        assert isinstance(swrk, FakeSwrk)
        assert on_notify is not None
        try:
            if self.fails_at == "start":
                raise DumpFailed("dump", "failed", cause="a thing that cannot be dumped")
            if self.before_dump is not None:
                await self.before_dump()
            await self._notify("pre-dump", on_notify)  # the tree still runs, as with criu
            await swrk.tell(f"seize {options.pid}")
            await self._notify("query-ext-files", on_notify)
            _write_images(Path(f"/proc/self/fd/{options.images_dir_fd}"))
            await self._notify("post-dump", on_notify)
            if self.fails_at == "end":
                raise DumpFailed("dump", "failed", cause="it could not kill the tree")
            await swrk.tell("kill")
            return STATS
        finally:
            await finish(swrk.aclose())  # lets go of a tree that it still holds

    async def _notify(self, name: str, on_notify: OnNotify) -> None:
        self.notified.append(name)
        await on_notify(Notification(name))

    def die(self) -> None:
        """Kill it now, and wait until it has let go."""
        assert self.swrk is not None
        pid = self.swrk.child.pid
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _write_images(directory: Path) -> None:
    for name, content in IMAGES.items():
        (directory / name).write_bytes(content)
