"""Messages of the API as JSON for programs. Pure.

One rule for all: names as in the API, `Duration` as a number of milliseconds under `…_ms`, `Timestamp` as ISO 8601 in
UTC, enums as lower-case words ("pre-copy", but error reasons as they are), bytes as hex, and null for what is not
known.
"""

import json
from typing import Any, Final

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from phaul.v1.migrations_pb2 import Migration
from phaul.v1.types_pb2 import DESCRIPTOR, Failure
from phaul_client.cli.outcomes import failure_of, outcome_of
from phaul_client.errors import PhaulError

_REASONS: Final = DESCRIPTOR.enum_types_by_name["ErrorReason"]


def to_line(value: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def milliseconds(duration: Duration) -> float:
    """A duration in milliseconds, exact to the microsecond."""
    return round(duration.ToNanoseconds() / 1e6, 3)


def to_json(message: Message) -> dict[str, Any]:
    """Any message of the API."""
    # The descriptors of fields have one class in Python and another in C, without a common type: Any.
    return dict(_entry(message, field) for field in message.DESCRIPTOR.fields)


def _entry(message: Message, field: Any) -> tuple[str, Any]:
    is_duration = field.message_type is not None and field.message_type.full_name == Duration.DESCRIPTOR.full_name
    name = f"{field.name}_ms" if is_duration else field.name
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return name, dict(sorted(value.items()))
    if field.is_repeated:
        return name, [_value(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return name, None
    return name, _value(value, field)


def _value(value: Any, field: Any) -> Any:
    match value:
        case Duration():
            return milliseconds(value)
        case Timestamp():
            return value.ToJsonString()
        case Message():
            return to_json(value)
        case bytes():
            return value.hex()
    return enum_word(field.enum_type, value) if field.enum_type is not None else value


def enum_word(enum: EnumDescriptor, number: int) -> str | None:
    """The word for a value of an enum; `None` for "not known". A value of a later version is its number."""
    if number == 0:
        return None
    if number not in enum.values_by_number:
        return str(number)
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    name = enum.values_by_number[number].name.removeprefix(prefix)
    return name if enum.name == _REASONS.name else name.lower().replace("_", "-")


def error_json(error: PhaulError) -> dict[str, Any]:
    """A call that failed."""
    return {"error": {"reason": error.reason, "message": error.message, "remedy": error.remedy}}


def failure_json(failure: Failure) -> dict[str, Any]:
    """Why a migration failed."""
    reason = enum_word(_REASONS, failure.reason)
    return {"reason": reason, "message": failure.message, "remedy": failure.remedy, "log_tail": list(failure.log_tail)}


def migration_json(migration: Migration) -> dict[str, Any]:
    """A migration as it stands; `outcome` is null while it goes on."""
    fields = to_json(migration)
    outcome, failure = outcome_of(migration), failure_of(migration)
    return {
        "migration_id": migration.migration_id,
        "outcome": None if outcome is None else str(outcome),
        "phase": fields["phase"],
        "status_text": migration.status_text,
        "mode": fields["mode"],
        "mode_reason": migration.mode_reason,
        "restore_mode": fields["restore_mode"],
        "restore_mode_reason": migration.restore_mode_reason,
        "pause_ms": fields["pause_ms"],
        "expected_pause_ms": fields["expected_pause_ms"],
        "total_ms": fields["total_ms"],
        "bytes": migration.bytes_sent,
        "bytes_total": migration.bytes_total,
        "page_stream": migration.page_stream,
        "wire_bytes": migration.wire_bytes,
        "rounds": fields["rounds"],
        "rounds_reason": migration.rounds_reason,
        "images_place": migration.images_place,
        "workload": migration.workload,
        "process_name": migration.process_name,
        "source_pid": migration.pid,
        "destination_pid": migration.destination_pid or None,
        "source": migration.source.node_name,
        "destination": migration.destination_address,
        "destination_name": migration.destination.node_name,
        "error": None if failure is None else failure_json(failure),
        "problems": fields["problems"],
        "timeline": fields["timeline"],
        "in_doubt": migration.in_doubt,
        "resolution": fields["resolution"],
        "synced": fields["synced"],
        "options": fields["options"],
        "created_at": fields["created_at"],
        "finished_at": fields["finished_at"],
    }


def progress_json(migration: Migration) -> dict[str, Any]:
    """One snapshot of a migration under way."""
    fields = to_json(migration)
    return {
        "event": "progress",
        "migration_id": migration.migration_id,
        "phase": fields["phase"],
        "status_text": migration.status_text,
        "bytes": migration.bytes_sent,
        "bytes_total": migration.bytes_total,
        "rate_bytes_per_second": migration.rate_bytes_per_second,
        "rounds": len(migration.rounds),
        "expected_pause_ms": fields["expected_pause_ms"],
        "pause_ms": fields["pause_ms"],
        "total_ms": fields["total_ms"],
        "pages_missing": migration.pages_missing,
        "in_doubt": migration.in_doubt,
    }


def report_json(migration: Migration) -> dict[str, Any]:
    """The last line about a migration."""
    return {"event": "report", **migration_json(migration)}
