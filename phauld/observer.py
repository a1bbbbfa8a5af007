"""What those are told who watch migrations but have no part in them: metrics, for instance.

The invariant: nothing that an observer does changes a migration; each is asked for no more than bookkeeping.
"""

from typing import TYPE_CHECKING

from phaul.v1.migrations_pb2 import Migration

if TYPE_CHECKING:
    from phauld.incoming import Session


class Observer:
    """Watches nothing; the others override what they want to hear of."""

    def phase_left(self, migration: Migration, seconds: float) -> None:
        """A migration from here is about to leave its phase, in which it was for so long."""

    def migration_ended(self, migration: Migration) -> None:
        """A migration from here is over; the record is complete."""

    def session_ended(self, session: "Session") -> None:
        """A migration to here is over, its last page included."""


NOBODY = Observer()
