"""A destination in this process: the table of `phauld.session` and a flag for whether the copy runs.

Each method first does what the script says for it, in turn; then, or instead, what a destination would.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from phaul.v1 import remote_pb2, types_pb2
from phaul_client.errors import PeerRefused, PeerUnavailable
from phaul_client.remote import GrpcRemote
from phauld.session import Phase

PEER = "node-b:7707"
Behaviour = Callable[[], Awaitable[None]]


def unavailable() -> PeerUnavailable:
    return PeerUnavailable(PEER, "not reachable")


def refused(reason: str) -> PeerRefused:
    return PeerRefused(PEER, f"refused as {reason}", reason=reason, remedy="do", log_tail="tail")


@dataclass
class Act:
    """What happens to one call: `before` it took effect, or `after`; an exception is raised, a function awaited."""

    before: Exception | Behaviour | None = None
    after: Exception | Behaviour | None = None


@dataclass
class ScriptedRemote(GrpcRemote):
    """`script` maps the name of a method to the acts of its calls; the last act stays. Empty: all is well."""

    address: str = PEER
    script: dict[str, list[Act]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    phase: Phase = Phase.RECEIVING
    ever_ran: bool = False
    error: types_pb2.Failure | None = None

    def __post_init__(self) -> None:
        self.page_socket_pair = socket.socketpair()
        self.images: list[str] = []

    def close(self) -> None:
        for each in self.page_socket_pair:
            each.close()

    @property
    def page_socket(self) -> socket.socket:
        return self.page_socket_pair[0]

    def watch_closely(self) -> None:
        pass  # it has no lease

    @property
    def image_index(self) -> int:
        return 1

    async def start_iter(self) -> None:
        await self._play("start_iter", lambda: None)

    async def stop_iter(self) -> None:
        await self._play("stop_iter", lambda: None)

    async def put_images(self, pieces: Iterable[remote_pb2.FilePiece]) -> remote_pb2.PutImagesResponse:
        received = list(pieces)

        def take() -> None:
            self.images = [each.image_name for each in received]

        await self._play("put_images", take)
        return remote_pb2.PutImagesResponse(files=len(received), bytes=sum(len(each.data) for each in received))

    async def restore(self, *, image_files: int, timeout_seconds: float) -> remote_pb2.RestoreResponse:
        assert image_files == len(self.images)
        await self._play("restore", self._prepare)
        return remote_pb2.RestoreResponse(pid=77)

    async def commit(self, *, timeout_seconds: float) -> remote_pb2.CommitResponse:
        async with asyncio.timeout(timeout_seconds):
            await self._play("commit", self._run)
        return remote_pb2.CommitResponse(pid=77)

    async def get_session(self, *, timeout_seconds: float = 10.0) -> remote_pb2.Session:
        await self._play("get_session", lambda: None)
        phase = types_pb2.SessionPhase.Value(f"SESSION_PHASE_{self.phase}")
        return remote_pb2.Session(phase=phase, pid=77, error=self.error)

    async def abort(self, *, timeout_seconds: float = 10.0) -> remote_pb2.AbortResponse:
        await self._play("abort", self.lose)
        return remote_pb2.AbortResponse()

    def lose(self) -> None:
        """Abort it, unless it is too late."""
        if self.phase is not Phase.RUNNING:
            self.phase = Phase.ABORTED

    def _prepare(self) -> None:
        if self.phase is not Phase.RECEIVING:
            raise refused("WRONG_PHASE")
        self.phase = Phase.PREPARED

    def _run(self) -> None:
        if self.phase not in (Phase.PREPARED, Phase.RUNNING):
            raise refused("WRONG_PHASE")
        self.phase, self.ever_ran = Phase.RUNNING, True

    async def _play(self, name: str, effect: Callable[[], None]) -> None:
        self.calls.append(name)
        acts = self.script.get(name, [])
        act = acts.pop(0) if len(acts) > 1 else (acts[0] if acts else Act())
        await _do(act.before)
        effect()
        await _do(act.after)


async def _do(what: Exception | Behaviour | None) -> None:
    if isinstance(what, Exception):
        raise what
    if what is not None:
        await what()
