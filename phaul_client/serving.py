"""Pages for a tree that runs elsewhere: criu serves them, a relay that outlives phauld carries them.

The invariant: nothing here ends the page connection but the two commands that `end_serving` gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from phaul_client.case import Case
from phaul_client.commit import Event
from phaul_client.errors import InvalidRequest, PeerError, PeerRefused, PhaseError, PhaulError
from phaul_client.pipe import LinkTerms
from phaul_client.stream import StreamKind
from phaul_client.tree import Tree, is_alive, wait_until_gone

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.1
RELINK_SECONDS: Final = 1.0
CRIU_END_SECONDS: Final = 60.0


class RelayGone(PhaulError):
    """The relay has ended, and with it, mostly, its criu."""


class RelaySilent(RelayGone):
    """It lives but has not answered in time: pages may flow all the same. Who can ask again must not give up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayStatus:
    """What a relay does now. Counters count from its start."""

    criu_pid: int
    page_fd: int  #: criu's end of the page socket, a number in criu's process
    is_linked: bool
    page_bytes: int
    wire_bytes: int
    pages: int


class ServingRelay(Protocol):
    """The relay of a source. Calls raise `RelayGone`."""

    @property
    def process(self) -> Mapping[str, Any]: ...

    async def status(self) -> RelayStatus: ...

    async def link(self, sock: socket.socket, terms: LinkTerms) -> None: ...

    async def finish(self) -> None: ...

    async def abort(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the filling has come."""

    sent_bytes: int
    wire_bytes: int  #: what that was on the network
    pages_missing: int


#: Starts a relay with a `criu swrk` below it that has these descriptors, too: the relay, and the connection to criu.
StartRelay = Callable[[tuple[int, ...]], Awaitable[tuple[ServingRelay, socket.socket]]]
OnProgress = Callable[[Progress], None]
#: How the relays talk, asked for each connection. Raises `InvalidRequest`.
AskTerms = Callable[[], LinkTerms]


class Serving:
    """Keeps the relay linked and asks the destination, until it needs no more pages."""

    def __init__(self, case: Case, relay: ServingRelay, on_progress: OnProgress, terms: AskTerms = LinkTerms) -> None:
        self.relay: Final = relay
        self._migration_id = case.migration_id
        self._remote = case.remote
        self._doubt = case.doubt
        self._on_progress = on_progress
        self._terms = terms

    async def link(self) -> None:
        """Connect the relay to the destination. Raises `PhaulError`: `PeerError`, `RelayGone`, or of the policy."""
        terms = self._terms()
        tls, packed = terms.tls is not None, terms.packing is not None
        await self.relay.link(await self._remote.open_stream(StreamKind.LAZY_PAGES, tls=tls, packed=packed), terms)

    @contextlib.asynccontextmanager
    async def linked(self, on_gone: Callable[[RelayGone], None] = lambda _: None) -> AsyncIterator[None]:
        """Make a new connection whenever there is none; `on_gone` is told if the relay has ended."""
        task = asyncio.create_task(self._keep_linked(on_gone), name=f"link-{self._migration_id}")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def fill(self) -> Event:
        """See every page over."""
        heard_at = time.monotonic()
        while True:
            try:
                session = await self._remote.get_session()
                heard_at = time.monotonic()
                if session.HasField("error"):
                    logger.error("pages lost migration_id=%s error=%s", self._migration_id, session.error.message)
                    return Event.CRIU_LOST
                if not session.filling:
                    with contextlib.suppress(RelayGone):
                        await self._tell(0)
                    return Event.PAGES_FILLED
                await self._tell(session.pages_missing)
            except RelaySilent as exc:
                logger.warning("relay silent migration_id=%s error=%s", self._migration_id, exc)
            except RelayGone as exc:
                logger.error("criu lost while it served pages migration_id=%s error=%s", self._migration_id, exc)
                return Event.CRIU_LOST
            except PeerError as exc:
                logger.warning("destination silent migration_id=%s error=%s", self._migration_id, exc)
                if time.monotonic() - heard_at > self._doubt.seconds:
                    return Event.DOUBT_EXPIRED
            await asyncio.sleep(POLL_SECONDS)

    async def _tell(self, pages_missing: int) -> None:
        """Raises `RelayGone`."""
        relay = await self.relay.status()
        self._on_progress(
            Progress(sent_bytes=relay.page_bytes, wire_bytes=relay.wire_bytes, pages_missing=pages_missing)
        )

    async def _keep_linked(self, on_gone: Callable[[RelayGone], None]) -> None:
        patience_seconds = POLL_SECONDS
        while True:
            await asyncio.sleep(patience_seconds)
            patience_seconds = POLL_SECONDS
            try:
                if not (await self.relay.status()).is_linked:
                    await self.link()
                    logger.info("page link made migration_id=%s", self._migration_id)
            except RelaySilent as exc:
                logger.warning("relay silent migration_id=%s error=%s", self._migration_id, exc)
            except RelayGone as exc:
                return on_gone(exc)
            except (PeerError, InvalidRequest) as exc:  # the latter while the policy cannot be read
                is_over = isinstance(exc, PeerRefused) and exc.reason == PhaseError.default_reason
                level = logging.DEBUG if is_over else logging.WARNING
                logger.log(level, "page link not made migration_id=%s error=%s", self._migration_id, exc)
                patience_seconds = RELINK_SECONDS


async def end_serving(criu: Mapping[str, Any], command: Awaitable[None]) -> None:
    """Give the relay the command that ends it. Without a relay criu waits for ever: kill it; the tree is not harmed."""
    try:
        await command
    except RelayGone as exc:
        logger.warning("criu is killed: %s", exc)
        await criu_gone(criu, patience_seconds=0)


async def criu_gone(process: Mapping[str, Any], *, patience_seconds: float = CRIU_END_SECONDS) -> None:
    """Wait until criu has let go of the tree; one that does not end is killed, which lets go of it as well."""
    if not process or not is_alive(process):
        return
    try:
        async with asyncio.timeout(patience_seconds):
            await wait_until_gone(process["pid"])
    except TimeoutError:
        with Tree.again([{**process, "stopped_by_us": False}]) as criu:
            await criu.kill()
