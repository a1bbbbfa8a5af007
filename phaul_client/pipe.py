"""phauld's side of a page pipe (`pipe_process.py`): starts it, gives it its connection, reads its board.

The invariant: the process ends with this object, and with phauld.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import phaul_client
from phaul_client.errors import PeerUnavailable, PhaulError
from phaul_client.pipe_board import Board, Counters
from phaul_criu.child import Child, spawn

CONNECT_SECONDS: Final = 15.0
#: criu may notice that a pipe died before we do.
DEATH_SECONDS: Final = 0.3
_ROOT: Final = str(Path(phaul_client.__file__).parents[1])
_PROGRAM: Final = (
    "import sys, json; sys.path[:0] = json.loads(sys.argv[1]); from phaul_client.pipe_process import main; main()"
)
#: A unix socket holds no more than this: it is what criu writes while the network is slow.
_BUFFER_BYTES: Final = 1 << 22
_LIBRARIES: Final = ("xxhash", "lz4", "zstandard")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeTls:
    """Mutual TLS with one node."""

    directory: Path  #: of our certificates
    peer: str  #: the name in the certificate of the other end
    revoked: tuple[str, ...] = ()  #: SHA-256 of certificates
    kernel: bool = False  #: this node's kernel can make and read the records: see `kernel_tls.py`

    def told(self) -> dict[str, object]:
        """As `wire.make_tls` gets it in another process."""
        names = {"directory": str(self.directory), "name": self.peer, "revoked": list(self.revoked)}
        return {**names, "kernel": self.kernel}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTerms:
    """What two relays of a post-copy have agreed on for their connection."""

    tls: PipeTls | None = None
    packing: str | None = None  #: a word of `Compression`: frames with checksums, those sent here compressed so

    def told(self) -> dict[str, object]:
        """As a relay gets it, in a process that knows no libraries."""
        packing = None if self.packing is None else {"compression": self.packing, "paths": library_paths()}
        return {"tls": self.tls and self.tls.told(), "packing": packing}


class PagePipe:
    """One page pipe: criu's end of it is `socket`, which is ours to close."""

    def __init__(self, child: Child, control: socket.socket, local: socket.socket, board: Board) -> None:
        self._child = child
        self._control = control
        self._board = board
        self._counters = Counters()
        self._failure: PhaulError | None = None
        self._is_closed = False
        self.socket = local

    @classmethod
    async def start(cls) -> Self:
        """Start the process; it waits for `connect`. Raises `OSError`."""
        control, control_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        local, local_theirs = socket.socketpair()
        board, board_fd = Board.make()
        try:
            for each in (local, local_theirs):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            with control_theirs, local_theirs:
                numbers = (control_theirs.fileno(), local_theirs.fileno(), board_fd)
                argv = [sys.executable, "-I", "-S", "-c", _PROGRAM, json.dumps(library_paths()), *map(str, numbers)]
                child = await spawn(argv, pass_fds=numbers)
        except BaseException:
            control.close()
            local.close()
            board.close()
            raise
        finally:
            os.close(board_fd)
        control.setblocking(False)
        return cls(child, control, local, board)

    @property
    def pid(self) -> int:
        return self._child.pid

    async def connect(
        self,
        sock: socket.socket,
        *,
        server_side: bool,
        tls: PipeTls | None = None,
        compression: str = "off",
        hands_over: bool = False,
    ) -> None:
        """Give it a copy of the connection to the other node, and wait until it carries. Raises `PhaulError`.

        `hands_over`: it only greets, leaves TLS to the kernel, and ends; then criu gets `sock` itself, not `socket`.
        """
        told = tls and tls.told()
        message = {"tls": told, "server": server_side, "compression": compression, "hands_over": hands_over}
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], [sock.fileno()])
            async with asyncio.timeout(CONNECT_SECONDS):
                answer = await asyncio.get_running_loop().sock_recv(self._control, 16)
        except (OSError, TimeoutError) as exc:
            raise (await self.why()) or PeerUnavailable("page stream", f"it was not made: {exc!r}") from exc
        if not answer:
            raise (await self.why()) or PeerUnavailable("page stream", "it was not made")

    @property
    def counters(self) -> Counters:
        return self._counters if self._is_closed else self._board.counters

    @property
    def failure(self) -> PhaulError | None:
        """Why it carries no more, if that is known: what the board says, or that it died."""
        if self._is_closed:
            return self._failure
        if (found := self._board.failure) is not None:
            return PhaulError(found[1], reason=found[0])
        status = self._child.returncode
        if status:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            return PhaulError(f"the page pipe of this node {how}", reason="PAGE_SERVER_FAILED", remedy="try again")
        return None

    async def why(self) -> PhaulError | None:
        """`failure`, after criu had a broken stream: the process may be about to end."""
        if self.failure is None:
            try:
                async with asyncio.timeout(DEATH_SECONDS):
                    await self._child.wait()
            except TimeoutError:
                pass
        return self.failure

    async def aclose(self) -> None:
        """End it. The counters and the failure stay as they were."""
        if not self._is_closed:
            self._counters, self._failure = self.counters, self.failure
            self._is_closed = True
            self._control.close()
            self.socket.close()
            await self._child.aclose()
            self._board.close()


def library_paths() -> list[str]:
    """Where a process finds its modules that starts without `site`, which takes longer than all the rest."""
    found = [_ROOT]
    for name in _LIBRARIES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            found.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(found))
