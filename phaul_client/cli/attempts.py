"""Whether `phaul migrate` tries again by itself (pure).

It does where the tree runs on at its source, and what was in the way is over in a moment: a program that looked at
itself in /proc just then, as many do now and then, for their memory or their threads.
"""

import re
from typing import Final

from phaul.v1 import types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli.outcomes import Outcome, outcome_of

DEFAULT_ATTEMPTS: Final = 3
PAUSE_SECONDS: Final = 0.3
_OPEN_IN_PROC: Final = "process-file"  #: a code of preflight
_NOT_THERE: Final = re.compile(r"Can't open file proc/\d+/")  # criu/files-reg.c, at the destination


def is_over_soon(migration: Migration) -> bool:
    """Whether this end of a migration is of that kind."""
    match outcome_of(migration):
        case Outcome.REFUSED:
            errors = {each.code for each in migration.problems if each.severity == types_pb2.SEVERITY_ERROR}
            return errors == {_OPEN_IN_PROC}
        case Outcome.ROLLED_BACK:
            of_restore = migration.error.reason == types_pb2.ERROR_REASON_RESTORE_FAILED
            return of_restore and _NOT_THERE.search(migration.error.message) is not None
    return False
