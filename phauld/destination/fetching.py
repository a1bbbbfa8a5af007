"""The pages of a post-copy at the destination: the relay that fetches them, and how many are missing.

The invariant: only `criu lazy-pages` that ended well makes `is_filling` false; whatever else ends it leaves pages
missing, and the tree without them must not run on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from phaul_client.errors import PeerUnavailable
from phaul_client.pipe import LinkTerms
from phaul_client.serving import RelayGone, RelaySilent
from phaul_client.tree import descendants
from phaul_criu.errors import LazyPagesFailed
from phaul_criu.pagemaps import lazy_pages
from phaul_criu.urgency import calm, calm_soon, hurry
from phaul_criu.version import Version
from phauld.destination import unattended
from phauld.destination.dataport import DataPort, Expected
from phauld.lazy_pages.relays import Relay

logger = logging.getLogger(__name__)

_LOG_FILE: Final = "lazy-pages.log"
_FEW_PROCESSES: Final = 4  #: for each processor


class Fetching:
    """The relay of one session, from its opening on; it fetches once it was started."""

    def __init__(self, relay: Relay, *, is_filling: bool = False) -> None:
        self.relay = relay
        self.is_filling = is_filling
        self._pages = 0
        self._processes = 0
        self._arrived = 0
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, directory: Path, criu_version: Version) -> Self:
        """Start a relay in `directory`. Raises `OSError`."""
        return cls(await Relay.fetch(directory, criu_version))

    @classmethod
    def found(cls, directory: Path, process: Mapping[str, Any], *, is_filling: bool) -> Self:
        """The relay of an earlier phauld."""
        return cls(Relay(directory, process), is_filling=is_filling)

    @property
    def pages_missing(self) -> int:
        """Pages that have not arrived; 0 if that is not known."""
        return max(0, self._pages - self._arrived) if self.is_filling else 0

    def expect(self, port: DataPort, timeout_seconds: float, terms: LinkTerms) -> tuple[Expected, asyncio.Task[None]]:
        """Expect one more connection; the task hands it to the relay."""
        expected = port.expect()
        return expected, asyncio.create_task(self._attach(expected, timeout_seconds, terms))

    async def _attach(self, expected: Expected, timeout_seconds: float, terms: LinkTerms) -> None:
        try:
            await self.relay.link(await expected.take(timeout_seconds), terms)
        except TimeoutError:
            logger.info("no page link came directory=%s", self.relay.directory)
        except (RelayGone, PeerUnavailable) as exc:
            logger.warning("page link not taken: %s", exc)
        finally:
            expected.close()

    async def start(self, criu: Path, images: Path) -> None:
        """Start `criu lazy-pages` for a tree that is to be restored from `images`. Raises `LazyPagesFailed`."""
        try:
            self._pages, self._processes = _left_behind(images)
        except ValueError as exc:  # they came from the source
            raise LazyPagesFailed("lazy-pages", str(exc)) from exc
        argv = [str(criu), "lazy-pages", "-D", str(images), "-W", str(images), "-o", _LOG_FILE, "-v2"]
        hurry(self.relay.process["pid"])  # and so criu, which it starts
        try:
            await self.relay.start(argv, self._pages)
        except (OSError, RelayGone) as exc:
            raise LazyPagesFailed("lazy-pages", str(exc)) from exc
        self.is_filling = True
        self._watch = asyncio.create_task(self._count())

    async def criu_pid(self) -> int:
        """That of `criu lazy-pages`. Raises `RelayGone`."""
        return (await self.relay.status()).criu_pid

    def check(self) -> None:
        """Raises `LazyPagesFailed` if criu has failed already."""
        if self.is_filling and (status := self.relay.exit_status):
            raise LazyPagesFailed("lazy-pages", f"ended with {status}")

    def make_way(self) -> None:
        """The tree is about to run: of few processors nothing would be left for it until `calm_soon`."""
        if gives_way(self._processes, len(os.sched_getaffinity(0))):
            for pid in descendants(self.relay.process["pid"]):
                calm(pid)

    async def wait(self, root: Mapping[str, Any]) -> None:
        """Wait for every page. Raises `LazyPagesFailed`: pages are lost, and the tree was killed."""
        calm_soon(*descendants(self.relay.process["pid"]))
        if self._watch is None:
            self._watch = asyncio.create_task(self._count())
        status = await self.relay.criu_ended()
        self._watch.cancel()
        if status != 0 and self.is_filling:
            await unattended.kill(root)
            await self.relay.kill()
            raise LazyPagesFailed("lazy-pages", f"ended with {status}: pages of the tree are lost, it was killed")
        self.is_filling = False

    async def aclose(self) -> None:
        """End the relay, and criu with it, wherever they are."""
        if self._watch is not None:
            self._watch.cancel()
        await self.relay.kill()

    def leave(self) -> None:
        """phauld stops: both go on."""
        if self._watch is not None:
            self._watch.cancel()

    async def _count(self) -> None:
        while True:
            try:
                self._arrived = (await self.relay.status()).pages
            except RelaySilent:
                pass  # busy, or its node is
            except RelayGone:
                return
            await asyncio.sleep(0.1)


def gives_way(processes: int, processors: int) -> bool:
    """Whether those that fill a tree go first no longer when it is let go.

    criu has each process do a little by then. With many it would wait until all memory is in: for 50 on two processors
    that was 0.3 s. One process alone waits for its pages rather than for a processor: 143 ms so, 190 otherwise.
    """
    return processors == 1 or processes > _FEW_PROCESSES * processors


def _left_behind(images: Path) -> tuple[int, int]:
    """Pages, and of how many processes. Raises ValueError."""
    pages = [lazy_pages(path.read_bytes()) for path in images.glob("pagemap-*.img")]
    return sum(pages), len(pages)
