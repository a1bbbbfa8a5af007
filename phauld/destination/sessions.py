"""The sessions of this node: those that are under way, and what the journal knows of others.

The invariant: a migration has at most one session here, whose answers are the journal's; nobody hears of another's.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from phaul_client.errors import InvalidRequest, MigrationNotFound, PhaulError
from phauld import session
from phauld.access import may_drive
from phauld.destination.dataport import DataPort
from phauld.destination.holdings import Host
from phauld.destination.incoming import Session
from phauld.destination.incoming_spec import Incoming
from phauld.destination.placement import Promise
from phauld.guard import CALLER
from phauld.journal import IncomingEntry, Journal
from phauld.node import Node
from phauld.observer import Observer
from phauld.session import Phase
from phauld.trees.workloads import Workloads

logger = logging.getLogger(__name__)

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Sessions:
    """By the ids of their migrations."""

    def __init__(
        self,
        node: Node,
        images_dir: Path,
        workloads: Workloads,
        data_port: DataPort,
        journal: Journal,
        observer: Observer,
    ) -> None:
        self._images_dir = images_dir
        self._host = Host(
            name=node.name,
            criu=node.criu,
            workloads=workloads,
            data_port=data_port,
            hooks=node.hooks,
            sync=node.sync,
        )
        self._journal = journal
        self._observer = observer
        self._known: dict[str, Session] = {}

    def __iter__(self) -> Iterator[Session]:
        """Those that still have something to do, or to be asked about."""
        return iter(tuple(self._known.values()))

    @property
    def active(self) -> int:
        """How many have not ended."""
        return sum(each.phase not in session.FINAL for each in self)

    @property
    def promised(self) -> Iterator[Promise]:
        """What they were granted."""
        return (each.promise for each in self)

    async def recover(self) -> None:
        """Bring to their end those that an earlier phauld left."""
        unfinished = await self._journal.unfinished_incoming()
        await self._host.workloads.discard_slots(but={entry.detail.get("record", "") for entry in unfinished})
        for entry in unfinished:
            logger.warning("recovering session migration_id=%s phase=%s", entry.migration_id, entry.phase)
            found = self._from_journal(entry)
            self._known[entry.migration_id] = found
            await found.recover()

    async def close(self) -> None:
        """phauld stops: see `Session.close`."""
        await asyncio.gather(*(each.close() for each in self))

    async def get(self, migration_id: str) -> Session:
        """Raises `MigrationNotFound`, and what `find` does."""
        found = await self.find(migration_id)
        if found is None:
            raise MigrationNotFound(migration_id)
        return found

    async def find(self, migration_id: str) -> Session | None:
        """Raises `InvalidRequest` for what is no id: it becomes part of a path; UNAUTHORIZED for another's session."""
        if not _ID.fullmatch(migration_id):
            raise InvalidRequest(f"{migration_id!r} is not a migration id")
        found = await self._look_up(migration_id)
        if found is not None and not may_drive(found.incoming.owner, CALLER.get()):
            logger.warning("refused migration_id=%s owner=%s caller=%s", *_whose(found))
            raise PhaulError(f"{migration_id} belongs to another node", reason="UNAUTHORIZED")
        return found

    def add(self, incoming: Incoming, images_dir: Path) -> Session:
        """A new one, whose images go there."""
        added = self._make(incoming, Phase.ABSENT, images_dir)
        self._known[incoming.migration_id] = added
        return added

    def remove(self, migration_id: str) -> None:
        """It could not be opened."""
        self._known.pop(migration_id, None)  # an abort may have dropped it

    async def abort_unknown(self, migration_id: str) -> Session:
        """Of a migration that never came, so that it never does. Whoever asks for that makes no memory grow."""
        aborted = self._make(Incoming.unknown(migration_id, owner=CALLER.get()), Phase.ABSENT, self._images_dir)
        self._known[migration_id] = aborted
        await aborted.abort()
        await aborted.cleaned()  # there was nothing to clean
        self._known.pop(migration_id, None)  # the journal remembers it
        return aborted

    async def _look_up(self, migration_id: str) -> Session | None:
        if migration_id not in self._known:
            entry = await self._journal.get_incoming(migration_id)
            if entry is None:
                return self._known.get(migration_id)  # perhaps opened meanwhile
            if entry.cleaned and entry.phase in session.FINAL:  # an answer for who asks, nothing to keep
                return self._known.get(migration_id) or self._from_journal(entry)
            return self._known.setdefault(migration_id, self._from_journal(entry))
        return self._known[migration_id]

    def _from_journal(self, entry: IncomingEntry) -> Session:
        found = self._make(Incoming.from_journal(entry), entry.phase, self._images_dir)
        found.remember(entry)
        return found

    def _make(self, incoming: Incoming, phase: Phase, images_dir: Path) -> Session:
        journal = self._journal.incoming(incoming.migration_id, incoming.source_node_id)
        if incoming.owner:
            journal.note(owner=incoming.owner)
        return Session(
            incoming,
            self._host,
            directory=images_dir / f"in-{incoming.migration_id}",
            journal=journal,
            phase=phase,
            on_end=self._drop,
        )

    def _drop(self, ended: Session) -> None:
        """The journal says all that is left to say."""
        if self._known.pop(ended.incoming.migration_id, None) is not None:
            self._observer.session_ended(ended)


def _whose(found: Session) -> tuple[str, str, str]:
    return found.incoming.migration_id, found.incoming.owner, CALLER.get()
