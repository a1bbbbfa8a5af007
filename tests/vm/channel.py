"""The host's end of the channel to a guest's agent; the frames are described in in_guest/agent.py."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import signal
import socket
import struct
from typing import Any, Final, NamedTuple

_LENGTH: Final = struct.Struct(">I")


class GuestDied(Exception):
    """The guest, or its agent, is no more."""


class RequestFailed(Exception):
    """The agent could not do what it was asked; the message is its own."""


class Started(NamedTuple):
    """A process that was started: `number` names it, `end` is the frame that tells how it ended."""

    number: int
    pid: int
    end: asyncio.Future[dict[str, Any]]


class Channel:
    """Requests to one agent, any number at a time. Use `Channel.open`, and `aclose` at the end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hello: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._ends: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._receiver = asyncio.create_task(self._receive())

    @classmethod
    async def open(cls, connection: socket.socket) -> Channel:
        """Speak over this socket; it is closed with the channel."""
        return cls(*await asyncio.open_unix_connection(sock=connection, limit=1 << 20))

    async def request(self, do: str, **fields: Any) -> Any:
        """Ask and wait for the answer. Raises RequestFailed, GuestDied."""
        return await self._ask(next(self._numbers), do, fields)

    async def start(self, **fields: Any) -> Started:
        """Start a process. Raises RequestFailed, GuestDied. Cancelled, it leaves no process behind."""
        number = next(self._numbers)
        end = self._ends[number] = asyncio.get_running_loop().create_future()
        try:
            return Started(number, await self._ask(number, "start", fields), end)
        except BaseException as exc:
            del self._ends[number]
            if isinstance(exc, asyncio.CancelledError):
                self.kill(number)
            raise

    def kill(self, number: int) -> None:
        """Kill a process and its session, if it still runs; does not wait."""
        if not self._receiver.done():
            signal_fields = {"process": number, "number": signal.SIGKILL, "session": True}
            self._send(next(self._numbers), "signal", signal_fields)

    async def aclose(self) -> None:
        """Close; whoever waits gets GuestDied."""
        self._writer.close()
        self._receiver.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._receiver

    async def _ask(self, number: int, do: str, fields: dict[str, Any]) -> Any:
        if self._receiver.done():
            raise GuestDied("the guest is not running")
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(number, do, fields)
            with contextlib.suppress(ConnectionError):  # `_receive` finds out, and says so to everyone
                await self._writer.drain()
            return await answer
        finally:
            del self._answers[number]

    def _send(self, number: int, do: str, fields: dict[str, Any]) -> None:
        body = json.dumps({"id": number, "do": do, **fields}).encode()
        self._writer.write(_LENGTH.pack(len(body)) + body)

    async def _receive(self) -> None:
        try:
            while True:
                (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                self._take(json.loads(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for waiting in (self.hello, *self._answers.values(), *self._ends.values()):
                if not waiting.done():
                    waiting.set_exception(GuestDied("the guest died"))
                    waiting.exception()  # nobody need be waiting

    def _take(self, frame: dict[str, Any]) -> None:
        if "hello" in frame:
            self.hello.set_result(frame)
        elif "ended" in frame:
            if (end := self._ends.pop(frame["ended"], None)) is not None and not end.done():
                end.set_result(frame)
        elif (answer := self._answers.get(frame["id"])) is not None and not answer.done():
            if "error" in frame:
                answer.set_exception(RequestFailed(frame["error"]))
            else:
                answer.set_result(frame["answer"])


def encode(data: bytes) -> str:
    """Bytes for a frame."""
    return base64.b64encode(data).decode()


def decode(text: str) -> bytes:
    """Bytes of a frame."""
    return base64.b64decode(text)
