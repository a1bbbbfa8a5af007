"""What may come in: what this node grants to an opening, before anything is made for it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul.v1 import remote_pb2, types_pb2
from phaul_client.errors import InvalidRequest, PhaulError
from phaul_client.modes import Mode
from phaul_client.pipe import PipeTls
from phauld import convert
from phauld.containers.place import ContainerPlace
from phauld.containers.podman_place import place_of
from phauld.destination import placement
from phauld.destination.incoming_spec import Incoming
from phauld.destination.page_stream import PipeTerms
from phauld.destination.placement import Promise
from phauld.guard import CALLER
from phauld.node import Node, memory_available_bytes
from phauld.options import parse_options, restore_options
from phauld.trees.workload_spec import WorkloadSpec

logger = logging.getLogger(__name__)

MIN_LEASE_SECONDS: Final = 1.0
MAX_LEASE_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What this node grants to what comes in."""

    images_dir: Path
    memory_dir: Path | None
    log_dir: Path
    lease_seconds: float
    max_incoming: int
    clear_pages: bool  #: pages may come without TLS though gRPC has it


class Admission:
    """Of one node. What it refuses, it refuses with `InvalidRequest` or `PhaulError`."""

    def __init__(self, node: Node, terms: Terms) -> None:
        self._node = node
        self._terms = terms

    def admit(self, request: remote_pb2.OpenSessionRequest, promised: Iterable[Promise]) -> tuple[Incoming, Path]:
        """What the caller brings, and where its images go beside what others were `promised`."""
        options = parse_options(request.options)
        carried = tuple(Path(file.path) for file in request.carried_files)
        check_carried(carried, self._terms.log_dir)
        place = self._place(request.expected_bytes, promised)
        incoming = Incoming(
            migration_id=request.migration_id,
            source_node_id=request.source.node_id,
            spec=_spec(request),
            restore=restore_options(options),
            carried=carried,
            lease_seconds=lease_seconds(convert.seconds_of(request.lease), self._terms.lease_seconds),
            promise=Promise(bytes=request.expected_bytes, in_memory=place.in_memory),
            place=place.reason,
            postcopy=options.mode in (Mode.POST_COPY, Mode.HYBRID),
            stands_still=options.mode is Mode.STOP_COPY,
            addresses=options.addresses,
            hooks=options.hooks,
            container=(
                self.place_for(request.container, request.migration_id) if request.HasField("container") else None
            ),
            source_name=request.source.node_name,
            owner=CALLER.get(),
            pipe=self._pipe_terms(request),
            sync=options.sync,
            sync_overwrite=options.sync_overwrite,
            attempts=convert.attempts(request.restarts),
        )
        logger.info("images migration_id=%s place=%s reason=%r", request.migration_id, place.directory, place.reason)
        return incoming, place.directory

    def place_for(self, container: types_pb2.Container, migration_id: str) -> ContainerPlace:
        """Where a container goes."""
        if self._node.containers_dir is None:
            raise PhaulError("this node takes no containers", reason="UNSUPPORTED")
        return place_of(container, self._node.containers_dir, migration_id, self._node.criu.binary)

    def stream_tls(self, *, wants_tls: bool) -> PipeTls | None:
        """How a stream of this caller's pages comes: by TLS, if the caller came so."""
        guard, owner = self._node.guard, CALLER.get()
        if not wants_tls:
            if owner and not self._terms.clear_pages:
                remedy = "a newer phauld at the source, or --insecure on both nodes until then"
                raise PhaulError("pages would travel in clear", reason="PEER_INCOMPATIBLE", remedy=remedy)
            return None
        if guard is None or not owner:
            raise PhaulError("this phauld has no TLS", reason="PEER_INCOMPATIBLE", remedy="--tls-dir on both nodes")
        return guard.pipe_tls(owner)

    def _pipe_terms(self, request: remote_pb2.OpenSessionRequest) -> PipeTerms | None:
        tls = self.stream_tls(wants_tls=request.HasField("page_pipe") and request.page_pipe.tls)
        if not request.HasField("page_pipe"):
            return None
        hands_over = request.page_pipe.kernel_tls
        if hands_over and not (tls is not None and tls.kernel):
            raise PhaulError("this node's kernel does no TLS", reason="PEER_INCOMPATIBLE", remedy="try again")
        return PipeTerms(tls=tls, hands_over=hands_over)

    def _place(self, expected_bytes: int, promised: Iterable[Promise]) -> placement.Place:
        memory_dir = self._terms.memory_dir
        room = placement.Room(
            memory_available_bytes=memory_available_bytes(),
            memory_dir=memory_dir,
            memory_dir_free_bytes=shutil.disk_usage(memory_dir).free if memory_dir is not None else 0,
            disk_dir=self._terms.images_dir,
            disk_dir_free_bytes=shutil.disk_usage(self._terms.images_dir).free,
        )
        return placement.place(expected_bytes, room, promised)


def check_carried(carried: Iterable[Path], log_dir: Path) -> None:
    """Raises `InvalidRequest`: files come to where logs are kept, and nowhere else."""
    for path in carried:
        if path.parent != log_dir or path.name == ".." or "\0" in path.name:
            raise InvalidRequest(
                f"{str(path)!r} would be written outside of {log_dir}, where this node keeps logs",
                remedy="use the same log_dir on both nodes",
            )


def lease_seconds(asked: float, default: float) -> float:
    """What a lease lasts; 0 asks for nothing."""
    return min(max(asked or default, MIN_LEASE_SECONDS), MAX_LEASE_SECONDS)


def _spec(request: remote_pb2.OpenSessionRequest) -> WorkloadSpec:
    if request.HasField("workload"):
        return convert.workload_spec(request.workload)
    return WorkloadSpec(name=f"moved-{request.migration_id[:8]}", argv=(), new_pid_namespace=False)
