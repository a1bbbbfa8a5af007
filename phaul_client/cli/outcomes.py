"""How a migration ended, and the exit code of every ending: one table, shown by `phaul --help`. Pure."""

import enum
from typing import Final

from phaul.v1 import types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.errors import PhaulError


class ExitCode(enum.IntEnum):
    """What the shell sees."""

    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    ROLLED_BACK = 4
    IN_DOUBT = 5
    UNREACHABLE = 6
    INTERRUPTED = 130


MEANINGS: Final = {
    ExitCode.OK: "done; the process has moved",
    ExitCode.FAILED: "anything else went wrong",
    ExitCode.USAGE: "the command line or the request is wrong",
    ExitCode.REFUSED: "refused before anything froze; nothing has changed",
    ExitCode.ROLLED_BACK: "rolled back or cancelled; the process runs on here",
    ExitCode.IN_DOUBT: "in doubt: stopped here until the destination has answered",
    ExitCode.UNREACHABLE: "no answer from phauld, or from the destination at the start",
    ExitCode.INTERRUPTED: "interrupted; a migration goes on by itself",
}


class Outcome(enum.StrEnum):
    """How a migration ended."""

    MOVED = "moved"
    ROLLED_BACK = "rolled-back"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    IN_DOUBT = "in-doubt"
    FAILED = "failed"


_OUTCOMES: Final = {
    types_pb2.MIGRATION_PHASE_DONE: Outcome.MOVED,
    types_pb2.MIGRATION_PHASE_ROLLED_BACK: Outcome.ROLLED_BACK,
    types_pb2.MIGRATION_PHASE_REFUSED: Outcome.REFUSED,
    types_pb2.MIGRATION_PHASE_CANCELLED: Outcome.CANCELLED,
    types_pb2.MIGRATION_PHASE_HELD: Outcome.IN_DOUBT,
    types_pb2.MIGRATION_PHASE_FAILED: Outcome.FAILED,
}
_EXIT_CODES: Final = {
    Outcome.MOVED: ExitCode.OK,
    Outcome.ROLLED_BACK: ExitCode.ROLLED_BACK,
    Outcome.REFUSED: ExitCode.REFUSED,
    Outcome.CANCELLED: ExitCode.ROLLED_BACK,
    Outcome.IN_DOUBT: ExitCode.IN_DOUBT,
    Outcome.FAILED: ExitCode.FAILED,
}
_EXIT_CODES_OF_REASONS: Final = {
    "INVALID_ARGUMENT": ExitCode.USAGE,
    **dict.fromkeys(
        (
            "UNAUTHORIZED",
            "PID_NOT_FOUND",
            "KERNEL_THREAD",
            "PREFLIGHT_FAILED",
            "PEER_INCOMPATIBLE",
            "NODE_MISMATCH",
            "CRIU_MISSING",
            "CRIU_TOO_OLD",
            "WORKLOAD_NOT_FOUND",
            "WORKLOAD_EXISTS",
            "MIGRATION_EXISTS",
            "TOO_MANY_MIGRATIONS",
        ),
        ExitCode.REFUSED,
    ),
    "OUTCOME_UNKNOWN": ExitCode.IN_DOUBT,
    "PEER_UNREACHABLE": ExitCode.UNREACHABLE,
}


def outcome_of(migration: Migration) -> Outcome | None:
    """How it ended; `None` while it goes on. A held one counts as ended: nobody knows when it will be answered."""
    return _OUTCOMES.get(migration.phase)


def exit_code_of(migration: Migration) -> ExitCode:
    """The exit code for a migration that has ended; 0 for one that goes on."""
    outcome = outcome_of(migration)
    if outcome is None:
        return ExitCode.OK
    if outcome is Outcome.REFUSED and migration.error.reason == types_pb2.ERROR_REASON_PEER_UNREACHABLE:
        return ExitCode.UNREACHABLE
    return _EXIT_CODES[outcome]


def exit_code_of_error(error: PhaulError) -> ExitCode:
    """The exit code for a call that failed."""
    return _EXIT_CODES_OF_REASONS.get(error.reason, ExitCode.FAILED)


def is_refusal(error: PhaulError) -> bool:
    """True if the error means that nothing was begun because something stands in the way."""
    return exit_code_of_error(error) in (ExitCode.REFUSED, ExitCode.USAGE)


def failure_of(migration: Migration) -> types_pb2.Failure | None:
    """Why it did not move the process; `None` if it did, or goes on."""
    outcome = outcome_of(migration)
    if migration.HasField("error") and outcome is not Outcome.MOVED:
        return migration.error
    if outcome is Outcome.CANCELLED:
        return types_pb2.Failure(reason=types_pb2.ERROR_REASON_CANCELLED, message="cancelled on request")
    if outcome is Outcome.IN_DOUBT:
        return types_pb2.Failure(
            reason=types_pb2.ERROR_REASON_OUTCOME_UNKNOWN,
            message="the destination does not answer: nobody knows whether the process runs there",
            remedy=f"bring it back; if it is gone for good, see phaul resolve --help ({migration.migration_id})",
        )
    first = next((each for each in migration.problems if each.severity == types_pb2.SEVERITY_ERROR), None)
    if outcome is Outcome.REFUSED and first is not None:
        return types_pb2.Failure(
            reason=types_pb2.ERROR_REASON_PREFLIGHT_FAILED, message=first.message, remedy=first.remedy
        )
    return None
