"""The data port with real sockets: one stream for one token, and strangers get nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from phaul_client.stream import PREAMBLE_BYTES, Preamble, StreamKind, Verdict
from phauld.destination import dataport
from phauld.destination.dataport import DataPort
from tests.node.criu_victims import no_leaks
from tests.nodes import until

ACCEPTED, REFUSED = bytes([Verdict.ACCEPTED]), bytes([Verdict.REFUSED])


@pytest.fixture
async def port() -> AsyncIterator[DataPort]:
    with no_leaks():
        port = DataPort()
        await port.start("127.0.0.1", 0)
        yield port
        await port.stop()


class Stranger:
    """A connection to the port."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, port: DataPort) -> Stranger:
        return cls(*await asyncio.open_connection("127.0.0.1", port.port))

    async def says(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def hears(self) -> bytes:
        """One byte; nothing when it was hung up on."""
        async with asyncio.timeout(5):
            try:
                return await self._reader.read(1)
            except ConnectionResetError:
                return b""

    async def close(self) -> None:
        self._writer.close()
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)


async def greet(port: DataPort, data: bytes) -> tuple[bytes, Stranger]:
    stranger = await Stranger.connect(port)
    await stranger.says(data)
    return await stranger.hears(), stranger


def preamble(token: bytes) -> bytes:
    return Preamble(StreamKind.PAGES, token).encode()


async def test_a_token_opens_a_stream_and_nothing_behind_the_preamble_is_read(port: DataPort) -> None:
    expected = port.expect()
    verdict, stranger = await greet(port, preamble(expected.token) + b"pages")
    sock = await expected.take(5)
    assert verdict == ACCEPTED
    assert sock.recv(100) == b"pages"
    expected.close()  # taken: it is not ours to close any more
    sock.sendall(b"\x07")
    assert await stranger.hears() == b"\x07"
    sock.close()
    await stranger.close()


async def test_a_token_is_good_once(port: DataPort) -> None:
    expected = port.expect()
    first, one = await greet(port, preamble(expected.token))
    second, other = await greet(port, preamble(expected.token))
    assert (first, second) == (ACCEPTED, REFUSED)
    assert await other.hears() == b""
    (await expected.take(5)).close()
    await one.close()
    await other.close()


async def test_two_streams_at_once_with_one_token(port: DataPort) -> None:
    expected = port.expect()
    heard = await asyncio.gather(*(greet(port, preamble(expected.token)) for _ in range(5)))
    assert sorted(verdict for verdict, _ in heard) == [ACCEPTED, *[REFUSED] * 4]
    (await expected.take(5)).close()
    for _, each in heard:
        await each.close()


@pytest.mark.parametrize(
    "data",
    [preamble(bytes(32)), b"GET / HTTP/1.1\r\nHost: node-b\r\n\r\n".ljust(48), bytes(48), preamble(b"\xff" * 32)],
)
async def test_whoever_does_not_know_the_token_is_hung_up_on(port: DataPort, data: bytes) -> None:
    expected = port.expect()
    verdict, stranger = await greet(port, data)
    assert verdict in (REFUSED, b"")
    assert await stranger.hears() == b""
    with pytest.raises(TimeoutError):
        await expected.take(0.05)
    await stranger.close()
    verdict, stranger = await greet(port, preamble(expected.token))  # it is still good for its owner
    assert verdict == ACCEPTED
    expected.close()
    await stranger.close()


async def test_a_slow_source_is_waited_for(port: DataPort) -> None:
    expected = port.expect()
    stranger = await Stranger.connect(port)
    for byte in preamble(expected.token):
        await stranger.says(bytes([byte]))
        await asyncio.sleep(0.001)
    assert await stranger.hears() == ACCEPTED
    (await expected.take(5)).close()
    await stranger.close()


@pytest.mark.parametrize("size", [0, 1, 8, PREAMBLE_BYTES - 1])
async def test_half_a_preamble_is_waited_for_only_so_long(
    port: DataPort, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataport, "PREAMBLE_TIMEOUT_SECONDS", 0.1)
    expected = port.expect()
    verdict, stranger = await greet(port, preamble(expected.token)[:size])
    assert verdict == b""
    await stranger.close()


@pytest.mark.parametrize("size", [0, 1, PREAMBLE_BYTES - 1])
async def test_half_a_preamble_and_the_end(port: DataPort, size: int) -> None:
    expected = port.expect()
    stranger = await Stranger.connect(port)
    await stranger.says(preamble(expected.token)[:size])
    await stranger.close()
    verdict, owner = await greet(port, preamble(expected.token))
    assert verdict == ACCEPTED
    expected.close()
    await owner.close()


async def test_too_many_silent_strangers_do_not_stay(port: DataPort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataport, "MAX_STRANGERS", 3)
    monkeypatch.setattr(dataport, "PREAMBLE_TIMEOUT_SECONDS", 1000)
    silent = [await Stranger.connect(port) for _ in range(3)]
    await until(lambda: len(port._tasks) == 3)
    expected = port.expect()
    verdict, owner = await greet(port, preamble(expected.token))
    assert verdict == ACCEPTED  # they do not keep out who knows the token
    assert await silent[0].hears() == b""  # the one that was silent for longest went
    await until(lambda: len(port._tasks) == 2)
    expected.close()
    for each in (*silent, owner):
        await each.close()


async def test_a_stream_that_is_no_longer_expected_is_refused(port: DataPort) -> None:
    expected = port.expect()
    expected.close()
    verdict, stranger = await greet(port, preamble(expected.token))
    assert verdict == REFUSED
    await stranger.close()


async def test_a_stream_that_nobody_takes_is_closed_with_its_expectation(port: DataPort) -> None:
    expected = port.expect()
    verdict, stranger = await greet(port, preamble(expected.token))
    assert verdict == ACCEPTED
    await asyncio.sleep(0.01)
    expected.close()
    expected.close()
    assert await stranger.hears() == b""
    await stranger.close()


async def test_who_waits_in_vain_may_wait_again(port: DataPort) -> None:
    expected = port.expect()
    with pytest.raises(TimeoutError):
        await expected.take(0.05)
    waiting = asyncio.create_task(expected.take(5))
    await asyncio.sleep(0)
    _, stranger = await greet(port, preamble(expected.token))
    (await waiting).close()
    await stranger.close()


async def test_who_waits_is_told_that_it_is_expected_no_longer(port: DataPort) -> None:
    """As an error: a cancellation would be taken for the waiter's own."""
    expected = port.expect()
    waiting = asyncio.create_task(expected.take(5))
    await asyncio.sleep(0)
    expected.close()
    with pytest.raises(TimeoutError):
        await waiting


async def test_the_port_that_is_taken_is_an_error(port: DataPort) -> None:
    with pytest.raises(OSError, match="in use"):
        await DataPort().start("127.0.0.1", port.port)


async def test_a_stopped_port_is_free_again(port: DataPort) -> None:
    stranger = await Stranger.connect(port)
    number = port.port
    await port.stop()
    assert await stranger.hears() == b""
    await stranger.close()
    again = DataPort()
    await again.start("127.0.0.1", number)
    await again.stop()


async def test_ip6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    port = DataPort()
    try:
        await port.start("::1", 0)
    except OSError:
        pytest.skip("no IPv6 here")
    expected = port.expect()
    reader, writer = await asyncio.open_connection("::1", port.port)
    writer.write(preamble(expected.token))
    assert await reader.read(1) == ACCEPTED
    (await expected.take(5)).close()
    writer.close()
    await port.stop()


async def test_a_host_name_can_be_listened_on() -> None:
    port = DataPort()
    await port.start("localhost", 0)
    assert port.port
    await port.stop()
