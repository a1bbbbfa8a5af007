"""The way from one node's phauld to the other's, made of parts that break on command.

The source reaches the destination at 127.0.0.2 in its own network namespace: the calls go through a proxy that knows
their names, the page stream through a relay of bytes. No packet is seen by the host's network.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import grpc

from tests.daemon import DATA_PORT, PORT
from tests.faults.gates import Gates, Verdict
from tests.nodes import Node

HOST: Final = "127.0.0.2"
_CHUNK_BYTES: Final = 1 << 18
_CLONE_NEWNET: Final = 0x40000000
_RESET: Final = struct.pack("ii", 1, 0)
_LIBC: Final = ctypes.CDLL(None, use_errno=True)

Connect = Callable[[], Awaitable[socket.socket]]


@contextlib.contextmanager
def network_of(node: Node) -> Any:
    """Sockets that are made in this block belong to the node's network. No await in it."""
    with open("/proc/thread-self/ns/net") as ours, open(f"/proc/{node.pid}/ns/net") as theirs:
        _setns(theirs.fileno())
        try:
            yield
        finally:
            _setns(ours.fileno())


def _setns(descriptor: int) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class Relay:
    """Carries bytes of TCP connections; can be cut (reset, refused), stalled, mended."""

    def __init__(self, listener: socket.socket, connect: Connect) -> None:
        self._listener = listener
        self._listener.setblocking(False)
        self._connect = connect
        self._flows = asyncio.Event()
        self._flows.set()
        self._cut = False
        self._sockets: set[socket.socket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.flip_at: int | None = None  #: flip a bit of this byte of the next connection's forward stream
        self.truncate_at: int | None = None  #: end the forward stream before this byte, properly
        self._start(self._accept())

    def cut(self) -> None:
        """Reset every connection, and each new one."""
        self._cut = True
        for sock in self._sockets:
            _reset(sock)

    def stall(self) -> None:
        """Carry nothing, without an error."""
        self._flows.clear()

    def mend(self) -> None:
        """Undo `cut` and `stall`."""
        self._cut = False
        self._flows.set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        while True:
            near, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            near.setblocking(False)
            self._start(self._carry(near))

    async def _carry(self, near: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(near.close)
            if self._cut:
                _reset(near)
                return
            try:
                far = stack.enter_context(await self._connect())
            except OSError:
                _reset(near)
                return
            both = {near, far}
            self._sockets |= both
            stack.callback(self._sockets.difference_update, both)
            flip_at, self.flip_at = self.flip_at, None
            truncate_at, self.truncate_at = self.truncate_at, None
            await asyncio.gather(self._pump(near, far, flip_at, truncate_at), self._pump(far, near, None, None))

    async def _pump(
        self, source: socket.socket, sink: socket.socket, flip_at: int | None, truncate_at: int | None
    ) -> None:
        loop = asyncio.get_running_loop()
        position = 0
        try:
            while chunk := await loop.sock_recv(source, _CHUNK_BYTES):
                await self._flows.wait()
                if truncate_at is not None and position + len(chunk) > truncate_at:
                    await loop.sock_sendall(sink, chunk[: truncate_at - position])
                    sink.shutdown(socket.SHUT_WR)
                    _reset(source)
                    return
                if flip_at is not None and position <= flip_at < position + len(chunk):
                    damaged = bytearray(chunk)
                    damaged[flip_at - position] ^= 1
                    chunk = bytes(damaged)
                await loop.sock_sendall(sink, chunk)
                position += len(chunk)
            await self._flows.wait()
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            _reset(source)
            _reset(sink)


def _reset(sock: socket.socket) -> None:
    """End a connection at once; the descriptor stays open, because somebody may wait on it."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class CallProxy:
    """Hands every call of phaul.v1.Remote on, through the gates."""

    def __init__(self, gates: Gates, way: str, path: Path, target: str) -> None:
        self._gates = gates
        self._way = way
        options = [
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 100),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channel = grpc.aio.insecure_channel(target, options=options)
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((_Handler(self._call),))
        self._server.add_insecure_port(f"unix:{path}")

    async def start(self) -> None:
        await self._server.start()

    async def close(self) -> None:
        await self._server.stop(None)
        await self._channel.close()

    async def _call(
        self, method: str, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        boundary = f"{self._way}:{method.rpartition('/')[2]}"
        messages = [message async for message in requests]
        verdict = await self._gates.reach(f"{boundary}:request")
        if verdict is Verdict.LOSE:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the request is lost")
        try:
            answer = await self._forward(method, messages, context)
            if verdict is Verdict.REPEAT:
                answer = await self._forward(method, messages, context)
        except grpc.aio.AioRpcError as exc:
            await self._gates.reach(f"{boundary}:reply")
            metadata = tuple((key, value) for key, value in exc.trailing_metadata() or ())
            await context.abort(exc.code(), exc.details() or "", metadata)
        if await self._gates.reach(f"{boundary}:reply") is Verdict.LOSE:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the reply is lost")
        return answer

    async def _forward(
        self, method: str, messages: list[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        call: Any = self._channel.stream_unary(method)
        return bytes(await call(iter(messages), timeout=context.time_remaining()))


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, call: Callable[..., Awaitable[bytes]]) -> None:
        self._call = call

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Every method is a stream of bytes to one answer of bytes: on the wire a single request is one, too."""
        method = handler_call_details.method

        async def handle(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            return await self._call(method, requests, context)

        return grpc.stream_unary_rpc_method_handler(handle)


class Link:
    """From one node to the other. `address` is the destination as the source calls it."""

    def __init__(self, gates: Gates, source: Node, destination: Node, directory: Path) -> None:
        self.address = f"{HOST}:{PORT}"
        self._source = source
        self._destination = destination
        self._path = directory / f"{source.name}-{destination.name}.sock"
        self.proxy = CallProxy(gates, f"{source.name}>{destination.name}", self._path, destination.daemon.target)

    async def __aenter__(self) -> Link:
        await self.proxy.start()
        with network_of(self._source):
            calls, pages = (socket.create_server((HOST, port), backlog=64) for port in (PORT, DATA_PORT))
        self.calls = Relay(calls, self._connect_proxy)
        self.pages = Relay(pages, self._connect_pages)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.calls.close()
        await self.pages.close()
        await self.proxy.close()

    def cut(self) -> None:
        """Reset everything on the way, until `mend`."""
        self.calls.cut()
        self.pages.cut()

    def stall(self) -> None:
        """Nothing arrives any more, without an error, until `mend`."""
        self.calls.stall()
        self.pages.stall()

    def mend(self) -> None:
        """As new."""
        self.calls.mend()
        self.pages.mend()

    async def _connect_proxy(self) -> socket.socket:
        return await _connect(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), str(self._path))

    async def _connect_pages(self) -> socket.socket:
        with network_of(self._source):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        return await _connect(sock, (self._destination.address, DATA_PORT))


async def _connect(sock: socket.socket, address: Any) -> socket.socket:
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
