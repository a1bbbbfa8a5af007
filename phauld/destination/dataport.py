"""The data port: takes page streams whose one-time token is expected, and refuses everything else.

Strangers hold a bounded number of connections, each for seconds; when there are more, the one that has been silent for
longest goes, so that they cannot keep out who has a token and shows it at once.

It owns a socket until the session that expects its token takes it over. The invariant: a token opens one stream, once.
"""

import asyncio
import logging
import secrets
import socket
import time
from typing import Final

from phaul_client.errors import RemoteProtocolError
from phaul_client.stream import PREAMBLE_BYTES, TOKEN_BYTES, Verdict, decode_preamble
from phauld.seldom import Seldom

logger = logging.getLogger(__name__)

PREAMBLE_TIMEOUT_SECONDS: Final = 5.0
MAX_STRANGERS: Final = 64
BACKLOG: Final = 128
TOLD_LINES: Final = 10  #: a minute


class Expected:
    """A stream that a session waits for. Whoever makes it closes it; a stream that nobody took is closed with it."""

    def __init__(self, port: "DataPort") -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._port = port
        self._arrived: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        self._taken = False

    def deliver(self, sock: socket.socket) -> None:
        if self._arrived.done():  # closed while the stream was being greeted
            sock.close()
        else:
            self._arrived.set_result(sock)

    async def take(self, timeout_seconds: float | None) -> socket.socket:
        """The connected stream, now the caller's. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_seconds):
            sock = await asyncio.shield(self._arrived)
        self._taken = True
        return sock

    def close(self) -> None:
        """Expect it no longer."""
        self._port.forget(self)
        if not self._arrived.done():
            self._arrived.set_exception(TimeoutError("the page stream is expected no longer"))
            self._arrived.exception()  # nobody has to wait for it
        elif not self._taken and self._arrived.exception() is None:
            self._arrived.result().close()


class DataPort:
    """Listens for page streams."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._expected: dict[bytes, Expected] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], str] = {}  # those without a token so far, the oldest first
        self._accepting: asyncio.Task[None] | None = None
        self._told = Seldom(lines=TOLD_LINES)

    @property
    def port(self) -> int:
        assert self._listener is not None
        return int(self._listener.getsockname()[1])

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises `OSError` when the address cannot be had."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(), name="data-port")

    async def stop(self) -> None:
        tasks = [task for task in (self._accepting, *self._tasks) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def expect(self) -> Expected:
        """Mint a token; the next stream that shows it is delivered to the returned object."""
        expected = Expected(self)
        self._expected[expected.token] = expected
        return expected

    def forget(self, expected: Expected) -> None:
        self._expected.pop(expected.token, None)

    async def _accept(self) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(self._listener)
            except OSError as exc:  # out of descriptors, or the peer was gone already
                logger.warning("data_port accept failed error=%s", exc)
                await asyncio.sleep(0.1)
                continue
            if len(self._strangers) >= MAX_STRANGERS:
                oldest = next(iter(self._strangers))
                self._tell(self._strangers.pop(oldest), "too_many_unauthenticated")
                oldest.cancel()
            task = asyncio.create_task(self._greet(sock, str(peer[0])))
            self._tasks.add(task)
            self._strangers[task] = str(peer[0])
            task.add_done_callback(self._done)
            await asyncio.sleep(0)  # a crowd that is let in one after the other must not keep all else waiting

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._strangers.pop(task, None)

    async def _greet(self, sock: socket.socket, peer: str) -> None:
        delivered = False
        try:
            async with asyncio.timeout(PREAMBLE_TIMEOUT_SECONDS):
                data = await _receive_exactly(sock, PREAMBLE_BYTES)
                expected = self._expected.pop(decode_preamble(data).token, None)
                if expected is not None and (task := asyncio.current_task()) is not None:
                    self._strangers.pop(task, None)
                verdict = Verdict.ACCEPTED if expected else Verdict.REFUSED
                await asyncio.get_running_loop().sock_sendall(sock, bytes([verdict]))
            if expected is None:
                self._tell(peer, "unknown_token")
                return
            delivered = True
            expected.deliver(sock)
        except (OSError, TimeoutError, RemoteProtocolError) as exc:
            self._tell(peer, str(exc) or type(exc).__name__)
        finally:
            if not delivered:
                sock.close()

    def _tell(self, peer: str, reason: str) -> None:
        """Strangers choose how often they come: a few lines a minute are enough."""
        if self._told.may_say(time.monotonic()):
            kept_back = self._told.take_kept_back()
            logger.warning("data_port refused peer=%s reason=%s not_told_before=%d", peer, reason, kept_back)


async def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Read `size` bytes and not one more: what follows belongs to criu."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        chunk = await loop.sock_recv(sock, size - len(data))
        if not chunk:
            raise RemoteProtocolError("page stream", "it ended inside its preamble")
        data += chunk
    return data
