"""The source's part of post-copy: its criu serves pages to a tree that is restored, and then runs, elsewhere.

`PostcopyLocal` is `CriuLocal` with `POSTCOPY_TRANSITIONS`: `post-dump` is answered before the restore, and from then on
the tree is held by its page connection, which a relay carries that outlives phauld. The invariant: the relay is told to
finish only from CONFIRMED, and to abort only from ROLLING_BACK; nothing else ends the page connection.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any, Final

from phaul_client import commit
from phaul_client.case import Case
from phaul_client.commit import Do, Event, Phase
from phaul_client.config import Config
from phaul_client.huge_pages import collapse_tree
from phaul_client.last_step import Settings
from phaul_client.local import CriuLocal
from phaul_client.serving import (
    AskTerms,
    OnProgress,
    RelayGone,
    Serving,
    ServingRelay,
    StartRelay,
    criu_gone,
    end_serving,
)
from phaul_client.timeline import Step
from phaul_client.tree import identity, stopped_pids
from phaul_criu.child import finish
from phaul_criu.criu import Criu
from phaul_criu.requests import DumpOptions
from phaul_criu.swrk import Notification, Swrk
from phaul_criu.urgency import calm_soon, hurry, in_a_hurry

logger = logging.getLogger(__name__)

#: The destination has the word, or still needs pages: criu must live on.
_NEEDS_SERVER: Final = frozenset({*commit.IN_DOUBT, Phase.FILLING})


class PostcopyLocal(CriuLocal):
    """Moves the tree first and its memory behind it. Good for one migration, also one that ends without post-copy."""

    def __init__(
        self, case: Case, settings: Settings, *, start_relay: StartRelay, on_progress: OnProgress, terms: AskTerms
    ) -> None:
        super().__init__(case, settings)
        self._start_relay = start_relay
        self._terms = terms
        self._on_progress = on_progress
        self._relay: ServingRelay | None = None
        self._pages: Serving | None = None
        self._serving: asyncio.Task[None] | None = None
        self._criu: dict[str, Any] = {}
        self._frozen_at = 0.0
        self._is_whole = True  # no rounds before
        self._hurried: tuple[int, ...] = ()

    async def dump_copy_serve(self, criu: Criu, config: Config, last_client_images_path: Path | None) -> None:
        """Freeze the tree, restore it there, serve its pages until none is missing. Raises as `dump_copy_restore`."""
        self._transitions = commit.POSTCOPY_TRANSITIONS
        try:
            async with self._under_way(config) as descriptor:
                if last_client_images_path is None:  # else every page would count as written to
                    await collapse_tree(config.pid)
                self._is_whole = last_client_images_path is None
                options = await self._options(descriptor, last_client_images_path)
                swrk, page_fd = await self._prepare(options)
                options = dataclasses.replace(options, lazy_pages_fd=page_fd)
                await self._see_through(asyncio.create_task(criu.dump(options, on_notify=self._notified, swrk=swrk)))
        finally:
            await self._early.aclose()
            self._calm()

    async def _prepare(self, options: DumpOptions) -> tuple[Swrk, int]:
        """All that can be done before the freeze."""
        pid = options.pid
        self._relay, sock = await self._start_relay(options.kept_fds)
        swrk = Swrk.attach(sock)
        try:
            status = await self._relay.status()
            self._criu = identity(status.criu_pid)
            self._pages = Serving(self._case, self._relay, self._on_progress, self._terms)
            self._hurry()
            await self._pages.link()
            self._stopped_before = stopped_pids(pid)
            self._journal.note(
                root=identity(pid),
                stopped_before=sorted(self._stopped_before),
                criu=self._criu,
                relay=dict(self._relay.process),
            )
            await self.fire(Event.LAST_ROUND)
            await self._guarded.watch(status.criu_pid, options)
            await self.let_go()
        except BaseException:
            await swrk.aclose()  # criu ends, and the relay with it
            raise
        return swrk, status.page_fd

    def _hurry(self) -> None:
        assert self._relay is not None
        in_a_hurry.enter()
        self._hurried = (self._relay.process["pid"], self._criu["pid"])
        for pid in self._hurried:
            hurry(pid)

    def _calm(self) -> None:
        """The tree runs again, here or there."""
        if self._hurried:
            in_a_hurry.leave()
            calm_soon(*self._hurried)
            self._hurried = ()

    async def _see_through(self, dump: asyncio.Task[Any]) -> None:
        """Wait for the dump, which ends when the last page has gone, and for the events that run beside it."""
        try:
            await asyncio.shield(dump)
        except asyncio.CancelledError:
            await finish(self._let_go(dump))
            raise
        except Exception as exc:
            self._cause = self._cause or exc
            if self._serving is not None:
                if self._phase in commit.CANCELLABLE:
                    self._serving.cancel()
                await asyncio.gather(self._serving, return_exceptions=True)  # in doubt it goes on asking
            await criu_gone(self._criu)
            await self._guarded.settled()
            raise
        assert self._serving is not None
        await self._serving
        await self._guarded.settled()
        commits = [step for step in self.steps if step.name == "commit"]
        self.pause_seconds = (commits[-1].end if commits else time.monotonic()) - self._frozen_at

    async def _let_go(self, dump: asyncio.Task[Any]) -> None:
        """We are cancelled: roll back or, when it is too late, leave criu and its relay to the next phauld."""
        if self._serving is None:
            dump.cancel()  # criu loses its connection and lets the tree run on
        else:
            if self._phase in (*commit.CANCELLABLE, *_NEEDS_SERVER):
                self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
            if self._phase in _NEEDS_SERVER:
                dump.cancel()  # criu does not look at that connection while it serves
        await asyncio.gather(dump, return_exceptions=True)
        if self._phase not in _NEEDS_SERVER:
            await criu_gone(self._criu)
            await self._guarded.settled()

    async def _notified(self, notification: Notification) -> None:
        match notification.name:
            case "pre-dump":
                self._frozen_at = time.monotonic()
            case "post-dump":
                self.steps.append(Step("freeze and dump", self._frozen_at, time.monotonic()))
            case "status-ready":
                self._serving = asyncio.create_task(self._serve(), name=f"serve-{self._migration_id}")
        await super()._notified(notification)
        if notification.name == "query-ext-files":  # it holds every task, and has dumped none
            assert self._config is not None
            self._early.begin(self._config.pid, self._directory, brings_own_pages=self._is_whole)

    async def _serve(self) -> None:
        """From the served pages to the last one."""
        try:
            assert self._pages is not None
            async with self._pages.linked(self._relay_gone):
                await self.fire(Event.PAGES_READY)
            while self._phase is Phase.HELD:  # the source's criu is lost: only a person can choose
                await self.fire(await self._wait_for_resolution())
        except asyncio.CancelledError:
            if self._phase in commit.CANCELLABLE:
                await finish(self.fire(self._stop_wanted or Event.FAILED))
            raise
        except Exception as exc:  # the journal cannot be written, for instance
            logger.exception("failed migration_id=%s", self._migration_id)
            self._cause = exc
            if self._phase in commit.CANCELLABLE:
                await self.fire(Event.FAILED)

    def _relay_gone(self, error: RelayGone) -> None:
        self._cause = self._cause or error
        self.cancel(Event.CRIU_LOST)  # after the commit it is too late, and `fill` will see it

    def cancel(self, event: Event = Event.CANCELLED) -> bool:
        if self._serving is None or self._serving.done():
            return super().cancel(event)
        if self._phase not in commit.CANCELLABLE:
            return False
        self._stop_wanted = event
        self._serving.cancel()
        return True

    async def perform(self, act: Do) -> Event | None:
        match act:
            case Do.ANSWER_POST_DUMP:
                return None  # by returning from the notification
            case Do.SERVE_PAGES:
                assert self._pages is not None
                self._calm()
                self._remote.stop_renewing()
                return await self._pages.fill()
            case Do.KILL_TREE if self._serving is not None and self._relay is not None:
                await end_serving(self._criu, self._relay.finish())
                return None
            case Do.RESUME_TREE if self._serving is not None and self._relay is not None:
                await end_serving(self._criu, self._relay.abort())
                return None
            case _:
                return await super().perform(act)

    async def unwind(self, error: BaseException) -> None:
        if self._phase is Phase.FILLING:  # phauld stops; the next one goes on
            raise error
        await super().unwind(error)
