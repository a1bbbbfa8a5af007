"""Makes directories at the destination the same as here: while the tree runs, and once more while it stands still.

The invariant: `finish` returns only if everything that the frozen tree can see in them is there, as rsync's checksum of
each file that was sent says. What changed is found by time (rsync, and `find` for what is too fresh to tell), and what
is mapped for writing is compared by content, for its times tell nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from phaul.v1 import migrations_pb2
from phaul_client import rsync
from phaul_client.remote import GrpcRemote
from phaul_client.rsync import Copied, Pass
from phaul_client.sync_run import SyncRun, failed
from phaul_client.timeline import Step
from phaul_client.tree import descendants
from phaul_criu.child import finish, spawn

logger = logging.getLogger(__name__)

FIND_SECONDS: Final = 600.0
#: While the tree runs: passes over a directory, and how short the last one is to be.
PASSES: Final = 4
SHORT_SECONDS: Final = 0.5
#: Times of files are coarse: what is so little older than a pass may have changed after it was read.
SLACK_SECONDS: Final = 1.0


class FileSync:
    """The directories of one migration. Whoever makes it closes it."""

    def __init__(
        self,
        remote: GrpcRemote,
        directories: Sequence[str],
        pid: int,
        *,
        in_place: bool = True,
        bandwidth_bytes_per_second: int = 0,
        after_dump: bool = False,
    ) -> None:
        """`after_dump`: the dump itself makes files in them (link_remap), so the last pass has to wait for it."""
        self._remote = remote
        self._pid = pid
        self._pass = Pass(in_place=in_place, bandwidth_bytes_per_second=bandwidth_bytes_per_second)
        self._directories = [_Directory(each) for each in directories]
        self._after_dump = after_dump
        self._last: asyncio.Task[None] | None = None
        self._runs: set[SyncRun] = set()
        self.step: Step | None = None  #: the last pass

    async def copy(self) -> None:
        """All of them, while the tree runs. Raises `PhaulError`."""
        for each in self._directories:
            each.mapped = await asyncio.to_thread(self._mapped, each.path)
            each.since = time.time()
            wanted = dataclasses.replace(self._pass, checksum=True)
            each.before += await self._run(each.path, wanted, first=True, is_last=False)
            for _ in range(PASSES - 1):
                if time.time() - each.since < SHORT_SECONDS:
                    break
                await self._differences(each)

    async def prepare(self) -> None:
        """What changed since; and have the last pass ready, up to its first word. Raises `PhaulError`."""
        for each in self._directories:
            await self._differences(each)
            each.listed = await self._start(each.path, dataclasses.replace(self._pass, listed=True))
            each.all = await self._start(each.path, self._pass)

    def freeze(self) -> None:
        """The tree stands still: begin the last pass, if it can begin already."""
        if self._last is None and not self._after_dump and self._directories:
            self._last = asyncio.create_task(self._finish(), name="sync")

    async def finish(self) -> None:
        """The tree stands still, and is dumped: on return everything is there. Raises `PhaulError`, `OSError`."""
        if self._directories:
            self._last = self._last or asyncio.create_task(self._finish(), name="sync")
            await self._last

    async def aclose(self) -> None:
        """Nothing of it runs after this."""
        await finish(self._close())

    async def _close(self) -> None:
        if self._last is not None:
            self._last.cancel()
            await asyncio.gather(self._last, return_exceptions=True)
        for each in tuple(self._runs):
            await each.aclose()
        self._runs.clear()

    def report(self) -> list[migrations_pb2.SyncedDirectory]:
        """What was copied until now."""
        return [each.message() for each in self._directories]

    async def _finish(self) -> None:
        started = time.monotonic()
        for each in self._directories:
            begun = time.monotonic()
            listed, everything = each.listed, each.all
            changed = await self._changed(each, is_last=True)
            if changed:
                listed = listed or await self._start(each.path, dataclasses.replace(self._pass, listed=True))
                each.frozen += await self._go(listed, each.path, changed, is_last=True)
            everything = everything or await self._start(each.path, self._pass)
            each.frozen += await self._go(everything, each.path, is_last=True)
            each.frozen_seconds = time.monotonic() - begun
        self.step = Step("sync files", started, time.monotonic())

    async def _differences(self, each: _Directory) -> None:
        """What changed since the last pass, while the tree runs."""
        changed, started = await self._changed(each), time.time()
        each.mapped = await asyncio.to_thread(self._mapped, each.path)
        copied = Copied()
        if changed:
            run = await self._start(each.path, dataclasses.replace(self._pass, listed=True))
            copied += await self._go(run, each.path, changed, is_last=False)
        copied += await self._run(each.path, self._pass, first=False, is_last=False)
        each.before += copied
        each.since = started

    async def _changed(self, each: _Directory, *, is_last: bool = False) -> bytes:
        """Names, each with a zero behind it, of what may have changed since the last pass without other times."""
        mapped = each.mapped | await asyncio.to_thread(self._mapped, each.path)
        since = f"@{each.since - SLACK_SECONDS:.3f}"
        words = ["find", each.path, "-xdev", "-type", "f", "(", "-newermt", since, "-o", "-newerct", since, ")"]
        found = await _output([*words, "-printf", r"%P\0"], must_succeed=is_last)
        names = {name for name in found.split(b"\0") if name}
        names |= await asyncio.to_thread(_relative, mapped, each.path)
        return b"".join(name + b"\0" for name in sorted(names))

    def _mapped(self, directory: str) -> frozenset[str]:
        found: set[str] = set()
        for pid in descendants(self._pid):
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="surrogateescape")
                found |= rsync.shared_writable(maps, directory)
        return frozenset(found)

    async def _run(self, directory: str, wanted: Pass, *, first: bool, is_last: bool) -> Copied:
        return await self._go(await self._start(directory, wanted, first=first), directory, is_last=is_last)

    async def _start(self, directory: str, wanted: Pass, *, first: bool = False) -> SyncRun:
        started = SyncRun(self._remote, directory)
        self._runs.add(started)
        await started.start(wanted, first=first)
        return started

    async def _go(self, started: SyncRun, directory: str, listed: bytes = b"", *, is_last: bool) -> Copied:
        try:
            status, said = await started.go(listed)
        finally:
            await started.aclose()
            self._runs.discard(started)
        if status != 0 and (is_last or status not in rsync.NOT_COMPLETE):
            raise failed(directory, f"rsync ended with {status}: {said or 'no reason given'}")
        if status != 0:
            logger.info("sync not complete yet directory=%s status=%d said=%s", directory, status, said)
        return started.copied


class _Directory:
    """One directory and how far it has come."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.since = 0.0  # the clock when its last pass began
        self.mapped: frozenset[str] = frozenset()  # what was mapped for writing then
        self.before = self.frozen = Copied()
        self.frozen_seconds = 0.0
        self.listed: SyncRun | None = None
        self.all: SyncRun | None = None

    def message(self) -> migrations_pb2.SyncedDirectory:
        made = migrations_pb2.SyncedDirectory(
            directory=self.path,
            files=self.before.files,
            bytes=self.before.bytes,
            freeze_files=self.frozen.files,
            freeze_bytes=self.frozen.bytes,
            freeze_paths=self.frozen.paths,
        )
        made.freeze_duration.FromMicroseconds(round(self.frozen_seconds * 1e6))
        return made


def _relative(paths: frozenset[str], directory: str) -> set[bytes]:
    """Those that are there, as rsync is told them."""
    return {os.fsencode(os.path.relpath(path, directory)) for path in paths if os.path.isfile(path)}


async def _output(argv: Sequence[str], *, must_succeed: bool) -> bytes:
    """All that a program writes; that files vanish under it is not always a failure. Raises `OSError`, `TimeoutError`.

    And `PhaulError` SYNC_FAILED.
    """
    output = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        async with asyncio.timeout(FIND_SECONDS), await spawn(argv, stdout=output) as child:
            status = await child.wait()
        if status and must_succeed:
            raise failed(argv[1], child.stderr_tail or f"find ended with {status}")
        return os.pread(output, os.fstat(output).st_size, 0)
    finally:
        os.close(output)
