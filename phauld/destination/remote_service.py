"""`phaul.v1.Remote`: the destination's half of a migration. One short method per call: decode, session, encode."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc

from phaul.v1 import remote_pb2, remote_pb2_grpc, types_pb2
from phaul_client.compatibility import check_peer
from phaul_client.errors import InvalidRequest, PhaseError, PhaulError, TooManyMigrations
from phaul_client.pipe import LinkTerms
from phaul_client.pipe_choice import Compression
from phaul_client.timeline import steps_since
from phauld import convert, session
from phauld.containers.checks import check_place
from phauld.destination.admission import Admission, Terms
from phauld.destination.dataport import DataPort
from phauld.destination.incoming import Session
from phauld.destination.sessions import Sessions
from phauld.journal import Journal
from phauld.node import Node
from phauld.observer import NOBODY, Observer
from phauld.preflight import check_destination
from phauld.session import Event
from phauld.trees.workloads import Workloads

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RemoteService(remote_pb2_grpc.RemoteServicer):
    """The sessions of this node."""

    def __init__(
        self,
        node: Node,
        terms: Terms,
        workloads: Workloads,
        data_port: DataPort,
        journal: Journal,
        observer: Observer = NOBODY,
    ) -> None:
        self._node = node
        self._max_incoming = terms.max_incoming
        self._data_port = data_port
        self._admission = Admission(node, terms)
        self._sessions = Sessions(node, terms.images_dir, workloads, data_port, journal, observer)

    @property
    def active(self) -> int:
        """Sessions that have not ended."""
        return self._sessions.active

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Those that still have something to do, or to be asked about."""
        return tuple(self._sessions)

    async def recover(self) -> None:
        """Bring to their end the sessions that an earlier phauld left."""
        await self._sessions.recover()

    async def close(self) -> None:
        """phauld stops: see `Session.close`."""
        await self._sessions.close()

    async def CheckTree(self, request: remote_pb2.CheckTreeRequest, context: Context) -> remote_pb2.CheckTreeResponse:
        _check_source(request.source)
        problems = await check_destination(self._node, request.tree, request.source, request.options)
        if request.HasField("container"):
            problems += await check_place(self._admission.place_for(request.container, "check"), self._node.name)
        return remote_pb2.CheckTreeResponse(problems=problems, destination=self._info())

    async def OpenSession(
        self, request: remote_pb2.OpenSessionRequest, context: Context
    ) -> remote_pb2.OpenSessionResponse:
        if request.destination_node_id not in ("", self._node.node_id):
            raise PhaulError(f"this is node {self._node.name}, not the one that was asked for", reason="NODE_MISMATCH")
        _check_source(request.source)
        known = await self._sessions.find(request.migration_id)
        if known is None and self.active >= self._max_incoming:
            raise TooManyMigrations(
                f"{self._node.name} receives {self.active} migrations already", remedy="try again in a moment"
            )
        opened = known or self._sessions.add(*self._admission.admit(request, self._sessions.promised))
        try:
            await opened.open()
        except BaseException:
            if known is None:
                self._sessions.remove(request.migration_id)
            raise
        return remote_pb2.OpenSessionResponse(
            data_port=self._data_port.port,
            data_token=opened.token,
            lease=convert.duration(opened.incoming.lease_seconds),
            destination=self._info(),
            options=request.options,
            session=self._message(opened),
            page_pipe=request.page_pipe if opened.incoming.pipe is not None else None,
            images_place=opened.incoming.place,
        )

    async def OpenStream(
        self, request: remote_pb2.OpenStreamRequest, context: Context
    ) -> remote_pb2.OpenStreamResponse:
        if request.kind != types_pb2.STREAM_KIND_LAZY_PAGES:
            raise InvalidRequest("only streams of lazy pages can be opened later")
        found = await self._sessions.get(request.migration_id)
        packing = Compression.OFF if request.packed else None  # of questions, which are small
        terms = LinkTerms(tls=self._admission.stream_tls(wants_tls=request.tls), packing=packing)
        return remote_pb2.OpenStreamResponse(data_port=self._data_port.port, data_token=found.open_stream(terms))

    async def StartIter(self, request: remote_pb2.StartIterRequest, context: Context) -> remote_pb2.StartIterResponse:
        await (await self._sessions.get(request.migration_id)).start_iter()
        return remote_pb2.StartIterResponse()

    async def StopIter(self, request: remote_pb2.StopIterRequest, context: Context) -> remote_pb2.StopIterResponse:
        found = await self._sessions.get(request.migration_id)
        await found.stop_iter()
        return remote_pb2.StopIterResponse(bytes_received=found.bytes_received)

    async def PutImages(
        self, request_iterator: AsyncIterator[remote_pb2.PutImagesRequest], context: Context
    ) -> remote_pb2.PutImagesResponse:
        first = await anext(request_iterator, None)
        if first is None:
            raise InvalidRequest("PutImages without a message")
        found = await self._sessions.get(first.migration_id)
        with found.writer() as writer:
            for piece in first.pieces:
                writer.write(piece)
            async for message in request_iterator:
                found.check_takes_files()
                for piece in message.pieces:
                    writer.write(piece)
        found.accept(writer)
        return remote_pb2.PutImagesResponse(files=writer.files, bytes=writer.bytes)

    async def SyncFiles(
        self, request_iterator: AsyncIterator[remote_pb2.SyncFilesRequest], context: Context
    ) -> AsyncIterator[remote_pb2.SyncFilesResponse]:
        first = await anext(request_iterator, None)
        if first is None:
            raise InvalidRequest("SyncFiles without a message")
        found = await self._sessions.get(first.migration_id)
        found.check_takes_files()
        found.course.renew()
        async with contextlib.aclosing(found.sync.serve(first, request_iterator)) as answers:
            async for answer in answers:
                yield answer

    async def Restore(self, request: remote_pb2.RestoreRequest, context: Context) -> remote_pb2.RestoreResponse:
        arrival = time.monotonic()
        found = await self._sessions.get(request.migration_id)
        found.course.take_marks()
        await found.restore(request.image_files)
        steps = steps_since(arrival, found.course.take_marks(), self._node.name)
        return remote_pb2.RestoreResponse(pid=found.pid, timeline=steps, session=self._message(found))

    async def Commit(self, request: remote_pb2.CommitRequest, context: Context) -> remote_pb2.CommitResponse:
        arrival = time.monotonic()
        self._check_node(request.destination_node_id)
        found = await self._sessions.get(request.migration_id)
        found.course.take_marks()
        await found.commit()
        steps = steps_since(arrival, found.course.take_marks(), self._node.name)
        return remote_pb2.CommitResponse(pid=found.pid, timeline=steps, session=self._message(found))

    async def Abort(self, request: remote_pb2.AbortRequest, context: Context) -> remote_pb2.AbortResponse:
        found = await self._sessions.find(request.migration_id)
        if found is None:
            found = await self._sessions.abort_unknown(request.migration_id)
        else:
            await found.abort()
        return remote_pb2.AbortResponse(phase=convert.session_phase(found.phase))

    async def GetSession(
        self, request: remote_pb2.GetSessionRequest, context: Context
    ) -> remote_pb2.GetSessionResponse:
        self._check_node(request.destination_node_id)
        found = await self._sessions.get(request.migration_id)
        await found.course.fire(Event.GET_SESSION)
        return remote_pb2.GetSessionResponse(session=self._message(found))

    async def RenewLease(
        self, request: remote_pb2.RenewLeaseRequest, context: Context
    ) -> remote_pb2.RenewLeaseResponse:
        found = await self._sessions.get(request.migration_id)
        if found.phase not in session.LEASED:
            raise found.failure or PhaseError(found.phase, "RENEW_LEASE")
        found.course.renew()
        return remote_pb2.RenewLeaseResponse(
            lease=convert.duration(found.incoming.lease_seconds), session=self._message(found)
        )

    async def PutFiles(
        self, request_iterator: AsyncIterator[remote_pb2.PutFilesRequest], context: Context
    ) -> remote_pb2.PutFilesResponse:
        first = await anext(request_iterator, None)
        if first is None:
            raise InvalidRequest("PutFiles without a message")
        found = await self._sessions.get(first.migration_id)
        return remote_pb2.PutFilesResponse(bytes=await found.put_files(request_iterator, first))

    def _check_node(self, node_id: str) -> None:
        if node_id not in ("", self._node.node_id):
            raise PhaulError("another node was asked", reason="NODE_MISMATCH")

    def _info(self) -> types_pb2.NodeInfo:
        return self._node.info(incoming=self.active)

    def _message(self, found: Session) -> remote_pb2.Session:
        leased = found.phase in session.LEASED
        return remote_pb2.Session(
            migration_id=found.incoming.migration_id,
            phase=convert.session_phase(found.phase),
            source_node_id=found.incoming.source_node_id,
            destination_node_id=self._node.node_id,
            workload=found.incoming.spec.name,
            pid=found.pid,
            rounds=found.rounds,
            bytes_received=found.bytes_received,
            filling=found.is_filling,
            pages_missing=found.pages_missing,
            created_at=convert.timestamp(found.course.created_at),
            phase_since=convert.timestamp(found.course.phase_since),
            lease_expires_at=convert.timestamp(found.course.lease_expires_at) if leased else None,
            error=convert.failure(found.failure) if found.failure is not None else None,
        )


def _check_source(source: types_pb2.NodeInfo) -> None:
    """Raises `PhaulError` PEER_INCOMPATIBLE for a node that says who it is and does not fit."""
    if source.node_id or source.api_features:
        check_peer(source.node_name, source.version, source.api_features)
