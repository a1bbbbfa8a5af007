"""The relay of a tree that goes ahead of its pages: started for a post-copy, or found again after a restart."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phaul_client.pipe import LinkTerms
from phaul_client.serving import RelayGone
from phauld.journal import OutgoingRecord
from phauld.lazy_pages.relays import Relay
from phauld.node import Node


class SourceRelay:
    """Of one migration; until it is started or found there is none, and nothing has an effect."""

    def __init__(self, node: Node, destination: str, directory: Path, journal: OutgoingRecord) -> None:
        self._node = node
        self._destination = destination
        self._directory = directory
        self._journal = journal
        self._relay: Relay | None = None
        self._uses_tls = False
        self._packing: str | None = None

    def agree(self, *, uses_tls: bool, packing: str | None) -> None:
        """What both nodes' relays can do."""
        self._uses_tls = uses_tls
        self._packing = packing

    async def start(self, kept_fds: tuple[int, ...]) -> tuple[Relay, socket.socket]:
        """Also our end of the connection to the `criu swrk` below it, which has `kept_fds`, too. Raises `OSError`."""
        relay, sock = await Relay.serve(self._directory, self._node.criu.binary, self._node.criu_version, kept_fds)
        self._journal.note(lazy_tls=self._uses_tls, lazy_packing=self._packing)
        self._relay = relay
        return relay, sock

    def find(self, detail: Mapping[str, Any]) -> Relay:
        """The one in the journal."""
        self.agree(uses_tls=bool(detail.get("lazy_tls")), packing=detail.get("lazy_packing"))
        self._relay = Relay(self._directory, detail["relay"])
        return self._relay

    def terms(self) -> LinkTerms:
        """For its next connection. Raises `InvalidRequest` while the policy cannot be read."""
        guard, tls = self._node.guard, None
        if guard is not None and self._uses_tls:
            tls = guard.pipe_tls_to(self._destination)
        return LinkTerms(tls=tls, packing=self._packing)

    async def limit(self, bytes_per_second: int) -> None:
        """0: no limit."""
        if self._relay is not None:
            with contextlib.suppress(RelayGone):
                await self._relay.limit(bytes_per_second)

    async def wait(self) -> None:
        """It ends with its criu."""
        if self._relay is not None:
            await self._relay.wait()
