"""What `phaul migrate` tries again."""

import pytest

from phaul.v1 import types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli.attempts import is_over_soon

REFUSED, ROLLED_BACK = types_pb2.MIGRATION_PHASE_REFUSED, types_pb2.MIGRATION_PHASE_ROLLED_BACK
RESTORE_FAILED = types_pb2.ERROR_REASON_RESTORE_FAILED


def problem(code: str, severity: types_pb2.Severity.ValueType = types_pb2.SEVERITY_ERROR) -> types_pb2.Problem:
    return types_pb2.Problem(code=code, severity=severity)


def failed(reason: types_pb2.ErrorReason.ValueType, message: str) -> types_pb2.Failure:
    return types_pb2.Failure(reason=reason, message=message)


OPEN = "b: criu restore: criu failed: Can't open file proc/30/stat on restore: No such file or directory"


@pytest.mark.parametrize(
    ("migration", "again"),
    [
        (Migration(phase=REFUSED, problems=[problem("process-file")]), True),
        (Migration(phase=REFUSED, problems=[problem("process-file"), problem("x", types_pb2.SEVERITY_INFO)]), True),
        (Migration(phase=REFUSED, problems=[problem("process-file"), problem("terminal")]), False),
        (Migration(phase=REFUSED), False),
        (Migration(phase=ROLLED_BACK, error=failed(RESTORE_FAILED, OPEN)), True),
        (Migration(phase=ROLLED_BACK, error=failed(RESTORE_FAILED, OPEN.replace("proc/30", "srv/30"))), False),
        (Migration(phase=ROLLED_BACK, error=failed(types_pb2.ERROR_REASON_DUMP_FAILED, OPEN)), False),
        (Migration(phase=ROLLED_BACK), False),
        (Migration(phase=types_pb2.MIGRATION_PHASE_HELD, error=failed(RESTORE_FAILED, OPEN)), False),
        (Migration(phase=types_pb2.MIGRATION_PHASE_CANCELLED, error=failed(RESTORE_FAILED, OPEN)), False),
        (Migration(phase=types_pb2.MIGRATION_PHASE_DONE), False),
    ],
)
def test_only_what_is_over_in_a_moment_and_left_the_tree_at_its_source(migration: Migration, again: bool) -> None:
    assert is_over_soon(migration) is again
