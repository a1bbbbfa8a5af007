"""What moves beside the tree itself, at the destination: its addresses, its container, its directories, its hooks.

Before the commit they are prepared in secret, with it they are shown, and an abort takes them back. What fails after
the commit is logged: the tree does not wait for it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Coroutine
from itertools import filterfalse
from pathlib import Path
from typing import Any

from phaul_client.errors import PhaulError
from phaul_client.hook_calls import Hooks, HookSettings
from phaul_client.hooks import Facts, Side
from phaul_client.movers import Addresses, find
from phauld.destination.incoming_spec import Incoming
from phauld.destination.sync_receiver import SyncReceiver
from phauld.sync_records import SyncRecords

logger = logging.getLogger(__name__)


class Surroundings:
    """Of one session."""

    def __init__(
        self,
        incoming: Incoming,
        *,
        node_name: str,
        hooks: HookSettings | None,
        sync: SyncRecords,
        pid: Callable[[], int],
        is_recovered: bool,
    ) -> None:
        source = incoming.source_name or incoming.source_node_id
        facts = Facts(
            migration_id=incoming.migration_id,
            side=Side.DESTINATION,
            node_name=node_name,
            peer=source,
            workload=incoming.spec.name,
            addresses=tuple(map(str, incoming.addresses)),
        )
        self._incoming = incoming
        self._addresses = Addresses(incoming.addresses, incoming.migration_id)
        self.hooks = Hooks(hooks, incoming.hooks, facts, pid=pid, is_recovered=is_recovered)
        self.sync = SyncReceiver(sync, incoming.migration_id, source, incoming.sync, overwrite=incoming.sync_overwrite)
        self.container = incoming.container
        self.made: tuple[Path, ...] = ()  #: carried files that were not here before: dropped if it is aborted

    async def check(self) -> None:
        """Nothing that comes is here already. Raises `PhaulError`."""
        self.made = tuple(filterfalse(os.path.lexists, self._incoming.carried))
        for each in self._incoming.addresses:  # what is here later is ours to drop
            if await find(each.ip) is not None:
                raise PhaulError(f"{each.ip} is an address of this node already", reason="PREFLIGHT_FAILED")
        if self.container is not None:
            await self.container.check()

    def note(self) -> dict[str, Any]:
        """For the journal; `Incoming.from_journal` reads it."""
        return {
            "carried": [str(path) for path in self.made],
            "addresses": [str(each) for each in self._incoming.addresses],
            "hooks": [str(each) for each in self._incoming.hooks],
            "source_name": self._incoming.source_name,
            "container": self.container.note() if self.container is not None else None,
            "sync": self._incoming.sync,
        }

    async def hold(self) -> None:
        """Have its addresses, without a word of it. Raises `PhaulError`."""
        await self._addresses.hold()

    async def show(self) -> None:
        """The tree is about to run: before its first packet, which has to have an answer."""
        await self._addresses_are("announced", self._addresses.show)
        if self.container is not None:
            await self._container_is("connected", self.container.show)
        await self.hooks.commit()

    async def mute(self) -> None:
        """Before the tree is killed: the end of its connections is nobody's business."""
        await self._addresses_are("muted", self._addresses.mute)

    async def settle(self) -> None:
        """The tree runs. Again what `show` did, for who missed it, and after a crash."""
        await self._addresses_are("announced", self._addresses.show)
        if self.container is not None:
            await self._container_is("connected", self.container.show)
            await self._container_is("unmounted", self.container.leave)
            await self._container_is("settled", self.container.settle)
        try:  # what `--sync` brought is the tree's from now on: no later move may replace it unasked
            self.sync.arrived()
        except OSError as exc:  # the record says that it came only in part, and allows more than it should
            logger.error("sync not on record migration_id=%s error=%s", self._incoming.migration_id, exc)

    async def leave_container(self) -> None:
        """criu is done with what was mounted for it."""
        if self.container is not None:
            await self._container_is("unmounted", self.container.leave)

    async def take_back(self) -> None:
        """It was aborted."""
        await self._addresses_are("dropped", self._addresses.drop)
        if self.container is not None:
            await self._container_is("discarded", self.container.discard)
        await self.hooks.abort()
        for path in self.made:
            path.unlink(missing_ok=True)

    async def _addresses_are(self, done: str, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await act()
        except PhaulError as exc:
            logger.error("address not %s migration_id=%s error=%s", done, self._incoming.migration_id, exc)

    async def _container_is(self, done: str, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await act()
        except (PhaulError, OSError) as exc:
            logger.error("container not %s migration_id=%s error=%s", done, self._incoming.migration_id, exc)
