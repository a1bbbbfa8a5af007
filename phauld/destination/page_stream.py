"""The page stream of a session, at its destination: its token, its socket, and its pipe if it has one.

The invariant: what it opened it closes; criu's socket is closed after criu's page server has ended.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Final

from phaul_client.errors import PhaulError
from phaul_client.pipe import PagePipe, PipeTls
from phauld.destination.dataport import DataPort, Expected

#: How long StartIter waits for the stream that OpenSession made a token for.
STREAM_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class PipeTerms:
    """What the two ends of the pipe have agreed on; the frames say the rest."""

    tls: PipeTls | None
    hands_over: bool = False  #: the kernels do TLS, and criu gets the connection itself


class PageStream:
    """Expected from the start; `take` it once the source has connected."""

    def __init__(self, data_port: DataPort, terms: PipeTerms | None) -> None:
        self._data_port = data_port
        self._terms = terms
        self._pipe: PagePipe | None = None
        self._expected: Expected | None = None
        self._connecting: asyncio.Task[socket.socket] | None = None
        self._socket: socket.socket | None = None

    @property
    def token(self) -> bytes:
        """The one-time token that opens it."""
        assert self._expected is not None
        return self._expected.token

    async def open(self) -> None:
        """Expect it, and have the pipe's process ready. Raises `OSError`."""
        if self._terms is not None:
            self._pipe = await PagePipe.start()
        self._expect()

    def expect_again(self) -> None:
        """A new token for a stream that has not come; the old one is void."""
        if self._socket is None and (self._connecting is None or not self._connecting.done()):
            self._forget()
            self._expect()

    async def take(self) -> int:
        """The stream as criu gets it. Raises `TimeoutError` if none comes, `PhaulError` if it is not as agreed."""
        if self._socket is None:
            assert self._expected is not None
            if self._connecting is not None and self._pipe is not None:
                async with asyncio.timeout(STREAM_SECONDS):
                    self._socket = await asyncio.shield(self._connecting)
            else:
                self._socket = await self._expected.take(STREAM_SECONDS)
            self._socket.setblocking(True)
        return self._socket.fileno()

    async def why(self) -> PhaulError | None:
        """Why it broke, if the pipe knows."""
        return await self._pipe.why() if self._pipe is not None else None

    async def aclose(self) -> None:
        self._forget()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._pipe is not None:
            await self._pipe.aclose()

    def _expect(self) -> None:
        self._expected = self._data_port.expect()
        if self._pipe is not None:
            self._connecting = asyncio.create_task(self._connect(self._pipe, self._expected), name="page-pipe")
            self._connecting.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _connect(self, pipe: PagePipe, expected: Expected) -> socket.socket:
        """What criu gets."""
        terms = self._terms
        assert terms is not None
        sock = await expected.take(None)
        try:
            await pipe.connect(sock, server_side=True, tls=terms.tls, hands_over=terms.hands_over)
        except BaseException:
            sock.close()
            raise
        if terms.hands_over:
            return sock
        sock.close()
        return pipe.socket

    def _forget(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        if self._expected is not None:
            self._expected.close()
