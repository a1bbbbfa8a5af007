"""One `criu swrk` child, spoken to over a SEQPACKET socket pair.

The invariant: when a Swrk has been closed, criu has ended and has been reaped, and no descriptor of it is open. criu
takes the closing of the socket for a refusal: a dump lets the tree run on, a restore kills what it has restored. It is
given time for that before it is killed.

criu opens image directories through /proc of the process that made the socket pair. So that process must be the one
whose descriptor numbers the requests name: `open` makes the pair here, and for `attach` the caller made it here too.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TypeAlias

from phaul_criu import child as children
from phaul_criu.errors import CriuDied, CriuMissing, CriuTimeout
from phaul_criu.requests import CriuRequest, CriuResponse, notify_answer
from phaul_criu.rpc import rpc_pb2

logger = logging.getLogger(__name__)

#: How long criu may unwind after the socket was closed before it is killed.
UNWIND_SECONDS: Final = 10.0
#: criu's answers are far smaller: the largest part is one line of its log.
_LARGEST_ANSWER_BYTES: Final = 1 << 16
#: After the socket was closed by criu's side, its end is a matter of milliseconds.
_DEATH_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Notification:
    """criu reached a step and waits for the answer. `pid` is the root of the tree, if criu told it."""

    name: str
    pid: int | None = None


OnNotify: TypeAlias = Callable[[Notification], Awaitable[None]]


class Swrk:
    """A connection to one criu. Good for one operation (and for the WAIT_PID that follows a page server)."""

    def __init__(self, sock: socket.socket, child: children.Child | None = None) -> None:
        self._sock = sock
        self._child = child
        self._sock.setblocking(False)
        if child is not None:
            # A process that criu forked may hold the other end open, so that its death alone is no end of file.
            child.on_end(self._shut_down)

    @classmethod
    async def open(
        cls, binary: str | Path, *, pass_fds: Sequence[int] = (), spawn: children.Spawn = children.spawn
    ) -> Self:
        """Start criu. The descriptors `pass_fds` have the same numbers there. Raises CriuMissing."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                argv = [binary, "swrk", str(theirs.fileno())]
                return cls(ours, await spawn(argv, pass_fds=(theirs.fileno(), *pass_fds)))
        except OSError as exc:
            ours.close()
            raise CriuMissing("swrk", f"cannot start {binary}: {exc.strerror}", errno=exc.errno) from exc
        except BaseException:
            ours.close()
            raise

    @classmethod
    def attach(cls, sock: socket.socket) -> Self:
        """Speak to a criu that is somebody else's child, who starts and reaps it. The socket becomes ours."""
        return cls(sock)

    @property
    def pid(self) -> int | None:
        """The PID of criu, if it is our child."""
        return self._child.pid if self._child else None

    async def request(
        self, request: CriuRequest, *, on_notify: OnNotify | None = None, timeout_seconds: float | None = None
    ) -> CriuResponse:
        """Send a request and return criu's final answer, whether it says success or not.

        Each notification is handed to `on_notify`. If that raises, criu is told so and unwinds, later notifications
        are answered with success, and the exception is raised here after criu's answer.

        After an exception the connection must be closed; that makes criu unwind. The deadline covers the callbacks.
        Raises CriuTimeout, CriuDied, and whatever `on_notify` raises.
        """
        op = operation(request)
        try:
            async with asyncio.timeout(timeout_seconds) as deadline:
                return await self._converse(op, request, on_notify)
        except TimeoutError as exc:
            if not deadline.expired():
                raise
            raise CriuTimeout(op, f"not done after {timeout_seconds:g} s") from exc

    async def aclose(self, *, patience_seconds: float = UNWIND_SECONDS) -> None:
        """Close the socket, which makes criu unwind; kill it if it still runs after `patience_seconds`; reap it."""
        self._sock.close()
        if self._child is not None:
            await self._child.aclose(patience_seconds=patience_seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    async def _converse(self, op: str, request: CriuRequest, on_notify: OnNotify | None) -> CriuResponse:
        failure: Exception | None = None
        await self._send(op, request)
        while True:
            try:
                response = await self._receive(op)
            except CriuDied as exc:
                raise failure or exc from exc.__cause__
            if response.type != rpc_pb2.NOTIFY:
                if failure is not None:
                    raise failure
                return response
            refused_now = False
            if on_notify is not None and failure is None:
                try:
                    await on_notify(_notification(response))
                except Exception as exc:
                    failure, refused_now = exc, True
            await self._send(op, notify_answer(not refused_now))

    async def _send(self, op: str, request: CriuRequest) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._sock, request.SerializeToString())
        except ConnectionError as exc:
            raise await self._death(op) from exc

    async def _receive(self, op: str) -> CriuResponse:
        try:
            message = await asyncio.get_running_loop().sock_recv(self._sock, _LARGEST_ANSWER_BYTES)
        except ConnectionError as exc:
            raise await self._death(op) from exc
        if not message:
            raise await self._death(op)
        return rpc_pb2.criu_resp.FromString(message)

    async def _death(self, op: str) -> CriuDied:
        if self._child is None:
            return CriuDied(op, "criu closed the connection without an answer")
        with suppress(TimeoutError):
            async with asyncio.timeout(_DEATH_SECONDS):
                await self._child.wait()
        returncode = self._child.returncode
        stderr = self._child.stderr_tail
        if returncode is None:
            return CriuDied(op, "criu closed the connection without an answer", log_tail=stderr)
        if returncode < 0:
            return CriuDied(op, f"criu was killed by signal {-returncode}", signal=-returncode, log_tail=stderr)
        return CriuDied(op, f"criu exited with {returncode} without an answer", exit_code=returncode, log_tail=stderr)

    def _shut_down(self) -> None:
        with suppress(OSError):  # closed already, or the other side is gone
            self._sock.shutdown(socket.SHUT_RDWR)


def _notification(response: CriuResponse) -> Notification:
    notify = response.notify
    return Notification(name=notify.script, pid=notify.pid if notify.HasField("pid") else None)


def operation(request: CriuRequest) -> str:
    """The name of a request in errors: "dump", "pre-dump", "restore", "page-server", …"""
    name: str = rpc_pb2.criu_req_type.Name(request.type)
    return name.removeprefix("SINGLE_").removesuffix("_CHLD").lower().replace("_", "-")
