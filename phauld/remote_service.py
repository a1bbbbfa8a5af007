"""`phaul.v1.Remote`: the destination's half of a migration. One short method per call: decode, session, encode."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import re
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import grpc

from phaul.v1 import remote_pb2, remote_pb2_grpc, types_pb2
from phaul_client.compatibility import check_peer
from phaul_client.errors import (
    InvalidRequest,
    MigrationNotFound,
    PhaseError,
    PhaulError,
    TooManyMigrations,
)
from phaul_client.modes import Mode
from phaul_client.pipe import LinkTerms, PipeTls
from phaul_client.pipe_choice import Compression
from phaul_client.timeline import steps_since
from phauld import convert, placement, session
from phauld.access import may_drive
from phauld.container_place import ContainerPlace, check_place
from phauld.dataport import DataPort
from phauld.guard import CALLER
from phauld.incoming import Incoming, Session
from phauld.journal import IncomingEntry, Journal
from phauld.node import Node, memory_available_bytes
from phauld.observer import NOBODY, Observer
from phauld.options import parse_options, restore_options
from phauld.page_stream import PipeTerms
from phauld.placement import Promise
from phauld.podman_place import place_of
from phauld.preflight import check_destination
from phauld.session import Event, Phase
from phauld.workloads import Workloads, WorkloadSpec

logger = logging.getLogger(__name__)

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
MIN_LEASE_SECONDS: Final = 1.0
MAX_LEASE_SECONDS: Final = 3600.0
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What this node grants to what comes in."""

    images_dir: Path
    memory_dir: Path | None
    log_dir: Path
    lease_seconds: float
    max_incoming: int
    clear_pages: bool  #: pages may come without TLS though gRPC has it


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
        self._journal = journal
        self._terms = terms
        self._workloads = workloads
        self._data_port = data_port
        self._sessions: dict[str, Session] = {}
        self._observer = observer

    @property
    def active(self) -> int:
        """Sessions that have not ended."""
        return sum(each.phase not in session.FINAL for each in self._sessions.values())

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Those that still have something to do, or to be asked about."""
        return tuple(self._sessions.values())

    async def recover(self) -> None:
        """Bring to their end the sessions that an earlier phauld left."""
        for entry in await self._journal.unfinished_incoming():
            logger.warning("recovering session migration_id=%s phase=%s", entry.migration_id, entry.phase)
            found = self._from_journal(entry)
            self._sessions[entry.migration_id] = found
            await found.recover()

    async def close(self) -> None:
        """phauld stops: see `Session.close`."""
        await asyncio.gather(*(each.close() for each in tuple(self._sessions.values())))

    async def CheckTree(self, request: remote_pb2.CheckTreeRequest, context: Context) -> remote_pb2.CheckTreeResponse:
        _check_source(request.source)
        problems = await check_destination(self._node, request.tree, request.source, request.options)
        if request.HasField("container"):
            problems += await check_place(self._place_for(request.container, "check"), self._node.name)
        return remote_pb2.CheckTreeResponse(problems=problems, destination=self._info())

    async def OpenSession(
        self, request: remote_pb2.OpenSessionRequest, context: Context
    ) -> remote_pb2.OpenSessionResponse:
        if request.destination_node_id not in ("", self._node.node_id):
            raise PhaulError(f"this is node {self._node.name}, not the one that was asked for", reason="NODE_MISMATCH")
        _check_source(request.source)
        known = await self._find(request.migration_id)
        if known is None and self.active >= self._terms.max_incoming:
            raise TooManyMigrations(
                f"{self._node.name} receives {self.active} migrations already", remedy="try again in a moment"
            )
        opened = known or self._new_session(request)
        if known is None:
            self._sessions[request.migration_id] = opened
        try:
            await opened.open()
        except BaseException:
            if known is None:
                self._sessions.pop(request.migration_id, None)  # an abort may have dropped it
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
        found = await self._get(request.migration_id)
        packing = Compression.OFF if request.packed else None  # of questions, which are small
        terms = LinkTerms(tls=self._stream_tls(wants_tls=request.tls), packing=packing)
        return remote_pb2.OpenStreamResponse(data_port=self._data_port.port, data_token=found.open_stream(terms))

    async def StartIter(self, request: remote_pb2.StartIterRequest, context: Context) -> remote_pb2.StartIterResponse:
        await (await self._get(request.migration_id)).start_iter()
        return remote_pb2.StartIterResponse()

    async def StopIter(self, request: remote_pb2.StopIterRequest, context: Context) -> remote_pb2.StopIterResponse:
        found = await self._get(request.migration_id)
        await found.stop_iter()
        return remote_pb2.StopIterResponse(bytes_received=found.bytes_received)

    async def PutImages(
        self, request_iterator: AsyncIterator[remote_pb2.PutImagesRequest], context: Context
    ) -> remote_pb2.PutImagesResponse:
        first = await anext(request_iterator, None)
        if first is None:
            raise InvalidRequest("PutImages without a message")
        found = await self._get(first.migration_id)
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
        found = await self._get(first.migration_id)
        found.check_takes_files()
        found.renew()
        async with contextlib.aclosing(found.sync.serve(first, request_iterator)) as answers:
            async for answer in answers:
                yield answer

    async def Restore(self, request: remote_pb2.RestoreRequest, context: Context) -> remote_pb2.RestoreResponse:
        arrival = time.monotonic()
        found = await self._get(request.migration_id)
        found.take_marks()
        await found.restore(request.image_files)
        steps = steps_since(arrival, found.take_marks(), self._node.name)
        return remote_pb2.RestoreResponse(pid=found.pid, timeline=steps, session=self._message(found))

    async def Commit(self, request: remote_pb2.CommitRequest, context: Context) -> remote_pb2.CommitResponse:
        arrival = time.monotonic()
        self._check_node(request.destination_node_id)
        found = await self._get(request.migration_id)
        found.take_marks()
        await found.commit()
        steps = steps_since(arrival, found.take_marks(), self._node.name)
        return remote_pb2.CommitResponse(pid=found.pid, timeline=steps, session=self._message(found))

    async def Abort(self, request: remote_pb2.AbortRequest, context: Context) -> remote_pb2.AbortResponse:
        found = await self._find(request.migration_id)
        if found is None:
            found = self._session(Incoming.unknown(request.migration_id, owner=CALLER.get()), Phase.ABSENT)
            self._sessions[request.migration_id] = found
            await found.abort()
            await found.cleaned()  # there was nothing to clean
            self._sessions.pop(
                request.migration_id, None
            )  # the journal remembers it; whoever asks makes no memory grow
        else:
            await found.abort()
        return remote_pb2.AbortResponse(phase=convert.session_phase(found.phase))

    async def GetSession(
        self, request: remote_pb2.GetSessionRequest, context: Context
    ) -> remote_pb2.GetSessionResponse:
        self._check_node(request.destination_node_id)
        found = await self._get(request.migration_id)
        await found.fire(Event.GET_SESSION)
        return remote_pb2.GetSessionResponse(session=self._message(found))

    async def RenewLease(
        self, request: remote_pb2.RenewLeaseRequest, context: Context
    ) -> remote_pb2.RenewLeaseResponse:
        found = await self._get(request.migration_id)
        if found.phase not in session.LEASED:
            raise found.failure or PhaseError(found.phase, "RENEW_LEASE")
        found.renew()
        return remote_pb2.RenewLeaseResponse(
            lease=convert.duration(found.incoming.lease_seconds), session=self._message(found)
        )

    async def PutFiles(
        self, request_iterator: AsyncIterator[remote_pb2.PutFilesRequest], context: Context
    ) -> remote_pb2.PutFilesResponse:
        first = await anext(request_iterator, None)
        if first is None:
            raise InvalidRequest("PutFiles without a message")
        found = await self._get(first.migration_id)
        return remote_pb2.PutFilesResponse(bytes=await found.put_files(request_iterator, first))

    def _place_for(self, container: types_pb2.Container, migration_id: str) -> ContainerPlace:
        """Raises `InvalidRequest`, and `PhaulError` UNSUPPORTED."""
        if self._node.containers_dir is None:
            raise PhaulError("this node takes no containers", reason="UNSUPPORTED")
        return place_of(container, self._node.containers_dir, migration_id, self._node.criu.binary)

    def _new_session(self, request: remote_pb2.OpenSessionRequest) -> Session:
        options = parse_options(request.options)
        lease = convert.seconds_of(request.lease) or self._terms.lease_seconds
        carried = tuple(Path(file.path) for file in request.carried_files)
        for path in carried:
            if path.parent != self._terms.log_dir or path.name == ".." or "\0" in path.name:
                raise InvalidRequest(
                    f"{str(path)!r} would be written outside of {self._terms.log_dir}, where this node keeps logs",
                    remedy="use the same log_dir on both nodes",
                )
        place = self._place(request.expected_bytes)
        if request.HasField("workload"):
            spec = convert.workload_spec(request.workload)
        else:
            spec = WorkloadSpec(name=f"moved-{request.migration_id[:8]}", argv=(), new_pid_namespace=False)
        incoming = Incoming(
            migration_id=request.migration_id,
            source_node_id=request.source.node_id,
            spec=spec,
            restore=restore_options(options),
            carried=carried,
            lease_seconds=min(max(lease, MIN_LEASE_SECONDS), MAX_LEASE_SECONDS),
            promise=Promise(bytes=request.expected_bytes, in_memory=place.in_memory),
            place=place.reason,
            postcopy=options.mode in (Mode.POST_COPY, Mode.HYBRID),
            stands_still=options.mode is Mode.STOP_COPY,
            addresses=options.addresses,
            hooks=options.hooks,
            container=(
                self._place_for(request.container, request.migration_id) if request.HasField("container") else None
            ),
            source_name=request.source.node_name,
            owner=CALLER.get(),
            pipe=self._pipe_terms(request),
            sync=options.sync,
            sync_overwrite=options.sync_overwrite,
        )
        logger.info("images migration_id=%s place=%s reason=%r", request.migration_id, place.directory, place.reason)
        return self._session(incoming, Phase.ABSENT, place.directory)

    def _pipe_terms(self, request: remote_pb2.OpenSessionRequest) -> PipeTerms | None:
        """Raises `PhaulError` PEER_INCOMPATIBLE: what came by TLS sends its pages under TLS, too."""
        tls = self._stream_tls(wants_tls=request.HasField("page_pipe") and request.page_pipe.tls)
        if not request.HasField("page_pipe"):
            return None
        hands_over = request.page_pipe.kernel_tls
        if hands_over and not (tls is not None and tls.kernel):
            raise PhaulError("this node's kernel does no TLS", reason="PEER_INCOMPATIBLE", remedy="try again")
        return PipeTerms(tls=tls, hands_over=hands_over)

    def _stream_tls(self, *, wants_tls: bool) -> PipeTls | None:
        """How a stream of this caller's pages comes. Raises `PhaulError` PEER_INCOMPATIBLE: by TLS, if it came so."""
        guard, owner = self._node.guard, CALLER.get()
        if not wants_tls:
            if owner and not self._terms.clear_pages:
                remedy = "a newer phauld at the source, or --insecure on both nodes until then"
                raise PhaulError("pages would travel in clear", reason="PEER_INCOMPATIBLE", remedy=remedy)
            return None
        if guard is None or not owner:
            raise PhaulError("this phauld has no TLS", reason="PEER_INCOMPATIBLE", remedy="--tls-dir on both nodes")
        return guard.pipe_tls(owner)

    def _place(self, expected_bytes: int) -> placement.Place:
        memory_dir = self._terms.memory_dir
        room = placement.Room(
            memory_available_bytes=memory_available_bytes(),
            memory_dir=memory_dir,
            memory_dir_free_bytes=shutil.disk_usage(memory_dir).free if memory_dir is not None else 0,
            disk_dir=self._terms.images_dir,
            disk_dir_free_bytes=shutil.disk_usage(self._terms.images_dir).free,
        )
        return placement.place(expected_bytes, room, (each.promise for each in self._sessions.values()))

    def _session(self, incoming: Incoming, phase: Phase, images_dir: Path | None = None) -> Session:
        journal = self._journal.incoming(incoming.migration_id, incoming.source_node_id)
        if incoming.owner:
            journal.note(owner=incoming.owner)
        return Session(
            incoming,
            directory=(images_dir or self._terms.images_dir) / f"in-{incoming.migration_id}",
            criu=self._node.criu,
            workloads=self._workloads,
            data_port=self._data_port,
            journal=journal,
            phase=phase,
            on_end=self._drop,
            node_name=self._node.name,
            hooks=self._node.hooks,
            sync=self._node.sync,
        )

    def _drop(self, ended: Session) -> None:
        """The journal says all that is left to say."""
        if self._sessions.pop(ended.incoming.migration_id, None) is not None:
            self._observer.session_ended(ended)

    def _from_journal(self, entry: IncomingEntry) -> Session:
        found = self._session(Incoming.from_journal(entry), entry.phase)
        found.remember(entry)
        return found

    async def _find(self, migration_id: str) -> Session | None:
        """Raises `InvalidRequest` for what is no id: it becomes part of a path; UNAUTHORIZED for another's session."""
        if not _ID.fullmatch(migration_id):
            raise InvalidRequest(f"{migration_id!r} is not a migration id")
        found = await self._look_up(migration_id)
        if found is not None and not may_drive(found.incoming.owner, CALLER.get()):
            logger.warning("refused migration_id=%s owner=%s caller=%s", *_whose(found))
            raise PhaulError(f"{migration_id} belongs to another node", reason="UNAUTHORIZED")
        return found

    async def _look_up(self, migration_id: str) -> Session | None:
        if migration_id not in self._sessions:
            entry = await self._journal.get_incoming(migration_id)
            if entry is None:
                return self._sessions.get(migration_id)  # perhaps opened meanwhile
            if entry.cleaned and entry.phase in session.FINAL:  # an answer for who asks, nothing to keep
                return self._sessions.get(migration_id) or self._from_journal(entry)
            return self._sessions.setdefault(migration_id, self._from_journal(entry))
        return self._sessions[migration_id]

    async def _get(self, migration_id: str) -> Session:
        found = await self._find(migration_id)
        if found is None:
            raise MigrationNotFound(migration_id)
        return found

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
            created_at=convert.timestamp(found.created_at),
            phase_since=convert.timestamp(found.phase_since),
            lease_expires_at=convert.timestamp(found.lease_expires_at) if leased else None,
            error=convert.failure(found.failure) if found.failure is not None else None,
        )


def _check_source(source: types_pb2.NodeInfo) -> None:
    """Raises `PhaulError` PEER_INCOMPATIBLE for a node that says who it is and does not fit."""
    if source.node_id or source.api_features:
        check_peer(source.node_name, source.version, source.api_features)


def _whose(found: Session) -> tuple[str, str, str]:
    return found.incoming.migration_id, found.incoming.owner, CALLER.get()
