"""How an attempt at a migration has ended: what its record is to say (pure)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, NamedTuple

from phaul.v1 import types_pb2
from phaul_client import commit
from phaul_client.commit import Phase
from phaul_client.errors import MigrationCancelled, OutcomeUnknown, PhaulError, RolledBack
from phaul_client.status import reason_of, remedy_of

#: An end of an attempt in these is not the end of the migration: a recovery goes on from the journal.
LEFT_TO_THE_NEXT: Final = frozenset({*commit.IN_DOUBT, Phase.FILLING, Phase.CONFIRMED, Phase.ROLLING_BACK})
#: What criu and the other node say when the pages do not come through; the pipe knows why.
_BY_A_BROKEN_STREAM: Final = frozenset({"DUMP_FAILED", "PRE_DUMP_FAILED", "PAGE_SERVER_FAILED", "INTERNAL"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One, as it stood when it ended."""

    migration_id: str
    phase: Phase | None  #: `None`: it did not come so far as to have one
    is_recovery: bool
    is_cancelled: bool  #: somebody asked for that
    has_opened: bool  #: the destination had made room
    pipe_failure: PhaulError | None
    deadline_seconds: float

    @property
    def has_not_begun(self) -> bool:
        """A recovery that could not even get at its connection: nothing has become of the tree yet."""
        return self.is_recovery and self.phase is None

    @property
    def is_left(self) -> bool:
        """Another attempt follows."""
        return self.has_not_begun or self.phase in LEFT_TO_THE_NEXT


class Ending(NamedTuple):
    """What is told of it."""

    phase: types_pb2.MigrationPhase.ValueType
    error: BaseException


def ending(attempt: Attempt, error: BaseException) -> Ending | None:
    """Of an attempt that an error has ended; `None`: there is nothing to tell, the next one goes on."""
    if attempt.phase in commit.IN_DOUBT:
        return Ending(types_pb2.MIGRATION_PHASE_HELD, OutcomeUnknown(attempt.migration_id))
    if attempt.is_left:
        return None
    if attempt.is_cancelled or isinstance(error, MigrationCancelled):
        return Ending(types_pb2.MIGRATION_PHASE_CANCELLED, MigrationCancelled(attempt.migration_id))
    if not attempt.has_opened:
        return Ending(types_pb2.MIGRATION_PHASE_REFUSED, _told(attempt, error))
    return Ending(types_pb2.MIGRATION_PHASE_ROLLED_BACK, _told(attempt, error))


def _told(attempt: Attempt, error: BaseException) -> BaseException:
    """The error in words that help."""
    if attempt.pipe_failure is not None and reason_of(error) in _BY_A_BROKEN_STREAM:
        return attempt.pipe_failure
    if isinstance(error, asyncio.CancelledError):
        return MigrationCancelled(attempt.migration_id)
    if isinstance(error, TimeoutError):
        message = f"not done after {attempt.deadline_seconds:g} s"
        return PhaulError(message, reason="DEADLINE_EXCEEDED", remedy="a longer --deadline")
    return error


def why_rolled_back(migration_id: str, cause: BaseException | None) -> RolledBack:
    """Of a recovery: the destination's reason, or whoever spoke for it; else that phauld was started anew."""
    if cause is not None:
        return RolledBack(migration_id, str(cause), reason=reason_of(cause), remedy=remedy_of(cause))
    message = "phauld was restarted in the middle; the process runs on here"
    return RolledBack(migration_id, message, reason="DAEMON_RESTARTED", remedy="try again")
