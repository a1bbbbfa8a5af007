"""Messages of the API as text for people. Pure: message in, text out."""

import shlex
from collections.abc import Iterable, Sequence
from typing import Final

from phaul.v1 import migrations_pb2, node_pb2, types_pb2
from phaul.v1.migrations_pb2 import Migration, SyncedDirectory
from phaul_client.cli.json_output import enum_word
from phaul_client.cli.outcomes import Outcome, outcome_of
from phaul_client.cli.text import duration, fact_lines, format_age, local_time, plural, shorten, table, with_reason
from phaul_client.cli.units import format_bytes, format_rate, format_seconds
from phaul_client.cli.visible import visible

SHORTEST_ID: Final = 8
#: Bytes on the network are told when they are fewer than this share of the pages.
SMALLER: Final = 0.9
#: In `Migration.page_stream`: there is something to say.
NOT_AS_USUAL: Final = ("checksums", "TLS")
COMMAND_WIDTH: Final = 60
SHOWN_PATHS: Final = 3

_PHASES: Final = types_pb2.DESCRIPTOR.enum_types_by_name["MigrationPhase"]
_MODES: Final = types_pb2.DESCRIPTOR.enum_types_by_name["Mode"]
RESTORE_MODES: Final = types_pb2.DESCRIPTOR.enum_types_by_name["RestoreMode"]
_RESOLUTIONS: Final = migrations_pb2.DESCRIPTOR.enum_types_by_name["Resolution"]
_STATES: Final = node_pb2.DESCRIPTOR.enum_types_by_name["WorkloadState"]

SEVERITY_MARKS: Final = {
    types_pb2.SEVERITY_ERROR: "ERROR",
    types_pb2.SEVERITY_WARNING: "warning",
    types_pb2.SEVERITY_INFO: "info",
}
_ENDINGS: Final = {
    Outcome.ROLLED_BACK: "rolled back: {what} runs on here",
    Outcome.REFUSED: "refused: nothing was touched",
    Outcome.CANCELLED: "cancelled: {what} runs on here",
    Outcome.IN_DOUBT: "in doubt: {what} is stopped here until it is known whether it runs at {where}",
    Outcome.FAILED: "failed: {what} runs nowhere",
}


def phase_word(migration: Migration) -> str:
    """Its phase: "copying-images"."""
    return enum_word(_PHASES, migration.phase) or "-"


def mode_word(mode: int) -> str:
    """A mode: "pre-copy"; "-" if not known yet."""
    return enum_word(_MODES, mode) or "-"


def subject(migration: Migration) -> str:
    """What moves, for the middle of a sentence."""
    if migration.workload:
        return visible(migration.workload)
    name = f" ({migration.process_name})" if migration.process_name else ""
    return visible(f"process {migration.pid}{name}")


def destination(migration: Migration) -> str:
    """Where it goes: by name if that is known."""
    return visible(migration.destination.node_name or migration.destination_address)


# Workloads


def workload_state(workload: node_pb2.Workload, now_seconds: float | None = None) -> str:
    """Where it stands, with how it ended, where it went, or when it is started again."""
    word = enum_word(_STATES, workload.state) or "-"
    if workload.state == node_pb2.WORKLOAD_STATE_EXITED:
        return f"{word} ({_how(workload)})"
    if workload.state == node_pb2.WORKLOAD_STATE_MOVED and workload.moved_to:
        return f"moved to {workload.moved_to}"
    if workload.state == node_pb2.WORKLOAD_STATE_RESTARTING:
        if now_seconds is not None and workload.restart_at.seconds > now_seconds:
            word = f"{word} in {workload.restart_at.seconds - now_seconds:.0f}s"
        return f"{word} ({_how(workload)})" if workload.HasField("exit_status") else word
    return word


def _how(workload: node_pb2.Workload) -> str:
    how = ending(workload.exit_status)
    return f"{how}: {visible(workload.start_error)}" if workload.start_error else how


def ending(status: node_pb2.ExitStatus) -> str:
    """How a process ended: "status 3", "signal 9"."""
    if status.WhichOneof("how") == "signal":
        return f"signal {status.signal}"
    return f"status {status.exit_code}"


def workload_table(workloads: Iterable[node_pb2.Workload], now_seconds: float) -> str:
    """`phaul ps`. `now_seconds` since the epoch. How often they were restarted is told where that may happen."""
    shown = list(workloads)
    counted = any(each.restarts or each.spec.HasField("restart") for each in shown)
    rows = [
        (
            each.name,
            str(each.pid) if each.pid else "-",
            workload_state(each, now_seconds),
            format_age(now_seconds - each.started_at.seconds) if each.started_at.seconds else "-",
            *([str(each.restarts)] if counted else []),
            shorten(" ".join(shlex.join(each.spec.argv).split()), COMMAND_WIDTH),  # a program in an argument has lines
        )
        for each in shown
    ]
    restarts = ("RESTARTS",) if counted else ()
    return table(("NAME", "PID", "STATE", "SINCE", *restarts, "COMMAND"), rows)


# Migrations


def short_ids(ids: Sequence[str]) -> list[str]:
    """Each as short as it can be without being taken for another."""
    length = SHORTEST_ID
    while len({each[:length] for each in ids}) < len(set(ids)):
        length += 1
    return [each[:length] for each in ids]


def migration_table(migrations: Sequence[Migration], now_seconds: float) -> str:
    """`phaul status`. `now_seconds` since the epoch."""
    rows = [
        (
            short_id,
            phase_word(each) + (" (in doubt)" if each.in_doubt else ""),
            shorten(each.workload or f"{each.pid} {each.process_name}".strip(), 24),
            shorten(destination(each), 32),
            mode_word(each.mode),
            duration(each.pause) if each.HasField("pause") else "-",
            format_bytes(each.bytes_sent),
            format_age(now_seconds - each.created_at.seconds),
        )
        for short_id, each in zip(short_ids([each.migration_id for each in migrations]), migrations, strict=True)
    ]
    return table(("ID", "PHASE", "WHAT", "TO", "MODE", "PAUSE", "SENT", "AGE"), rows)


def progress_line(migration: Migration) -> str:
    """One line about a migration under way."""
    parts = [phase_word(migration)]
    if migration.rounds:
        parts.append(plural(len(migration.rounds), "round"))
    if migration.bytes_sent:
        total = f" of {format_bytes(migration.bytes_total)}" if migration.bytes_total > migration.bytes_sent else ""
        parts.append(f"{format_bytes(migration.bytes_sent)}{total}")
    if migration.rate_bytes_per_second:
        parts.append(format_rate(migration.rate_bytes_per_second))
    if migration.HasField("pause"):
        parts.append(f"pause {duration(migration.pause)}")
    elif migration.HasField("expected_pause"):
        parts.append(f"expected pause {duration(migration.expected_pause)}")
    if migration.pages_missing:
        parts.append(f"{migration.pages_missing} pages to come")
    return ", ".join(parts)


def summary(migration: Migration) -> str:
    """How it ended, or how it stands: what `phaul migrate` says last."""
    outcome = outcome_of(migration)
    if outcome is Outcome.MOVED:
        at = f" as pid {migration.destination_pid}" if migration.destination_pid else ""
        headline = f"moved {subject(migration)} to {destination(migration)}{at}"
    elif outcome is None:
        headline = f"moving {subject(migration)} to {destination(migration)}: {progress_line(migration)}"
    else:
        headline = _ENDINGS[outcome].format(what=subject(migration), where=destination(migration))
    return "\n".join([headline, *fact_lines(_measured(migration))])


def _measured(migration: Migration) -> list[tuple[str, str]]:
    pause = duration(migration.pause) if migration.HasField("pause") else ""
    if migration.HasField("expected_pause"):
        expected = duration(migration.expected_pause)
        pause = f"{pause} (expected {expected})" if pause else f"expected {expected}"
    fewer = 0 < migration.wire_bytes < SMALLER * migration.bytes_sent
    wire = f" ({format_bytes(migration.wire_bytes)} on the network)" if fewer else ""
    sent = (
        f", {format_bytes(migration.bytes_sent)}{wire} in {plural(len(migration.rounds), 'round')}"
        if migration.rounds
        else ""
    )
    return [
        ("pause", pause),
        ("total", f"{duration(migration.total)}{sent}" if migration.HasField("total") else ""),
        *(("files", _synced(each)) for each in migration.synced),
        ("mode", with_reason(mode_word(migration.mode), migration.mode_reason)),
        (
            "restore",
            with_reason(enum_word(RESTORE_MODES, migration.restore_mode) or "-", migration.restore_mode_reason),
        ),
        ("images", visible(migration.images_place)),
        ("pages", migration.page_stream if any(each in migration.page_stream for each in NOT_AS_USUAL) else ""),
        ("id", migration.migration_id),
    ]


def _synced(each: SyncedDirectory) -> str:
    before = f"{plural(each.files, 'file')}, {format_bytes(each.bytes)} of {each.directory}"
    if not each.freeze_files:
        return f"{before}, nothing in the freeze"
    shown = ", ".join(each.freeze_paths[:SHOWN_PATHS]) + (", …" if each.freeze_files > SHOWN_PATHS else "")
    return f"{before}; in the freeze {plural(each.freeze_files, 'file')}, {format_bytes(each.freeze_bytes)}: {shown}"


def migration_details(migration: Migration) -> str:
    """`phaul status ID`: everything that is known, without the error, which is told as errors are."""
    parts = [
        summary(migration),
        *fact_lines(
            [
                ("status", migration.status_text),
                ("from", f"{migration.source.node_name} pid {migration.pid}"),
                ("to", migration.destination_address),
                ("started", local_time(migration.created_at)),
                ("ended", local_time(migration.finished_at) if migration.finished_at.seconds else ""),
                (
                    "resolved",
                    f"by an operator: {enum_word(_RESOLUTIONS, migration.resolution)}" * bool(migration.resolution),
                ),
            ]
        ),
    ]
    if migration.rounds:
        parts += ["", rounds_table(migration.rounds), *([migration.rounds_reason] if migration.rounds_reason else [])]
    if migration.timeline:
        parts += ["", "the freeze, step by step:", timeline_table(migration.timeline)]
    if migration.problems:
        parts += ["", problem_lines(migration.problems)]
    return "\n".join(parts).rstrip()


def rounds_table(rounds: Iterable[types_pb2.RoundStats]) -> str:
    """What each round did."""
    rows = [
        (
            f"{each.index}{' final' if each.final else ''}",
            str(each.pages_written),
            str(each.pages_skipped_parent),
            format_bytes(each.bytes_sent),
            duration(each.duration),
            duration(each.frozen),
            format_rate(each.bandwidth_bytes_per_second) if each.bandwidth_bytes_per_second else "-",
            format_rate(each.dirty_rate_bytes_per_second) if each.dirty_rate_bytes_per_second else "-",
            f"{each.throttle_percent} %" if each.throttle_percent else "-",
            duration(each.expected_pause) if each.HasField("expected_pause") else "-",
        )
        for each in rounds
    ]
    return table(
        ("ROUND", "PAGES", "SKIPPED", "SENT", "TOOK", "FROZEN", "RATE", "DIRTIED", "HELD BACK", "EXPECTED PAUSE"), rows
    )


def timeline_table(steps: Iterable[types_pb2.TimelineStep]) -> str:
    """The parts of the freeze."""
    rows = [
        (
            each.name,
            each.node_name,
            duration(each.start),
            duration(each.end) if each.HasField("end") else "-",
            format_seconds((each.end.ToNanoseconds() - each.start.ToNanoseconds()) / 1e9)
            if each.HasField("end")
            else "-",
        )
        for each in steps
    ]
    return table(("STEP", "NODE", "FROM", "TO", "TOOK"), rows)


# Problems


def problem_lines(problems: Iterable[types_pb2.Problem]) -> str:
    """One problem a line, its remedy below."""
    lines = []
    for each in problems:
        about = f"{each.subject}: " if each.subject and each.subject not in each.message else ""
        at = f" [{each.node_name}]" if each.node_name else ""
        lines.append(f"{SEVERITY_MARKS.get(each.severity, '?'):<7} {each.code}{at}: {about}{each.message}")
        if each.remedy:
            lines.append(f"          remedy: {each.remedy}")
    return "\n".join(lines)
