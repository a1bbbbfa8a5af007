"""The page pipe as a process: what goes in comes out, whatever is compressed; what breaks is told at both ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul_client.certs import issue, make_ca
from phaul_client.errors import ImageCorrupt, PhaulError
from phaul_client.page_frames import Codec
from phaul_client.pipe import PagePipe, PipeTls
from phaul_client.pipe_board import Board
from phaul_client.pipe_codecs import compressor, decompress

MIB: Final = 1 << 20
contents = st.one_of(
    st.binary(max_size=9000),
    st.builds(lambda part, number: part * number, st.binary(max_size=40), st.integers(0, 400)),
)


@given(contents, st.sampled_from(["off", "lz4", "zstd"]))
def test_what_is_packed_is_unpacked(content: bytes, compression: str) -> None:
    codec, packed = compressor(compression)(content)
    assert len(packed) < len(content) if codec else packed == content
    assert bytes(decompress(codec, memoryview(packed), len(content))) == content


@given(st.binary(max_size=3000), st.sampled_from([Codec.LZ4, Codec.ZSTD]), st.integers(1, MIB))
def test_garbage_is_not_unpacked_to_more_than_was_said(garbage: bytes, codec: Codec, size: int) -> None:
    with contextlib.suppress(ImageCorrupt):
        assert len(decompress(codec, memoryview(garbage), size)) <= size


def test_a_frame_that_would_fill_memory_is_refused() -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(64 * MIB))
    with pytest.raises(ImageCorrupt):
        decompress(Codec.ZSTD, memoryview(bomb), MIB)


def test_the_first_failure_stays() -> None:
    board, descriptor = Board.make()
    other = Board(descriptor)
    os.close(descriptor)
    assert other.fail("IMAGE_CORRUPT", "a flipped bit")
    assert not board.fail("INTERNAL", "because of that")
    other.sent(10, 4)
    other.sent(10, 4)
    assert board.failure == ("IMAGE_CORRUPT", "a flipped bit")
    assert (board.counters.raw_sent, board.counters.wire_sent) == (20, 8)
    board.close()
    other.close()


class Ends:
    """A pipe at each end of a connection; `middle` may be between."""

    def __init__(self, source: PagePipe, destination: PagePipe) -> None:
        self.source, self.destination = source, destination
        for pipe in (source, destination):
            pipe.socket.setblocking(False)


@contextlib.asynccontextmanager
async def two_pipes(
    near: socket.socket, far: socket.socket, *, tls: Path | None = None, compression: str = "off"
) -> AsyncIterator[Ends]:
    source, destination = await asyncio.gather(PagePipe.start(), PagePipe.start())
    try:
        terms = [None if tls is None else PipeTls(directory=tls / name, peer=peer) for name, peer in ("ab", "ba")]
        with near, far:
            await asyncio.gather(
                source.connect(near, server_side=False, tls=terms[0], compression=compression),
                destination.connect(far, server_side=True, tls=terms[1]),
            )
        yield Ends(source, destination)
    finally:
        pids = [source.pid, destination.pid]
        await asyncio.gather(source.aclose(), destination.aclose())
        assert not any(map(is_there, pids))


def is_there(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


async def receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (chunk := await asyncio.get_running_loop().sock_recv(sock, size - len(data))):
        data += chunk
    return bytes(data)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("compression", ["off", "lz4", "zstd", "auto"])
async def test_what_criu_says_arrives(tmp_path: Path, tls: bool, compression: str) -> None:
    if tls:
        make_ca(tmp_path / "ca")
        for name in "ab":
            issue(tmp_path / "ca", name, tmp_path / name)
    loop = asyncio.get_running_loop()
    noise = random.Random(7).randbytes(64 * 1024)
    content = b"".join((noise, bytes(64 * 1024), noise[::-1])) * 24
    async with two_pipes(*connected(), tls=tmp_path if tls else None, compression=compression) as ends:
        for number in range(20):  # small questions and answers: nothing is held back
            await loop.sock_sendall(ends.source.socket, bytes([number]) * 32)
            assert await receive(ends.destination.socket, 32) == bytes([number]) * 32
            await loop.sock_sendall(ends.destination.socket, b"done")
            assert await receive(ends.source.socket, 4) == b"done"
        _, arrived = await asyncio.gather(
            loop.sock_sendall(ends.source.socket, content), receive(ends.destination.socket, len(content))
        )
        assert arrived == content
        async with asyncio.timeout(20):  # what has arrived is counted a moment later
            while (counters := ends.source.counters).raw_sent < len(content) + 20 * 32:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            while ends.destination.counters.raw_received < counters.raw_sent:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert counters.raw_sent == len(content) + 20 * 32
        assert ends.destination.counters.raw_received == counters.raw_sent
        if compression in ("lz4", "zstd"):
            assert counters.wire_sent < 0.75 * counters.raw_sent
        ends.source.socket.shutdown(socket.SHUT_WR)
        assert await receive(ends.destination.socket, 1) == b""  # an end is an end
        assert ends.destination.failure is None


@contextlib.asynccontextmanager
async def damaging(damage_at: int) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection on which a bit of the byte at `damage_at` is flipped."""
    (near, middle), (other, far) = connected(), connected()
    loop = asyncio.get_running_loop()
    for sock in (middle, other):
        sock.setblocking(False)

    async def carry(source: socket.socket, sink: socket.socket, damage_at: int) -> None:
        position = 0
        with contextlib.suppress(OSError):
            while chunk := bytearray(await loop.sock_recv(source, MIB)):
                if position <= damage_at < position + len(chunk):
                    chunk[damage_at - position] ^= 4
                position += len(chunk)
                await loop.sock_sendall(sink, chunk)
            sink.shutdown(socket.SHUT_WR)

    tasks = [asyncio.create_task(carry(middle, other, damage_at)), asyncio.create_task(carry(other, middle, -1))]
    with middle, other:
        yield near, far
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("damage_at", [0, 5, 31, 32, 33, 100_000])
async def test_a_flipped_bit_is_told_at_both_ends(damage_at: int) -> None:
    loop = asyncio.get_running_loop()
    async with damaging(damage_at) as (near, far), two_pipes(near, far) as ends:
        with contextlib.suppress(ConnectionError):
            await loop.sock_sendall(ends.source.socket, bytes(MIB // 4))
        async with asyncio.timeout(20):
            arrived = await receive(ends.destination.socket, MIB)  # an end, not a stream that stands still
            with contextlib.suppress(ConnectionError):
                await receive(ends.source.socket, 1)
        assert len(arrived) <= damage_at  # not a byte of the damaged frame
        for pipe in (ends.destination, ends.source):
            why = await pipe.why()
            assert isinstance(why, PhaulError)
            assert why.reason == "IMAGE_CORRUPT", why


@pytest.mark.parametrize("which", ["source", "destination"])
async def test_a_pipe_that_is_killed_ends_the_stream(which: str) -> None:
    async with two_pipes(*connected()) as ends:
        killed: PagePipe = getattr(ends, which)
        os.kill(killed.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            for pipe in (ends.source, ends.destination):
                assert await receive(pipe.socket, 1) == b""
        assert "killed by signal 9" in str(await killed.why())
        other = ends.source if which == "destination" else ends.destination
        why = await other.why()
        assert why is not None
        assert why.reason == "PEER_UNREACHABLE"


async def test_a_wrong_peer_is_told(tmp_path: Path) -> None:
    make_ca(tmp_path / "ca")
    for name in "abc":
        issue(tmp_path / "ca", name, tmp_path / name)
    (tmp_path / "a").rename(tmp_path / "old-a")
    (tmp_path / "c").rename(tmp_path / "a")  # a certificate of c, where a is expected
    with pytest.raises(PhaulError) as refused:
        async with two_pipes(*connected(), tls=tmp_path):
            pass
    assert refused.value.reason == "UNAUTHORIZED"


async def test_a_pipe_without_a_connection_ends_with_its_owner() -> None:
    pipe = await PagePipe.start()
    pid = pipe.pid
    await pipe.aclose()
    await pipe.aclose()
    assert not is_there(pid)
