"""What strangers can do to the two ports: without a certificate, without a token, with many connections, slowly."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import grpc
import pytest

from phaul.v1 import node_pb2, node_pb2_grpc, remote_pb2, types_pb2
from phaul_client.stream import PREAMBLE_BYTES, Preamble, StreamKind, Verdict
from phauld.destination.dataport import MAX_STRANGERS, TOLD_LINES
from tests.attacks.conftest import Tried
from tests.attacks.target import Kind, Target, remote
from tests.nodes import until

pytestmark = pytest.mark.criu

MANY: Final = 2000
QUIET_DESCRIPTORS: Final = 40  #: of a phauld that nobody is connected to
MAX_CONNECTIONS: Final = 512  #: of gRPC, see phauld/server.py
PATIENCE_SECONDS: Final = 20.0
ACCEPTED, REFUSED = bytes([Verdict.ACCEPTED]), bytes([Verdict.REFUSED])


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Enough of them for the attackers, which are this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < MANY + 200:
        pytest.skip(f"RLIMIT_NOFILE of {hard} is too low for {MANY} connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, MANY + 200), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def connect(target: Target, to_data: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", target.data_port if to_data else target.port)


async def hear_all(reader: asyncio.StreamReader) -> bytes:
    """What comes until it is hung up on. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        try:
            return await reader.read(-1)
        except ConnectionResetError:
            return b""


def client_hello() -> bytes:
    """The first flight of a TLS handshake that is in order."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(incoming, outgoing, server_hostname="target")
    with contextlib.suppress(ssl.SSLWantReadError):
        hello.do_handshake()
    return outgoing.read()


BYTES: Final = {
    "nothing": b"",
    "random bytes": random.Random(1).randbytes(100_000),
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: target\r\n\r\n",
    "HTTP/2 without TLS": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5),
    "half a TLS hello": client_hello()[:100],
    "a TLS record that claims 16 KiB": b"\x16\x03\x01\x40\x00" + bytes(100),
}


@pytest.mark.parametrize("to_data", [False, True], ids=["gRPC", "data"])
async def test_bytes_that_nobody_asked_for(target: Target, tried: Tried, to_data: bool) -> None:
    async def send(data: bytes) -> bytes:
        reader, writer = await connect(target, to_data)
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        heard = await hear_all(reader)
        writer.close()
        return heard

    heard = dict(zip(BYTES, await asyncio.gather(*map(send, BYTES.values())), strict=True))
    for name, answer in heard.items():  # at most an alert of TLS, or the settings frame that precedes nothing
        assert len(answer) < 100, (name, answer)
    tried(f"{', '.join(BYTES)}, to the {_name(to_data)} port", "closed, at the latest after 5 s")
    await _is_well(target)


@pytest.mark.parametrize("to_data", [False, True], ids=["gRPC", "data"])
async def test_slowly(target: Target, tried: Tried, to_data: bool) -> None:
    """A byte of what would be in order at a time: no byte buys more time."""
    data = Preamble(StreamKind.PAGES, bytes(32)).encode() if to_data else client_hello()
    reader, writer = await connect(target, to_data)
    hung_up = asyncio.create_task(hear_all(reader))
    sent = 0
    with contextlib.suppress(ConnectionError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            sent += 1
            if (await asyncio.wait([hung_up], timeout=0.5))[0]:
                break
    assert await hung_up == b""
    assert sent < len(data)
    writer.close()
    tried(f"a byte at a time, to the {_name(to_data)} port", "closed after 5 s, whatever came")
    await _is_well(target)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("to_data", [False, True], ids=["gRPC", "data"])
async def test_thousands_of_silent_connections(target: Target, tried: Tried, to_data: bool) -> None:
    await until(lambda: target.descriptors() < QUIET_DESCRIPTORS, PATIENCE_SECONDS)
    before = target.descriptors()
    bound = MAX_STRANGERS if to_data else MAX_CONNECTIONS
    async with _session(target, f"many-{to_data}") as (channel, opened):
        with contextlib.ExitStack() as stack:
            for _ in range(MANY):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(("127.0.0.1", target.data_port if to_data else target.port))
            await until(lambda: target.descriptors() >= before + bound // 2)
            for _ in range(20):
                assert target.descriptors() <= before + bound + 20
                await asyncio.sleep(0.02)
            memory = target.memory_bytes()
            # what is open stays, root gets in, and so does who has a token
            info: node_pb2_grpc.NodeAsyncStub = node_pb2_grpc.NodeStub(channel)
            await info.GetInfo(node_pb2.GetInfoRequest(), timeout=PATIENCE_SECONDS)
            await _is_well(target)
            if to_data:
                reader, writer = await connect(target, True)
                writer.write(Preamble(StreamKind.PAGES, opened.data_token).encode())
                async with asyncio.timeout(PATIENCE_SECONDS):
                    assert await reader.readexactly(1) == ACCEPTED
                writer.close()
    await until(lambda: target.descriptors() <= before + 5, PATIENCE_SECONDS)
    assert memory < 300 << 20
    what = (
        f"{MAX_STRANGERS} are held at a time, the oldest goes; who has a token gets in at once"
        if to_data
        else f"{MAX_CONNECTIONS} are held, each for 5 s; open connections and the unix socket serve on"
    )
    tried(f"{MANY} connections that say nothing, to the {_name(to_data)} port", what)


@pytest.mark.usefixtures("descriptors")
async def test_crowds_that_come_and_go(target: Target, tried: Tried) -> None:
    """gRPC was seen to crash when it was given its certificates anew for each of many connections."""
    for _ in range(6):
        with contextlib.ExitStack() as stack:
            for _ in range(MANY):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(("127.0.0.1", target.port))
            await asyncio.sleep(0.2)
        await asyncio.sleep(0.2)
        assert target.process.poll() is None, target.log[-3000:]
    await until(lambda: target.descriptors() < QUIET_DESCRIPTORS, PATIENCE_SECONDS)
    tried("six times 2000 connections that say nothing and go again, to the gRPC port", "phauld serves on")


async def test_growth(target: Target, tried: Tried) -> None:
    """The same again and again: descriptors and memory do not go up with the number of attempts."""
    hello = client_hello()

    async def burst(number: int) -> None:
        for to_data, data in itertools.product((False, True), (b"", hello, b"x" * PREAMBLE_BYTES)):
            for _ in range(number):
                reader, writer = await connect(target, to_data)
                writer.write(data)
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await reader.read()

    await burst(50)
    await until(lambda: target.descriptors() < QUIET_DESCRIPTORS, PATIENCE_SECONDS)
    before = target.memory_bytes()
    await burst(150)
    await until(lambda: target.descriptors() < QUIET_DESCRIPTORS, PATIENCE_SECONDS)
    grown = target.memory_bytes() - before
    assert grown < 16 << 20, f"{grown} bytes more after 900 attempts"
    tried("900 handshakes that are broken off, after 300 of them", "no descriptor and no memory is kept")


async def test_tokens(target: Target, tried: Tried) -> None:
    async def show(token: bytes) -> bytes:
        reader, writer = await connect(target, True)
        writer.write(Preamble(StreamKind.PAGES, token).encode())
        async with asyncio.timeout(PATIENCE_SECONDS):
            heard = await reader.read(1)
        writer.close()
        return heard

    async with _session(target, "tokens") as (_, opened):
        assert {await show(os.urandom(32)) for _ in range(500)} == {REFUSED}
        nearly = bytearray(opened.data_token)
        nearly[-1] ^= 1
        assert await show(bytes(nearly)) == REFUSED
        assert await show(opened.data_token) == ACCEPTED
        assert await show(opened.data_token) == REFUSED
    tried("500 guessed tokens; one that is wrong by a bit", "refused; the session is unharmed")
    tried("a token that was used before", "refused")
    async with _session(target, "old-token") as (_, opened):
        pass  # aborted
    assert await show(opened.data_token) == REFUSED
    tried("a token of a session that is over", "refused")
    told = [line for line in target.log.splitlines() if "data_port refused" in line]
    assert len(told) <= 2 * TOLD_LINES * (1 + PATIENCE_SECONDS)  # of all tests with this daemon


async def test_the_log_is_bounded(target: Target, tried: Tried) -> None:
    """Comes last: what all of them made the daemon say."""
    text = target.log
    assert "Handshake failed" not in text
    assert len(text) < 200_000
    tried("all of this", "a few lines a minute in the log, with the number of those that are not told")


def _name(to_data: bool) -> str:
    return "data" if to_data else "gRPC"


@contextlib.asynccontextmanager
async def _session(
    target: Target, migration_id: str
) -> AsyncIterator[tuple[grpc.aio.Channel, remote_pb2.OpenSessionResponse]]:
    """A session that a node in order opened before the attack; it must be OPEN after it."""
    async with target.channel(Kind.NODE) as channel:
        request = remote_pb2.OpenSessionRequest(migration_id=migration_id)
        request.lease.FromSeconds(600)  # it lasts as long as any attack, on any machine
        opened = await remote(channel).OpenSession(request)
        yield channel, opened
        found = await remote(channel).GetSession(remote_pb2.GetSessionRequest(migration_id=migration_id))
        assert found.session.phase == types_pb2.SESSION_PHASE_OPEN
        await remote(channel).Abort(remote_pb2.AbortRequest(migration_id=migration_id))


async def _is_well(target: Target) -> None:
    async with target.local() as channel:
        info: node_pb2_grpc.NodeAsyncStub = node_pb2_grpc.NodeStub(channel)
        await info.GetInfo(node_pb2.GetInfoRequest(), timeout=PATIENCE_SECONDS)


def test_the_certificates_of_the_daemon_stay_private(certificates: Path) -> None:
    assert (certificates / "target" / "node.key").stat().st_mode & 0o077 == 0
