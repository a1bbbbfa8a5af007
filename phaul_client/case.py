"""One migration as its source sees it through: whom it asks, where it writes, whom it tells.

All who bring a migration to its end get the same: `CriuLocal` and `PostcopyLocal`, which dump, and the recoveries.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from phaul_client.commit import Phase
from phaul_client.doubt import Doubt
from phaul_client.remote import GrpcRemote


class Journal(Protocol):
    """Where a phase is written down before it is acted on."""

    def note(self, **detail: object) -> None:
        """Keep this, as JSON, for the next `record`."""

    async def record(self, phase: Phase) -> None:
        """On return the phase and what was noted survive a crash. Raises `OSError`."""


async def nothing() -> None:
    """There is nothing to clean up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """See above."""

    migration_id: str
    remote: GrpcRemote
    journal: Journal
    doubt: Doubt = field(default_factory=Doubt)  #: what to do when the destination does not answer
    on_phase: Callable[[Phase], None] = lambda _: None  #: told of each phase that is entered
    clean_up: Callable[[], Awaitable[None]] = nothing  #: what the owner does once it is over
