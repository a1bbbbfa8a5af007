"""The source's half of a lease: renews it, and notices when the destination has fallen silent or given up.

The invariant: it tells of a lost destination once at most, and never of one that has answered within the bound.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from phaul_client.errors import PeerError, PeerRefused, PeerUnavailable

logger = logging.getLogger(__name__)

RENEWALS: Final = 3  # per lease
#: A destination that has not answered for so long while the tree stands still is taken for lost.
SILENCE_SECONDS: Final = 8.0
FROZEN_PAUSE_SECONDS: Final = 1.0
FROZEN_ANSWER_SECONDS: Final = 2.0
LEAST_ANSWER_SECONDS: Final = 0.5

Renew = Callable[[float], Awaitable[object]]
OnLost = Callable[[PeerError], None]


class Lease:
    """One lease, renewed from now on. `renew` has so many seconds, and raises `PeerError`."""

    def __init__(self, peer: str, seconds: float, renew: Renew, on_lost: OnLost) -> None:
        self._peer = peer
        self._seconds = seconds
        self._renew = renew
        self._on_lost = on_lost
        pause = seconds / RENEWALS
        self._task = asyncio.create_task(self._run(pause, pause, seconds), name="lease")

    def watch_closely(self) -> None:
        """The tree stands still now: `SILENCE_SECONDS` without an answer, or a whole lease, are enough."""
        self._task.cancel()
        pause = min(self._seconds / RENEWALS, FROZEN_PAUSE_SECONDS)
        bound = min(self._seconds, SILENCE_SECONDS)
        self._task = asyncio.create_task(self._run(pause, FROZEN_ANSWER_SECONDS, bound), name="lease")

    def cancel(self) -> None:
        """Let it run out."""
        self._task.cancel()

    async def _run(self, pause_seconds: float, answer_seconds: float, bound_seconds: float) -> None:
        now = asyncio.get_running_loop().time
        heard_at = now()
        while True:
            await asyncio.sleep(pause_seconds)
            left_seconds = heard_at + bound_seconds - now()
            try:
                await self._renew(min(answer_seconds, max(left_seconds, LEAST_ANSWER_SECONDS)))
                heard_at = now()
            except PeerRefused as exc:
                logger.warning("lease refused peer=%s error=%s", self._peer, exc)
                return self._on_lost(exc)
            except PeerError as exc:
                logger.warning("lease not renewed peer=%s error=%s", self._peer, exc)
                if now() - heard_at >= bound_seconds:
                    error = PeerUnavailable(
                        self._peer,
                        f"no answer for {bound_seconds:g} s",
                        remedy="is the node up, and the network between the nodes?",
                    )
                    return self._on_lost(error)
