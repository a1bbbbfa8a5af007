"""What those are told who watch migrations but have no part in them: metrics, traces.

The invariant: nothing that an observer does changes a migration; each is asked for no more than bookkeeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from phaul.v1.migrations_pb2 import Migration

if TYPE_CHECKING:
    import grpc

    from phauld.destination.incoming import Session


class Observer:
    """Watches nothing; the others override what they want to hear of."""

    def migration_started(self, migration: Migration) -> None:
        """A migration from here begins, or goes on after a restart of phauld."""

    def phase_left(self, migration: Migration, seconds: float) -> None:
        """A migration from here is about to leave its phase, in which it was for so long."""

    def migration_ended(self, migration: Migration) -> None:
        """A migration from here is over; the record is complete."""

    def session_ended(self, session: Session) -> None:
        """A migration to here is over, its last page included."""

    def call_refused(self, reason: str) -> None:
        """A call to here was refused, or failed."""

    def workload_restarted(self, *, failed: bool) -> None:
        """A workload that had ended was started again; `failed`: it could not be started."""

    def client_interceptors(self, migration_id: str) -> Sequence[grpc.aio.ClientInterceptor]:
        """Who sees the calls of a migration to its destination."""
        return ()

    def server_interceptors(self) -> Sequence[grpc.aio.ServerInterceptor]:
        """Who sees the calls that come."""
        return ()


class Observers(Observer):
    """Several."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def migration_started(self, migration: Migration) -> None:
        for each in self._observers:
            each.migration_started(migration)

    def phase_left(self, migration: Migration, seconds: float) -> None:
        for each in self._observers:
            each.phase_left(migration, seconds)

    def migration_ended(self, migration: Migration) -> None:
        for each in self._observers:
            each.migration_ended(migration)

    def session_ended(self, session: Session) -> None:
        for each in self._observers:
            each.session_ended(session)

    def call_refused(self, reason: str) -> None:
        for each in self._observers:
            each.call_refused(reason)

    def workload_restarted(self, *, failed: bool) -> None:
        for each in self._observers:
            each.workload_restarted(failed=failed)

    def client_interceptors(self, migration_id: str) -> Sequence[grpc.aio.ClientInterceptor]:
        return [found for each in self._observers for found in each.client_interceptors(migration_id)]

    def server_interceptors(self) -> Sequence[grpc.aio.ServerInterceptor]:
        return [found for each in self._observers for found in each.server_interceptors()]


NOBODY = Observer()
