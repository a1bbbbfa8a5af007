"""Every call with every kind of certificate: who gets as far as the call itself, who is refused, who cannot connect.

The calls are those of the descriptors and of the daemon's own reflection: a new one without a rule fails here.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from phaul.v1 import migrations_pb2, node_pb2, remote_pb2, remote_pb2_grpc, types_pb2
from phaul_client.errors import PeerUnavailable
from phaul_client.status import from_rpc_error
from phaul_client.stream import Preamble, StreamKind, Verdict
from phaul_client.wire import WireError
from phauld.access import Right, right_for
from tests.attacks.target import Kind, Target, raw_call, remote
from tests.attacks.test_page_tls import come, opened_session

pytestmark = pytest.mark.criu

MODULES: Final = (remote_pb2, migrations_pb2, node_pb2, health_pb2, reflection_pb2, channelz_pb2)
SERVICES: Final[list[ServiceDescriptor]] = [
    each for module in MODULES for each in module.DESCRIPTOR.services_by_name.values()
]
METHODS: Final[dict[str, MethodDescriptor]] = {
    f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods
}
ALLOWED, REFUSED, NO_CONNECTION = "yes", "refused", "no connection"
DATA_PORT: Final = "data port, with the token of this node's session"
#: These fail in the handshake, whatever is asked.
NOT_CONNECTED: Final = (Kind.EXPIRED, Kind.ROGUE, Kind.NONE, Kind.CLEAR)


def expected(method: str, kind: Kind) -> str:
    if kind in NOT_CONNECTED:
        return NO_CONNECTION
    right = right_for(method)
    assert right is not None, f"{method} has no rule: see phauld/access.py"
    if kind is Kind.ADMIN:
        return ALLOWED if right in (Right.KNOWN, Right.ADMINISTER) else REFUSED
    if kind is Kind.NODE:
        return ALLOWED if right in (Right.KNOWN, Right.RECEIVE_FROM) else REFUSED
    return REFUSED


async def attempt(channel: grpc.aio.Channel, path: str, method: MethodDescriptor) -> str:
    """Make one call with an empty request, which is none that does anything. Any answer of the call itself is a yes."""
    _, refused = await raw_call(channel, path, method, [b""], 10)
    if refused is not None:
        error = from_rpc_error("target", refused)
        if error.reason == "UNAUTHORIZED":
            return REFUSED
        if isinstance(error, PeerUnavailable) and refused.code() is grpc.StatusCode.UNAVAILABLE:
            return NO_CONNECTION
    return ALLOWED


async def test_the_daemon_serves_no_other_service(target: Target) -> None:
    """What reflection lists is what the matrix tries."""
    async with target.local() as channel:
        ask = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        answer = await anext(aiter(ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))))
    assert {each.name for each in answer.list_services_response.service} == {each.full_name for each in SERVICES}


async def test_matrix(target: Target, json_report: dict[str, Any], documented: str) -> None:
    found: dict[str, dict[str, str]] = {method: {} for method in METHODS}
    for kind in Kind:
        async with target.channel(kind) as channel:
            outcomes = await asyncio.gather(*(attempt(channel, path, method) for path, method in METHODS.items()))
        for path, outcome in zip(METHODS, outcomes, strict=True):
            found[path][kind] = outcome
    json_report["access"] = {**found, DATA_PORT: (at_data_port := await data_port(target))}
    assert at_data_port == {
        kind: ALLOWED if kind is Kind.NODE else NO_CONNECTION if kind in NOT_CONNECTED else REFUSED for kind in Kind
    }
    assert found == {method: {kind: expected(method, kind) for kind in Kind} for method in METHODS}
    lines = [*table(found), f"| {DATA_PORT} | " + " | ".join(at_data_port.values()) + " |"]
    assert "\n".join(lines) in documented, "docs/security.md has another table:\n" + "\n".join(lines)


async def data_port(target: Target) -> dict[str, str]:
    """Who can open a page stream with a token that was given to a node."""
    found = {}
    for number, kind in enumerate(Kind):
        async with opened_session(target, f"{number}-matrix") as (_, token):
            found[str(kind)] = await asyncio.to_thread(open_stream, target, token, kind)
    return found


def open_stream(target: Target, token: bytes, kind: Kind) -> str:
    if kind in (Kind.NONE, Kind.CLEAR):
        with target.connect(to_data=True) as sock:
            sock.sendall(Preamble(StreamKind.PAGES, token).encode())
            assert sock.recv(1) == bytes([Verdict.ACCEPTED])
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.load_verify_locations(target.certificates / "ca" / "ca.crt")
            try:
                if kind is Kind.NONE:
                    with context.wrap_socket(sock) as tls:  # in TLS 1.3 the server's refusal comes with its first bytes
                        return ALLOWED if tls.recv(1) else NO_CONNECTION
                sock.sendall(bytes(4096))
                heard = sock.recv(4096)
                return NO_CONNECTION if heard[:1] in (b"", b"\x15") else ALLOWED  # it hung up, with an alert of TLS
            except TimeoutError:
                return ALLOWED  # it waits for more
            except OSError:
                return NO_CONNECTION
    try:
        wire = come(target, token, target.certificates / kind)
    except WireError as exc:
        return REFUSED if "does not take this node" in str(exc) else NO_CONNECTION
    wire.close()
    wire._socket.close()
    return ALLOWED


def table(found: dict[str, dict[str, str]]) -> list[str]:
    """The matrix for people; calls of one service to which the same happens share a row."""
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for method, outcomes in found.items():
        _, service, name = method.split("/")
        rows.setdefault((service, tuple(outcomes[kind] for kind in Kind)), []).append(name)
    lines = ["| call | " + " | ".join(Kind) + " |", "|---" * (len(Kind) + 1) + "|"]
    for (service, cells), names in rows.items():
        everything = len(names) == sum(method.startswith(f"/{service}/") for method in found)
        short = service.removeprefix("phaul.v1.")
        label = f"{short}, each" if everything else f"{short}: {', '.join(names)}"
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def session_calls(stub: remote_pb2_grpc.RemoteAsyncStub, migration_id: str) -> dict[str, Any]:
    """Each call of Remote that is about a session."""

    async def pieces() -> AsyncIterator[remote_pb2.PutImagesRequest]:
        yield remote_pb2.PutImagesRequest(migration_id=migration_id)

    async def synced() -> AsyncIterator[remote_pb2.SyncFilesRequest]:
        yield remote_pb2.SyncFilesRequest(migration_id=migration_id, directory="/srv")

    async def files() -> AsyncIterator[remote_pb2.PutFilesRequest]:
        yield remote_pb2.PutFilesRequest(migration_id=migration_id)

    lazy = types_pb2.STREAM_KIND_LAZY_PAGES
    return {
        "OpenSession": lambda: stub.OpenSession(remote_pb2.OpenSessionRequest(migration_id=migration_id)),
        "OpenStream": lambda: stub.OpenStream(remote_pb2.OpenStreamRequest(migration_id=migration_id, kind=lazy)),
        "StartIter": lambda: stub.StartIter(remote_pb2.StartIterRequest(migration_id=migration_id, index=1)),
        "StopIter": lambda: stub.StopIter(remote_pb2.StopIterRequest(migration_id=migration_id, index=1)),
        "PutImages": lambda: stub.PutImages(pieces()),
        "PutFiles": lambda: stub.PutFiles(files()),
        "SyncFiles": lambda: anext(aiter(stub.SyncFiles(synced()))),
        "Restore": lambda: stub.Restore(remote_pb2.RestoreRequest(migration_id=migration_id, index=1)),
        "Commit": lambda: stub.Commit(remote_pb2.CommitRequest(migration_id=migration_id)),
        "Abort": lambda: stub.Abort(remote_pb2.AbortRequest(migration_id=migration_id)),
        "GetSession": lambda: stub.GetSession(remote_pb2.GetSessionRequest(migration_id=migration_id)),
        "RenewLease": lambda: stub.RenewLease(remote_pb2.RenewLeaseRequest(migration_id=migration_id)),
    }


async def refusal(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as exc:
        return from_rpc_error("target", exc).reason
    return "answered"


@pytest.mark.parametrize("restarted", [False, True], ids=["", "after-a-restart"])
async def test_a_session_is_driven_by_whoever_opened_it_only(certificates: Path, restarted: bool) -> None:
    """Another node with every right of a node is refused, also by the phauld that finds the session in its journal."""
    names = {method.name for method in remote_pb2.DESCRIPTOR.services_by_name["Remote"].methods}
    with Target.running(certificates) as target:
        async with target.channel(Kind.NODE) as channel:
            await remote(channel).OpenSession(remote_pb2.OpenSessionRequest(migration_id="owned"))
        if restarted:
            target.restart()
        async with target.channel("c") as channel:
            calls = session_calls(remote(channel), "owned")
            assert set(calls) == names - {"CheckTree"}
            outcomes = {name: await refusal(call()) for name, call in calls.items()}
        assert outcomes == dict.fromkeys(calls, "UNAUTHORIZED")
        async with target.channel(Kind.NODE) as channel:
            found = (await remote(channel).GetSession(remote_pb2.GetSessionRequest(migration_id="owned"))).session
            assert found.phase == (types_pb2.SESSION_PHASE_ABORTED if restarted else types_pb2.SESSION_PHASE_OPEN)
            answer = await remote(channel).Abort(remote_pb2.AbortRequest(migration_id="owned"))
            assert answer.phase == types_pb2.SESSION_PHASE_ABORTED


async def test_an_abort_of_what_was_never_seen_is_owned_too(target: Target) -> None:
    async with target.channel(Kind.NODE) as owner, target.channel("c") as other:
        await remote(owner).Abort(remote_pb2.AbortRequest(migration_id="unseen"))
        assert (
            await refusal(remote(other).GetSession(remote_pb2.GetSessionRequest(migration_id="unseen")))
            == "UNAUTHORIZED"
        )


async def test_root_may_drive_any_session(target: Target) -> None:
    """On the unix socket: the way out when a certificate's name has changed meanwhile."""
    async with target.channel(Kind.NODE) as owner, target.local() as root:
        await remote(owner).OpenSession(remote_pb2.OpenSessionRequest(migration_id="of-a"))
        answer = await remote(root).Abort(remote_pb2.AbortRequest(migration_id="of-a"))
    assert answer.phase == types_pb2.SESSION_PHASE_ABORTED
