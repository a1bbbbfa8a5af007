"""The only file that knows both phaul's errors and gRPC's status.

An error goes over the wire as a canonical code with a `google.rpc.ErrorInfo` (reason from `ErrorReason`, domain
`phaul.v1`, metadata with remedy and log tail) and comes out on the other side as a `PeerError` with the same reason.
"""

import errno
import re
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from phaul.v1 import types_pb2
from phaul_client.errors import PeerError, PeerRefused, PeerUnavailable, PhaulError
from phaul_criu import errors as criu_errors

DOMAIN: Final = "phaul.v1"
#: gRPC's trailing metadata must stay below 8 KiB in all. A message is in it twice, once with odd bytes as %XX.
MAX_MESSAGE_BYTES: Final = 800
MAX_REMEDY_BYTES: Final = 800
MAX_LOG_BYTES: Final = 2000

_CODES: Final = {
    "INVALID_ARGUMENT": code_pb2.INVALID_ARGUMENT,
    "UNAUTHORIZED": code_pb2.PERMISSION_DENIED,
    "TOKEN_INVALID": code_pb2.PERMISSION_DENIED,
    "PID_NOT_FOUND": code_pb2.NOT_FOUND,
    "MIGRATION_NOT_FOUND": code_pb2.NOT_FOUND,
    "WORKLOAD_NOT_FOUND": code_pb2.NOT_FOUND,
    "MIGRATION_EXISTS": code_pb2.ALREADY_EXISTS,
    "WORKLOAD_EXISTS": code_pb2.ALREADY_EXISTS,
    "TOO_MANY_MIGRATIONS": code_pb2.RESOURCE_EXHAUSTED,
    "NO_SPACE": code_pb2.RESOURCE_EXHAUSTED,
    "NO_MEMORY": code_pb2.RESOURCE_EXHAUSTED,
    "PEER_UNREACHABLE": code_pb2.UNAVAILABLE,
    "DEADLINE_EXCEEDED": code_pb2.DEADLINE_EXCEEDED,
    "CANCELLED": code_pb2.CANCELLED,
    "IMAGE_CORRUPT": code_pb2.DATA_LOSS,
    "DUMP_FAILED": code_pb2.ABORTED,
    "PRE_DUMP_FAILED": code_pb2.ABORTED,
    "RESTORE_FAILED": code_pb2.ABORTED,
    "PAGE_SERVER_FAILED": code_pb2.ABORTED,
    "OUTCOME_UNKNOWN": code_pb2.UNKNOWN,
    "UNSUPPORTED": code_pb2.UNIMPLEMENTED,
    "DAEMON_RESTARTED": code_pb2.ABORTED,
    "HOOK_FAILED": code_pb2.ABORTED,
    "SYNC_FAILED": code_pb2.ABORTED,
    "INTERNAL": code_pb2.INTERNAL,
}
_REASONS: Final = {
    value: name.removeprefix("ERROR_REASON_")
    for name, value in types_pb2.ErrorReason.items()
    if value != types_pb2.ERROR_REASON_UNSPECIFIED
}
_RETRY_SECONDS: Final = {"TOO_MANY_MIGRATIONS": 5.0}
#: What says nothing about whether the call took effect, and what to tell people then.
_NO_ANSWER: Final = {
    grpc.StatusCode.UNAVAILABLE: "",
    grpc.StatusCode.UNKNOWN: "",
    grpc.StatusCode.DEADLINE_EXCEEDED: "no answer in time",
    grpc.StatusCode.CANCELLED: "it gave up the call",
}

_CRIU_REASONS: Final[dict[type[criu_errors.CriuError], str]] = {
    criu_errors.CriuMissing: "CRIU_MISSING",
    criu_errors.CriuTooOld: "CRIU_TOO_OLD",
    criu_errors.PreDumpFailed: "PRE_DUMP_FAILED",
    criu_errors.DumpFailed: "DUMP_FAILED",
    criu_errors.RestoreFailed: "RESTORE_FAILED",
    criu_errors.PageServerFailed: "PAGE_SERVER_FAILED",
    criu_errors.CriuTimeout: "DEADLINE_EXCEEDED",
}
_CRIU_OPERATIONS: Final = {
    "dump": "DUMP_FAILED",
    "pre-dump": "PRE_DUMP_FAILED",
    "restore": "RESTORE_FAILED",
    "page-server": "PAGE_SERVER_FAILED",
}


def reason_of(error: BaseException) -> str:
    """The `ErrorReason`, without its prefix, of any error."""
    if isinstance(error, PhaulError):
        return error.reason
    if isinstance(error, criu_errors.CriuError):
        return _CRIU_REASONS.get(type(error)) or _CRIU_OPERATIONS.get(error.op, "INTERNAL")
    if isinstance(error, TimeoutError):
        return "DEADLINE_EXCEEDED"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "NO_SPACE"
    return "INTERNAL"


def text_of(error: BaseException) -> str:
    """An error for people: the system's own without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def remedy_of(error: BaseException) -> str:
    """What to do about an error; empty if there is nothing to say."""
    if isinstance(error, PhaulError | criu_errors.CriuError):
        return error.remedy
    return "make room on the disks of state_dir, images_dir and log_dir" if reason_of(error) == "NO_SPACE" else ""


def log_tail_of(error: BaseException) -> str:
    """The end of criu's log that came with an error; empty if none did."""
    if isinstance(error, PeerError | criu_errors.CriuError):
        return error.log_tail
    return ""


def to_status(error: BaseException) -> grpc.Status:
    """The status for an error. Reasons without a code of their own mean a wrong state: FAILED_PRECONDITION."""
    reason = reason_of(error)
    status = status_pb2.Status(code=_CODES.get(reason, code_pb2.FAILED_PRECONDITION))
    status.message = _cut(text_of(error), slice(MAX_MESSAGE_BYTES))
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    if remedy := remedy_of(error):
        info.metadata["remedy"] = _cut(remedy, slice(MAX_REMEDY_BYTES))
    if log_tail := log_tail_of(error):
        info.metadata["log_tail"] = _cut(log_tail, slice(-MAX_LOG_BYTES, None))
    _add(status, info)
    if reason in _RETRY_SECONDS:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(_RETRY_SECONDS[reason] * 1000))
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return rpc_status.to_status(status)


def from_failure(peer: str, failure: types_pb2.Failure) -> PeerRefused:
    """The error of ours for what another node has on record."""
    reason = _REASONS.get(failure.reason, "")
    message = failure.message or "it has given the migration up"
    return PeerRefused(peer, message, reason=reason, remedy=failure.remedy, log_tail="\n".join(failure.log_tail))


def from_rpc_error(peer: str, error: grpc.aio.AioRpcError) -> PeerError:
    """The error of ours for a call to `peer` that failed."""
    info = _info_of(error)
    if info is not None:
        return PeerRefused(
            peer,
            error.details() or "",
            reason=info.reason,
            remedy=dict(info.metadata).get("remedy", ""),
            log_tail=dict(info.metadata).get("log_tail", ""),
        )
    if error.code() in _NO_ANSWER:
        return PeerUnavailable(
            peer,
            _NO_ANSWER[error.code()] or f"not reachable ({_short(error.details() or '')})",
            remedy="check that phauld runs there and that host and port are right",
        )
    return PeerRefused(peer, f"{error.code().name}: {error.details()}")


def _info_of(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo | None:
    """Our detail of an error; none if there is none, or if what is there does not fit the error or is no detail."""
    info = error_details_pb2.ErrorInfo()
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        for detail in status.details if status is not None else ():
            if detail.Unpack(info) and info.domain == DOMAIN:
                return info
    except (ValueError, message.DecodeError):
        return None
    return None


def _cut(text: str, kept_bytes: slice) -> str:
    return text.encode()[kept_bytes].decode(errors="ignore")


def _short(details: str) -> str:
    """The cause inside gRPC's long text."""
    # a certificate that is not trusted ends with ": OK"
    cause = details.removesuffix(": OK").rpartition(": ")[2].strip(" )]") or details
    named = re.match(r"(?:recvmsg:)?(.*?) \(\d+$", cause)  # "recvmsg:Connection reset by peer (104)"
    return named[1] if named else cause


def _add(status: status_pb2.Status, detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
