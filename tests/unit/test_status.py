"""Errors over the wire: every one comes out with its code, reason, remedy and log."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from phaul.v1 import types_pb2
from phaul_client import errors
from phaul_client.errors import PeerError, PeerRefused, PeerUnavailable, PhaulError
from phaul_client.status import from_rpc_error, reason_of, remedy_of, text_of, to_status
from phaul_criu import errors as criu_errors
from phaul_criu.errors import CriuDied, CriuError
from phauld import convert

ERRORS: list[BaseException] = [
    PhaulError("a defect"),
    PhaulError("no process", reason="PID_NOT_FOUND", remedy="ps"),
    errors.InvalidRequest("no name", remedy="say one"),
    errors.PhaseError("RUNNING", "RESTORE"),
    errors.MigrationNotFound("move"),
    errors.WorkloadNotFound("web"),
    errors.WorkloadExists("web"),
    errors.TooManyMigrations("16 already", remedy="wait"),
    errors.ImageCorrupt("core-1.img"),
    errors.PreflightRefused(("a socket", "a device"), remedy="close it"),
    errors.PeerError("b:1", "no", log_tail="why"),
    errors.PeerUnavailable("b:1", "no answer"),
    errors.PeerRefused("b:1", "no", reason="NO_SPACE", remedy="rm", log_tail="(00.1) Error"),
    errors.RemoteProtocolError("b:1", "garbage"),
    errors.MigrationFailed("move", "no"),
    errors.RolledBack("move", "no", reason="RESTORE_FAILED", remedy="look"),
    errors.MigrationCancelled("move"),
    errors.OutcomeUnknown("move"),
    *(
        kind("words", remedy="do")
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, PhaulError) and kind.__init__ is PhaulError.__init__
    ),
    *(
        kind("dump", "failed", cause="a cause", remedy="do", log_tail="(00.1) Error")
        for kind in vars(criu_errors).values()
        if isinstance(kind, type) and issubclass(kind, CriuError) and kind is not CriuDied
    ),
    *(CriuError(op, "failed") for op in ("dump", "pre-dump", "restore", "page-server", "check")),
    CriuDied("restore", "criu was killed by signal 9", signal=9, log_tail="tail"),
    TimeoutError("too slow"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EACCES, "Permission denied"),
    ValueError("a defect"),
]


def test_every_class_is_in_the_list() -> None:
    known = {type(each) for each in ERRORS}
    for module in (errors, criu_errors):
        classes = {each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Exception)}
        assert classes <= known


def received(sent: grpc.Status, peer: str = "node-b:7707") -> PeerError:
    """What the other end makes of a status."""
    error: Any = grpc.aio.AioRpcError(
        sent.code,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(*((key, value) for key, value in sent.trailing_metadata)),
        details=sent.details,
    )
    return from_rpc_error(peer, error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{reason_of(error)}")
def test_a_round_trip_keeps_reason_remedy_and_log(error: BaseException) -> None:
    there = received(to_status(error))
    assert isinstance(there, PeerRefused)
    assert there.peer == "node-b:7707"
    assert there.reason == reason_of(error)
    assert there.remedy == remedy_of(error)
    assert there.log_tail == getattr(error, "log_tail", "")
    assert str(there) == f"node-b:7707: {text_of(error)}"
    twice = received(to_status(there), "node-c:7707")  # a daemon tells its caller what the other one said
    assert (twice.reason, twice.remedy, twice.log_tail) == (there.reason, there.remedy, there.log_tail)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{reason_of(error)}")
def test_every_reason_is_in_the_api_with_the_code_that_it_promises(error: BaseException) -> None:
    value = types_pb2.ErrorReason.Value(f"ERROR_REASON_{reason_of(error)}")
    assert value != types_pb2.ERROR_REASON_UNSPECIFIED
    assert convert.failure(error).reason == value
    assert convert.failure(error).message == text_of(error)


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (errors.InvalidRequest("x"), "INVALID_ARGUMENT", grpc.StatusCode.INVALID_ARGUMENT),
        (errors.PhaseError("A", "B"), "WRONG_PHASE", grpc.StatusCode.FAILED_PRECONDITION),
        (errors.MigrationNotFound("x"), "MIGRATION_NOT_FOUND", grpc.StatusCode.NOT_FOUND),
        (errors.WorkloadExists("x"), "WORKLOAD_EXISTS", grpc.StatusCode.ALREADY_EXISTS),
        (errors.TooManyMigrations("x"), "TOO_MANY_MIGRATIONS", grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.ImageCorrupt("x"), "IMAGE_CORRUPT", grpc.StatusCode.DATA_LOSS),
        (errors.PeerUnavailable("x", "y"), "PEER_UNREACHABLE", grpc.StatusCode.UNAVAILABLE),
        (CriuDied("restore", "x"), "RESTORE_FAILED", grpc.StatusCode.ABORTED),
        (CriuDied("pre-dump", "x"), "PRE_DUMP_FAILED", grpc.StatusCode.ABORTED),
        (criu_errors.DumpFailed("dump", "x"), "DUMP_FAILED", grpc.StatusCode.ABORTED),
        (criu_errors.PreDumpFailed("pre-dump", "x"), "PRE_DUMP_FAILED", grpc.StatusCode.ABORTED),
        (criu_errors.CriuTimeout("dump", "x"), "DEADLINE_EXCEEDED", grpc.StatusCode.DEADLINE_EXCEEDED),
        (criu_errors.CriuMissing("start", "x"), "CRIU_MISSING", grpc.StatusCode.FAILED_PRECONDITION),
        (TimeoutError(), "DEADLINE_EXCEEDED", grpc.StatusCode.DEADLINE_EXCEEDED),
        (OSError(errno.ENOSPC, "full"), "NO_SPACE", grpc.StatusCode.RESOURCE_EXHAUSTED),
        (OSError(errno.EDQUOT, "full"), "NO_SPACE", grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ValueError("x"), "INTERNAL", grpc.StatusCode.INTERNAL),
    ],
)
def test_codes(error: BaseException, reason: str, code: grpc.StatusCode) -> None:
    assert reason_of(error) == reason
    assert to_status(error).code is code


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "/srv/x"), "/srv/x: Permission denied"),
        (OSError("the journal is damaged"), "the journal is damaged"),
        (errors.InvalidRequest("x"), "x"),
    ],
)
def test_errors_of_the_system_are_told_without_their_number(error: BaseException, says: str) -> None:
    assert to_status(error).details == convert.failure(error).message == says


def test_a_full_disk_has_a_remedy() -> None:
    full = to_status(OSError(errno.ENOSPC, "No space left on device"))
    assert "make room" in received(full).remedy


def test_only_what_passes_by_itself_says_when_to_try_again() -> None:
    def retry_seconds(error: BaseException) -> list[float]:
        found = []
        call: Any = SimpleNamespace(
            code=lambda: to_status(error).code,
            details=lambda: to_status(error).details,
            trailing_metadata=lambda: to_status(error).trailing_metadata,
        )
        for detail in rpc_status.from_call(call).details:
            info = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                found.append(info.retry_delay.ToMilliseconds() / 1000)
        return found

    assert retry_seconds(errors.TooManyMigrations("x")) == [5.0]
    assert retry_seconds(errors.InvalidRequest("x")) == []


@pytest.mark.parametrize("character", ["x", "ä", "\n", "𝄞"])
def test_long_texts_fit_the_metadata(character: str) -> None:
    """gRPC's limit is 8 KiB for all of it; a message is sent twice, once with every odd byte as %XX."""
    text = character * 100_000
    error = CriuError("restore", text, cause=text, remedy=text, log_tail=f"{text}the end")
    sent = to_status(error)
    binary = sum(len(key) + len(value) * 4 / 3 for key, value in sent.trailing_metadata)
    percent = sum(1 if 32 <= byte < 127 else 3 for byte in sent.details.encode())
    assert binary + percent < 8000
    assert received(sent).log_tail.endswith("the end")
    assert str(received(sent)).startswith("node-b:7707: criu restore: ")


@pytest.mark.parametrize(
    ("code", "details", "kind", "says"),
    [
        (
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused",
            PeerUnavailable,
            "not reachable (Connection refused)",
        ),
        (
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect; last error: UNAVAILABLE: ipv4:127.0.0.1:1: recvmsg:Connection reset by peer (104)",
            PeerUnavailable,
            "not reachable (Connection reset by peer)",
        ),
        (
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Tls handshake failed "
            "(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
            "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate: OK",
            PeerUnavailable,
            "not reachable (unable to get local issuer certificate)",
        ),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", PeerUnavailable, "no answer in time"),
        (grpc.StatusCode.UNKNOWN, "", PeerUnavailable, "not reachable"),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", PeerRefused, "UNIMPLEMENTED: Method not found!"),
        (grpc.StatusCode.CANCELLED, "CANCELLED", PeerUnavailable, "gave up"),
    ],
)
def test_failures_that_are_not_ours(code: grpc.StatusCode, details: str, kind: type[PeerError], says: str) -> None:
    error: Any = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)
    found = from_rpc_error("b:1", error)
    assert type(found) is kind
    assert says in str(found)
    assert str(found).startswith("b:1: ")


def test_a_reason_of_a_newer_version_is_no_defect_here() -> None:
    newer = PeerRefused("b:1", "no", reason="MOON_PHASE")
    there = received(to_status(newer))
    assert there.reason == "MOON_PHASE"
    assert convert.failure(there).reason == types_pb2.ERROR_REASON_UNSPECIFIED
    assert convert.failure(there).message == str(there)
