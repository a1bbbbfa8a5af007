"""Between plain values and the messages of phaul.v1 (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from google.protobuf import duration_pb2, json_format, timestamp_pb2

from phaul.v1 import remote_pb2, types_pb2
from phaul_client import commit
from phaul_client.client import RoundEnded
from phaul_client.errors import InvalidRequest, PhaulError
from phaul_client.pipe_choice import COMPRESSION_VALUES, PipeChoice
from phaul_client.policy import Iterate, Verdict
from phaul_client.rounds import PAGE_SIZE_BYTES, usable
from phaul_client.status import log_tail_of, reason_of, remedy_of, text_of
from phaul_criu.stats import DumpStats
from phauld import session
from phauld.trees.restart_policy import Attempts, Restart, When
from phauld.trees.workload_spec import UNLIMITED, CgroupLimits, WorkloadSpec

LOG_TAIL_LINES: Final = 20
MAX_DURATION_SECONDS: Final = 315_576_000_000.0  # google/protobuf/duration.proto
_REASONS: Final = {name.removeprefix("ERROR_REASON_"): value for name, value in types_pb2.ErrorReason.items()}


def duration(seconds: float) -> duration_pb2.Duration:
    """A Duration, to the microsecond; the longest there is for what has no end."""
    message = duration_pb2.Duration()
    within = seconds if abs(seconds) <= MAX_DURATION_SECONDS else math.copysign(MAX_DURATION_SECONDS, seconds)
    message.FromMicroseconds(round(within * 1e6))
    return message


def seconds_of(message: duration_pb2.Duration) -> float:
    return message.ToMicroseconds() / 1e6


def timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    """A Timestamp of seconds since the epoch, to the microsecond."""
    message = timestamp_pb2.Timestamp()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def migration_phase(phase: commit.Phase) -> types_pb2.MigrationPhase.ValueType:
    return types_pb2.MigrationPhase.Value(f"MIGRATION_PHASE_{phase}")


def session_phase(phase: session.Phase) -> types_pb2.SessionPhase.ValueType:
    """Raises `ValueError` for ABSENT, which is never told."""
    return types_pb2.SessionPhase.Value(f"SESSION_PHASE_{phase}")


def failure(error: BaseException) -> types_pb2.Failure:
    """An error as a record of it. A reason that only a newer peer knows is UNSPECIFIED."""
    return types_pb2.Failure(
        reason=_REASONS.get(reason_of(error), types_pb2.ERROR_REASON_UNSPECIFIED),
        message=text_of(error),
        remedy=remedy_of(error),
        log_tail=log_tail_of(error).splitlines()[-LOG_TAIL_LINES:],
    )


def error(recorded: Mapping[str, object]) -> PhaulError:
    """The error of a `failure` that was written down as JSON."""
    found = json_format.ParseDict(dict(recorded), types_pb2.Failure(), ignore_unknown_fields=True)
    reason = next((name for name, value in _REASONS.items() if value == found.reason and value), "")
    return PhaulError(found.message, reason=reason, remedy=found.remedy)


def round_message(index: int, ended: RoundEnded, bandwidth: float) -> types_pb2.RoundStats:
    stats, forecast = ended.stats, ended.verdict.forecast
    return types_pb2.RoundStats(
        index=index,
        pages_scanned=stats.pages_scanned,
        pages_written=stats.pages_written,
        pages_skipped_parent=stats.pages_skipped_parent,
        bytes_sent=stats.bytes_sent,
        duration=duration(stats.duration_seconds),
        frozen=duration(stats.frozen_seconds),
        bandwidth_bytes_per_second=round(usable(bandwidth)),
        dirty_rate_bytes_per_second=round(usable(forecast.dirty_rate_bytes_per_second)) if forecast else 0,
        expected_pause=duration(forecast.expected_pause_seconds) if forecast else None,
        throttle_percent=stats.throttle_percent,
    )


def last_round_message(index: int, stats: DumpStats) -> types_pb2.RoundStats:
    """The last dump, as a round."""
    bytes_sent, seconds = stats.pages_written * PAGE_SIZE_BYTES, stats.memwrite_microseconds / 1e6
    return types_pb2.RoundStats(
        index=index,
        final=True,
        pages_scanned=stats.pages_scanned,
        pages_written=stats.pages_written,
        pages_skipped_parent=stats.pages_skipped_parent,
        bytes_sent=bytes_sent,
        duration=duration(stats.memdump_microseconds / 1e6),
        frozen=duration(stats.frozen_microseconds / 1e6),
        bandwidth_bytes_per_second=round(bytes_sent / seconds) if seconds else 0,
    )


def rounds_reason(verdict: Verdict) -> str:
    """Why the rounds ended, as a word of the policy and as a sentence; empty while they go on."""
    return "" if isinstance(verdict, Iterate) else f"{verdict.reason}: {verdict.reason.sentence}"


def workload_message(spec: WorkloadSpec) -> types_pb2.WorkloadSpec:
    return types_pb2.WorkloadSpec(
        name=spec.name,
        argv=spec.argv,
        env=spec.env,
        working_directory=spec.cwd,
        log_path=spec.log_path,
        own_pid_namespace=spec.new_pid_namespace,
        own_time_namespace=spec.new_time_namespace,
        user=spec.user,
        limits=spec.limits,
        own_ipc_namespace=spec.new_ipc_namespace,
        restart=restart_message(spec.restart),
        cgroup_limits=cgroup_message(spec.cgroup),
    )


def workload_spec(message: types_pb2.WorkloadSpec) -> WorkloadSpec:
    """Raises `InvalidRequest` for a bad name."""
    return WorkloadSpec(
        name=message.name,
        argv=tuple(message.argv),
        env=dict(message.env),
        cwd=message.working_directory or "/",
        log_path=message.log_path,
        new_pid_namespace=message.own_pid_namespace if message.HasField("own_pid_namespace") else True,
        new_time_namespace=message.own_time_namespace,
        user=message.user,
        limits=dict(message.limits),
        new_ipc_namespace=message.own_ipc_namespace,
        restart=restart(message.restart),
        cgroup=cgroup(message.cgroup_limits),
    )


def cgroup_message(limits: CgroupLimits) -> types_pb2.CgroupLimits | None:
    """`None`: none, as phaulds say that know no such limits."""
    if limits == UNLIMITED:
        return None
    return types_pb2.CgroupLimits(memory_bytes=limits.memory_bytes, cpu_millis=limits.cpu_millis, pids=limits.pids)


def cgroup(message: types_pb2.CgroupLimits) -> CgroupLimits:
    return CgroupLimits(memory_bytes=message.memory_bytes, cpu_millis=message.cpu_millis, pids=message.pids)


_RESTART_MODES: Final = {
    When.NO: types_pb2.RESTART_MODE_NO,
    When.ON_FAILURE: types_pb2.RESTART_MODE_ON_FAILURE,
    When.ALWAYS: types_pb2.RESTART_MODE_ALWAYS,
}


def restart_message(told: Restart) -> types_pb2.RestartPolicy | None:
    """`None`: never, as phaulds say that know no restarts."""
    if told.when is When.NO:
        return None
    return types_pb2.RestartPolicy(mode=_RESTART_MODES[told.when], max_restarts=told.most)


def restart(message: types_pb2.RestartPolicy) -> Restart:
    """Raises `InvalidRequest`."""
    if message.mode == types_pb2.RESTART_MODE_UNSPECIFIED:
        when = When.NO
    else:
        found = [each for each, mode in _RESTART_MODES.items() if mode == message.mode]
        if not found:
            raise InvalidRequest(f"restart mode {message.mode} is unknown here", remedy="a newer phauld")
        when = found[0]
    if message.max_restarts and when is not When.ON_FAILURE:
        raise InvalidRequest("a number of restarts is for on-failure only", remedy=f"on-failure:{message.max_restarts}")
    return Restart(when=when, most=message.max_restarts)


def restart_count(attempts: Attempts) -> remote_pb2.RestartCount:
    return remote_pb2.RestartCount(total=attempts.restarts, in_a_row=attempts.in_a_row)


def attempts(message: remote_pb2.RestartCount) -> Attempts:
    return Attempts(restarts=message.total, in_a_row=message.in_a_row)


def page_pipe(choice: PipeChoice) -> types_pb2.PagePipe | None:
    """`None`: no pipe."""
    if not choice.uses_pipe:
        return None
    return types_pb2.PagePipe(
        compression=COMPRESSION_VALUES[choice.compression], tls=choice.tls, kernel_tls=choice.kernel_tls
    )
