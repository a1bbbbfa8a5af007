"""Where a test can stop the world: at every message between phauld and criu, and at every call between the nodes.

A boundary has a name: "a:dump:post-dump:notify" is the notification on its way from criu to phauld on node a,
"a:dump:post-dump:answer" the answer on its way back; "a>b:Commit:request" is a call, "a>b:Commit:reply" its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import os
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from phaul_criu.install import find_binary
from tests.nodes import children

_WRAPPER: Final = Path(__file__).with_name("criu_wrapper.py")
_LARGEST_BYTES: Final = 1 << 16
_GONE_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.005


async def until(condition: Callable[[], bool], seconds: float) -> None:
    """Look again and again until it is so. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is looked at is in other processes
            await asyncio.sleep(_POLL_SECONDS)


class Verdict(enum.Enum):
    """What becomes of a call after a boundary."""

    GO = enum.auto()
    LOSE = enum.auto()  #: the caller hears nothing good: UNAVAILABLE
    REPEAT = enum.auto()  #: the same request arrives a second time


Damage = Callable[[], Awaitable[Verdict | None]]


@dataclass(slots=True)
class Gates:
    """The boundaries of one pair of nodes, and what is to happen at which."""

    seen: list[str] = field(default_factory=list)  #: every boundary that was reached, in order
    criu: dict[str, int] = field(default_factory=dict)  #: "a:dump" → PID of the wrapper of the last one
    _plans: dict[str, tuple[Damage, bool]] = field(default_factory=dict)

    def plan(self, boundary: str, damage: Damage, *, always: bool = False) -> None:
        """Do this when the boundary is reached the next time, or each time."""
        self._plans[boundary] = damage, always

    def clear(self) -> None:
        """No plans, nothing seen."""
        self.seen.clear()
        self._plans.clear()
        self.criu.clear()

    async def reach(self, boundary: str) -> Verdict:
        """Here it is: do what was planned."""
        self.seen.append(boundary)
        damage, always = self._plans.get(boundary, (None, True))
        if damage is None:
            return Verdict.GO
        if not always:
            del self._plans[boundary]
        # shielded: the call that waits here is cancelled when its caller is killed
        return await asyncio.shield(asyncio.ensure_future(damage())) or Verdict.GO

    def kill_criu(self, key: str) -> None:
        """SIGKILL the real criu of "NODE:OPERATION", and a page server that it forked."""
        wrapper = self.criu[key]
        for criu in children(wrapper):
            for pid in (criu, *(children(criu) if key.endswith("page-server") else ())):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def until_gone(self, key: str) -> None:
        """Wait for the end of the wrapper, which ends as its criu did. Raises TimeoutError."""
        await until(lambda: not os.path.exists(f"/proc/{self.criu[key]}"), _GONE_SECONDS)


class CriuGate:
    """The wrapper of one node's criu, and the ear for what it tells."""

    def __init__(self, gates: Gates, node_name: str, directory: Path) -> None:
        self._gates = gates
        self._node_name = node_name
        directory.mkdir()
        self.program = directory / "criu"
        self._path = directory / "criu.sock"
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> CriuGate:
        configuration = {"criu": str(find_binary()), "socket": str(self._path)}
        (self.program.parent / "criu.json").write_text(json.dumps(configuration))
        self.program.write_text(f"#!{sys.executable} -IS\n{_WRAPPER.read_text()}")
        self.program.chmod(0o755)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self._path))
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._start(self._accept())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()
        shutil.rmtree(self.program.parent)

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            self._start(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        (pid,) = struct.unpack_from("i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        with connection, contextlib.suppress(ConnectionError):
            while message := await loop.sock_recv(connection, _LARGEST_BYTES):
                told = json.loads(message)
                key = f"{self._node_name}:{told['operation']}"
                self._gates.criu[key] = pid
                await self._gates.reach(f"{key}:{told['step']}")
                await loop.sock_sendall(connection, b"g")
