"""The destination as the source sees it: the seed's `Remote`, and `GrpcRemote`, a session on another phauld.

Deadlines are set here, and gRPC's errors become ours here. The invariant: `GrpcRemote` owns the page socket and
closes it.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

import grpc

from phaul.v1 import remote_pb2, remote_pb2_grpc, types_pb2
from phaul_client.compatibility import SAME_PAGES_FEATURE
from phaul_client.errors import PeerError, PeerRefused, PeerUnavailable, PhaulError, RemoteProtocolError
from phaul_client.lease import Lease
from phaul_client.pacing import set_pace
from phaul_client.pieces import Told, messages, one_by_one
from phaul_client.pipe import PagePipe, PipeTls
from phaul_client.pipe_choice import COMPRESSIONS
from phaul_client.status import from_rpc_error
from phaul_client.stream import TOKEN_BYTES, Preamble, StreamKind, Verdict

logger = logging.getLogger(__name__)

CALL_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 5.0
#: After the source's criu has sent its last page the page server only has to flush.
STOP_ITER_SECONDS: Final = 120.0
PUT_IMAGES_SECONDS: Final = 120.0
MAX_LEASE_SECONDS: Final = 3600.0
MAX_PORT: Final = 65535
STREAM_KINDS: Final = {
    StreamKind.PAGES: types_pb2.STREAM_KIND_PAGES,
    StreamKind.LAZY_PAGES: types_pb2.STREAM_KIND_LAZY_PAGES,
}

_Answer = TypeVar("_Answer", covariant=True)


class Remote(Protocol):
    """What the client calls on the destination; the seed's two methods."""

    async def start_iter(self) -> None:
        """Begin a round: from now on pages are read from the other end of `Config.memfd`."""

    async def stop_iter(self) -> None:
        """Wait until every page of the round is safe. Raises if the stream ended early."""


class GrpcRemote:
    """One session on another phauld. `async with` it; it neither commits nor aborts by itself."""

    def __init__(
        self, address: str, channel: grpc.aio.Channel, migration_id: str, *, destination_node_id: str = ""
    ) -> None:
        self.address = address
        self.migration_id = migration_id
        self._stub: remote_pb2_grpc.RemoteAsyncStub = remote_pb2_grpc.RemoteStub(channel)
        self._socket: socket.socket | None = None
        self._pipe: PagePipe | None = None
        self._index = 0
        self._receiving = False
        self._destination_node_id = destination_node_id
        self._lease: Lease | None = None
        self.on_lost: Callable[[PeerError], None] = lambda _: None  #: told once, when the lease cannot be renewed
        self._limit_bytes_per_second = 0
        self.takes_same_pages = False  #: see `same_pages.py`

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop_renewing()
        if self._pipe is not None:
            await self._pipe.aclose()
        if self._socket is not None:
            self._socket.close()

    @property
    def page_socket(self) -> socket.socket:
        """The connected page stream, blocking, as criu wants it."""
        return self._pipe.socket if self._pipe is not None else self.wire_socket

    @property
    def wire_socket(self) -> socket.socket:
        """The connection that pages travel on: the same, if no pipe is between."""
        assert self._socket is not None, "no session is open"
        return self._socket

    @property
    def raw_bytes_sent(self) -> int | None:
        """What criu gave to the pipe, and is on its way; `None` without a pipe."""
        return self._pipe.counters.raw_sent if self._pipe is not None else None

    @property
    def pipe_failure(self) -> PhaulError | None:
        """Why the pipe carries no more, if there is one and that is why."""
        return self._pipe.failure if self._pipe is not None else None

    def limit(self, bytes_per_second: int) -> None:
        """Limit what each data connection sends, those that are open here and those to come; 0: no limit."""
        self._limit_bytes_per_second = bytes_per_second
        if self._socket is not None:
            set_pace(self._socket, bytes_per_second)

    @property
    def destination_node_id(self) -> str:
        return self._destination_node_id

    async def check_tree(self, request: remote_pb2.CheckTreeRequest) -> remote_pb2.CheckTreeResponse:
        """What stands in the way there. Raises `PeerError`."""
        return await self._call(self._stub.CheckTree(request, timeout=CALL_SECONDS))

    async def open_session(
        self, request: remote_pb2.OpenSessionRequest, *, tls: PipeTls | None = None
    ) -> remote_pb2.OpenSessionResponse:
        """Open the session, connect the page stream, keep the lease alive.

        Pages go through a pipe if the request says so, then perhaps under TLS. Raises `PhaulError`, `OSError`.
        """
        if request.HasField("page_pipe"):
            self._pipe = await PagePipe.start()
        answer = await self._call(self._stub.OpenSession(request, timeout=CALL_SECONDS))
        if self._pipe is not None and not answer.HasField("page_pipe"):
            raise PeerRefused(self.address, "it does not know page pipes", reason="PEER_INCOMPATIBLE")
        self._destination_node_id = answer.destination.node_id
        self.takes_same_pages = SAME_PAGES_FEATURE in answer.destination.api_features
        host = self.address.rpartition(":")[0].strip("[]")
        seconds = answer.lease.seconds + answer.lease.nanos / 1e9
        if not 0 < seconds <= MAX_LEASE_SECONDS:
            raise RemoteProtocolError(self.address, f"a lease of {seconds:g} s was granted")
        self._socket = await self._connect(host, answer.data_port, self._preamble(StreamKind.PAGES, answer))
        if self._pipe is not None:
            terms = request.page_pipe
            await self._pipe.connect(
                self._socket,
                server_side=False,
                tls=tls,
                compression=COMPRESSIONS[terms.compression],
                hands_over=terms.kernel_tls,
            )
            if terms.kernel_tls:
                await self._pipe.aclose()
                self._pipe = None
        self._lease = Lease(self.address, seconds, self._renew, lambda error: self.on_lost(error))
        return answer

    async def open_stream(self, kind: StreamKind, *, tls: bool = False, packed: bool = False) -> socket.socket:
        """One more connection to the data port, the caller's; with `tls` a handshake comes next. Raises `PeerError`."""
        request = remote_pb2.OpenStreamRequest(
            migration_id=self.migration_id, kind=STREAM_KINDS[kind], tls=tls, packed=packed
        )
        answer = await self._call(self._stub.OpenStream(request, timeout=CALL_SECONDS))
        host = self.address.rpartition(":")[0].strip("[]")
        return await self._connect(host, answer.data_port, self._preamble(kind, answer))

    async def start_iter(self) -> None:
        """See `Remote`. Raises `PeerError`."""
        request = remote_pb2.StartIterRequest(migration_id=self.migration_id, index=self._index + 1)
        await self._call(self._stub.StartIter(request, timeout=CALL_SECONDS))
        self._index += 1
        self._receiving = True

    async def stop_iter(self) -> None:
        """See `Remote`; after `restore`, which ends the last round itself, it has nothing to do."""
        if not self._receiving:
            return
        self._receiving = False
        request = remote_pb2.StopIterRequest(migration_id=self.migration_id, index=self._index)
        await self._call(self._stub.StopIter(request, timeout=STOP_ITER_SECONDS))

    async def put_images(self, pieces: Iterable[remote_pb2.FilePiece]) -> remote_pb2.PutImagesResponse:
        """Send files. Raises `PeerError`, and `OSError` for a file that cannot be read here."""
        return await self.put_images_as_made(one_by_one(messages(self.migration_id, pieces)))

    async def put_images_as_made(
        self, requests: AsyncIterator[remote_pb2.PutImagesRequest]
    ) -> remote_pb2.PutImagesResponse:
        """Send files while they are made. Raises `PeerError`, and what `requests` raises."""
        told = Told(requests)
        try:
            return await self._call(self._stub.PutImages(told.each(), timeout=PUT_IMAGES_SECONDS))
        except (PeerError, asyncio.CancelledError):
            if told.failure is not None:
                raise told.failure from None
            raise

    async def put_files(
        self, requests: AsyncIterator[remote_pb2.PutFilesRequest], timeout_seconds: float
    ) -> remote_pb2.PutFilesResponse:
        """Send a container's files. Raises `PeerError`."""
        return await self._call(self._stub.PutFiles(requests, timeout=timeout_seconds))

    def sync_files(self) -> Any:
        """The stream of one rsync, see `syncing.py`; without a deadline, so it is the caller's to cancel."""
        return self._stub.SyncFiles()

    @property
    def image_index(self) -> int:
        """The round whose directory the images of the last dump belong to."""
        return self._index

    async def restore(self, *, image_files: int, timeout_seconds: float) -> remote_pb2.RestoreResponse:
        """End the last round, build the tree and hold it: the answer means *prepared*. Raises `PeerError`."""
        self._receiving = False
        request = remote_pb2.RestoreRequest(migration_id=self.migration_id, index=self._index, image_files=image_files)
        return await self._call(self._stub.Restore(request, timeout=timeout_seconds))

    async def commit(self, *, timeout_seconds: float) -> remote_pb2.CommitResponse:
        """Let the tree run. Raises `PeerError`; `PeerUnavailable` says nothing about the outcome."""
        request = remote_pb2.CommitRequest(
            migration_id=self.migration_id, destination_node_id=self._destination_node_id
        )
        return await self._call(self._stub.Commit(request, timeout=timeout_seconds))

    async def get_session(self, *, timeout_seconds: float = CALL_SECONDS) -> remote_pb2.Session:
        """Where the session stands. Raises `PeerError`."""
        request = remote_pb2.GetSessionRequest(
            migration_id=self.migration_id, destination_node_id=self._destination_node_id
        )
        return (await self._call(self._stub.GetSession(request, timeout=timeout_seconds))).session

    async def abort(self, *, timeout_seconds: float = CALL_SECONDS) -> remote_pb2.AbortResponse:
        """End the session if it is not committed. Raises `PeerError`."""
        request = remote_pb2.AbortRequest(migration_id=self.migration_id)
        return await self._call(self._stub.Abort(request, timeout=timeout_seconds))

    def stop_renewing(self) -> None:
        """Let the lease run out."""
        if self._lease is not None:
            self._lease.cancel()

    def watch_closely(self) -> None:
        """The tree stands still: a silent destination is noticed within seconds, see `lease.py`."""
        if self._lease is not None:
            self._lease.watch_closely()

    def _preamble(
        self, kind: StreamKind, answer: remote_pb2.OpenSessionResponse | remote_pb2.OpenStreamResponse
    ) -> Preamble:
        """For the data port of this answer. Raises `RemoteProtocolError`."""
        if not 0 < answer.data_port <= MAX_PORT or len(answer.data_token) != TOKEN_BYTES:
            raise RemoteProtocolError(self.address, "what it says of its data port is no port and token")
        return Preamble(kind, answer.data_token)

    async def _renew(self, timeout_seconds: float) -> None:
        request = remote_pb2.RenewLeaseRequest(migration_id=self.migration_id)
        await self._call(self._stub.RenewLease(request, timeout=timeout_seconds))

    async def _connect(self, host: str, port: int, preamble: Preamble) -> socket.socket:
        loop = asyncio.get_running_loop()
        peer = f"{host}:{port}"
        with contextlib.ExitStack() as stack:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[
                        0
                    ]
                    sock = stack.enter_context(socket.socket(family, kind, protocol))
                    sock.setblocking(False)
                    await loop.sock_connect(sock, address)
                    await loop.sock_sendall(sock, preamble.encode())
                    verdict = await loop.sock_recv(sock, 1)
            except (OSError, TimeoutError) as exc:
                raise PeerUnavailable(
                    peer,
                    f"the data port is not reachable ({str(exc) or 'no answer in time'})",
                    remedy="open this port between the nodes (data_port in phauld's configuration)",
                ) from exc
            if verdict != bytes([Verdict.ACCEPTED]):
                raise RemoteProtocolError(peer, "the data port refused the token that it had just given")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            set_pace(sock, self._limit_bytes_per_second)
            sock.setblocking(True)
            stack.pop_all()
            return sock

    async def _call(self, call: Awaitable[_Answer]) -> _Answer:
        try:
            answer = await call
        except grpc.aio.AioRpcError as exc:
            # whoever keeps the error would keep the call with its frames, and a call keeps its connection open
            raise from_rpc_error(self.address, exc) from exc.with_traceback(None)
        finally:
            del call
        if answer is None:  # so gRPC tells of bytes that are no message of this kind
            raise RemoteProtocolError(self.address, "its answer cannot be read")
        return answer
