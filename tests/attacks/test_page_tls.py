"""The data port of a session whose pages travel under TLS: only the node that opened it gets in, token or not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import grpc
import pytest

from phaul.v1 import remote_pb2, types_pb2
from phaul_client.stream import Preamble, StreamKind, Verdict
from phaul_client.wire import TlsWire, WireError, make_tls
from tests.attacks.conftest import Tried
from tests.attacks.target import Kind, Target, remote

pytestmark = pytest.mark.criu

CALL_SECONDS: Final = 15.0


@contextlib.asynccontextmanager
async def opened_session(target: Target, name: str) -> AsyncIterator[tuple[grpc.aio.Channel, bytes]]:
    async with target.channel(Kind.NODE) as channel:
        request = remote_pb2.OpenSessionRequest(
            migration_id=name,
            options=types_pb2.Options(mode=types_pb2.MODE_STOP_COPY, restore_mode=types_pb2.RESTORE_MODE_EAGER),
            page_pipe=types_pb2.PagePipe(tls=True),
        )
        opened = await remote(channel).OpenSession(request, timeout=CALL_SECONDS)
        assert opened.page_pipe.tls
        try:
            yield channel, opened.data_token
        finally:
            await remote(channel).Abort(remote_pb2.AbortRequest(migration_id=name), timeout=CALL_SECONDS)


async def start_round(channel: grpc.aio.Channel, name: str) -> str:
    """The code and the words of what StartIter answers; empty if it did."""
    try:
        request = remote_pb2.StartIterRequest(migration_id=name, index=1)
        await remote(channel).StartIter(request, timeout=CALL_SECONDS)
    except grpc.aio.AioRpcError as exc:
        return f"{exc.code().name} {exc.details()}"
    return ""


def come(target: Target, token: bytes, certificates: Path) -> TlsWire:
    """With the token, and this certificate. Raises OSError."""
    sock = target.connect(to_data=True)
    sock.sendall(Preamble(StreamKind.PAGES, token).encode())
    assert sock.recv(1) == bytes([Verdict.ACCEPTED])
    wire = make_tls(sock, certificates, "target", server_side=False)
    assert isinstance(wire, TlsWire)
    return wire


async def test_the_owner_gets_in(target: Target, certificates: Path) -> None:
    async with opened_session(target, "owner") as (channel, token):
        wire = await asyncio.to_thread(come, target, token, certificates / Kind.NODE)
        assert await start_round(channel, "owner") == ""
        wire.close()
        wire._socket.close()


@pytest.mark.parametrize("kind", ["c", Kind.STRANGER, Kind.NAMELESS, Kind.ROGUE, Kind.EXPIRED])
async def test_nobody_else_with_the_token(target: Target, certificates: Path, tried: Tried, kind: str) -> None:
    async with opened_session(target, f"other-{kind[:4]}".replace(" ", "")) as (channel, token):
        with pytest.raises(WireError):
            await asyncio.to_thread(come, target, token, certificates / kind)
        answer = await start_round(channel, f"other-{kind[:4]}".replace(" ", ""))
        assert answer.startswith("PERMISSION_DENIED"), answer
    tried(
        "the token of a page stream with the certificate of another node, of none, expired, of another CA",
        "refused by TLS; the session's next call is UNAUTHORIZED",
    )


async def test_in_clear_where_tls_was_agreed(target: Target, tried: Tried) -> None:
    async with opened_session(target, "clear") as (channel, token):
        with target.connect(to_data=True) as sock:
            sock.sendall(Preamble(StreamKind.PAGES, token).encode() + b"\0" * 4096)
            assert (await start_round(channel, "clear")).startswith("PERMISSION_DENIED")
            assert sock.recv(1) == bytes([Verdict.ACCEPTED])
            with contextlib.suppress(ConnectionError):
                while sock.recv(4096):
                    pass
    tried("pages in clear where TLS was agreed", "refused; no byte reaches criu")
