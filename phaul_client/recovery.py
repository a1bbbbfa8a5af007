"""Sees migrations to their end that were found in the journal: by a phauld that was started anew, or after an attempt.

There is no dump in this process. The tree is known by its tasks; of a post-copy, relay and criu may live on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from phaul_client import commit
from phaul_client.case import Case
from phaul_client.commit import Do, Event, Phase
from phaul_client.coordinator import Coordinator
from phaul_client.serving import Serving, criu_gone, end_serving
from phaul_client.tree import Tree

logger = logging.getLogger(__name__)


class Recovery(Coordinator):
    """A migration that a restarted phauld found in its journal."""

    def __init__(self, case: Case, phase: Phase, tree: Tree) -> None:
        super().__init__(case, phase)
        self._tree = tree

    async def run(self) -> Phase:
        """See it to its end: the final phase that it reached."""
        assert self._tree is not None
        with self._tree:
            await self.fire(Event.RESTARTED)
        return self._phase

    async def _send_commit(self) -> Event:
        """Unless a task here runs: it has run past its images then, and there is only one end without a second copy."""
        assert self._tree is not None
        if await self._tree.is_still():
            return await super()._send_commit()
        logger.error("not committed, for the tree runs here migration_id=%s", self._migration_id)
        await self._abort_destination()
        return Event.NO_ANSWER


class PostcopyRecovery(Recovery):
    """A post-copy migration that a restarted phauld found in its journal; its relay and criu may live on."""

    def __init__(self, case: Case, phase: Phase, tree: Tree, *, pages: Serving, criu: Mapping[str, Any]) -> None:
        super().__init__(case, phase, tree)
        self._transitions = commit.POSTCOPY_TRANSITIONS
        self._pages = pages
        self._criu = criu

    async def run(self) -> Phase:
        assert self._tree is not None
        with self._tree:
            async with self._pages.linked():
                await self.fire(Event.RESTARTED)
            while self._phase is Phase.HELD:
                await self.fire(await self._wait_for_resolution())
        return self._phase

    async def perform(self, act: Do) -> Event | None:
        match act:
            case Do.SERVE_PAGES:
                return await self._pages.fill()
            case Do.KILL_TREE:
                await end_serving(self._criu, self._pages.relay.finish())
                await criu_gone(self._criu)
            case Do.RESUME_TREE:
                await end_serving(self._criu, self._pages.relay.abort())
                await criu_gone(self._criu)
        return await super().perform(act)
