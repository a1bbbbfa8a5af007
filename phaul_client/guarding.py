"""Who sees to a tree if the criu that dumps it is killed, as this side uses it: see `phauld/guarding/dump_guard.py`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from phaul_criu.child import finish
from phaul_criu.criu import Criu
from phaul_criu.requests import DumpOptions
from phaul_criu.swrk import Swrk

logger = logging.getLogger(__name__)


class Guard(Protocol):
    """Of one migration: it watches one criu after the other. `watch` raises `OSError`, the others log what fails."""

    async def start(self) -> None:
        """Beforehand: it takes its time. Once is enough."""

    async def watch(self, criu_pid: int, root_pid: int, *, is_told: bool = True) -> None:
        """From now on, a criu that has not touched the tree yet. Not `is_told`: no `note_frozen`, no `note_whole`."""

    async def note_frozen(self) -> None:
        """criu holds every task, and has changed none."""

    async def note_whole(self) -> bool:
        """criu has changed all tasks back. Whether it still lives; from now on nobody else makes the tree run."""

    async def settled(self) -> None:
        """This criu has ended. On return the guard has done what it does then."""

    async def aclose(self) -> None:
        """It is not needed any more, but for a criu that still lives."""


@asynccontextmanager
async def guarding(guard: Guard | None) -> AsyncIterator[None]:
    """Raises `OSError`."""
    if guard is None:
        yield
        return
    try:
        await guard.start()
        yield
    finally:
        await guard.aclose()


@asynccontextmanager
async def guarded(guard: Guard | None, criu: Criu, options: DumpOptions) -> AsyncIterator[Swrk | None]:
    """A criu for an operation on a running tree, watched; `None` without a guard."""
    if guard is None:
        yield None
        return
    swrk = await criu.prestart(options.passed_fds)
    try:
        try:
            await guard.watch(swrk.pid or 0, options.pid, is_told=False)
        except OSError as exc:
            logger.warning("nobody guards the tree pid=%d error=%s", options.pid, exc)
        yield swrk
    finally:
        await swrk.aclose()
        await guard.settled()


class GuardedDump:
    """The guard of a last dump, if there is one, beside which the commit protocol goes on."""

    def __init__(self, migration_id: str, guard: Guard | None) -> None:
        self._migration_id = migration_id
        self._guard = guard
        self._noting: asyncio.Task[bool] | None = None

    async def start(self) -> None:
        """Before the freeze. Raises `OSError`."""
        if self._guard is not None:
            await self._guard.start()

    async def watch(self, criu_pid: int, options: DumpOptions) -> None:
        """Before criu touches the tree. Raises `OSError` if it has connections that would be lost."""
        if self._guard is None:
            return
        try:
            await self._guard.watch(criu_pid, options.pid)
        except OSError as exc:
            if options.tcp_established:
                raise
            logger.warning("nobody guards the tree migration_id=%s error=%s", self._migration_id, exc)

    async def note_frozen(self) -> None:
        """criu holds every task, and has changed none."""
        if self._guard is not None:
            await self._guard.note_frozen()

    def note_whole(self) -> None:
        """criu has changed all tasks back; beside what follows, up to the moment when others stop the tree."""
        if self._guard is not None:
            self._noting = asyncio.create_task(self._guard.note_whole())

    async def is_whole(self) -> bool:
        """Whether criu still lived then."""
        return self._noting is None or await self._noting

    async def settled(self) -> None:
        """criu is gone. On return its guard has done what it has to do."""
        if self._guard is not None:
            with contextlib.suppress(asyncio.CancelledError):  # what is under way is a roll-back already
                await finish(self._settled(self._guard))

    async def _settled(self, guard: Guard) -> None:
        if self._noting is not None:
            await asyncio.gather(self._noting, return_exceptions=True)
        await guard.settled()
