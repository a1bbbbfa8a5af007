"""A destination in this process, as far as it goes without criu."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from phaul.v1 import remote_pb2, remote_pb2_grpc
from phaul_client.errors import PeerRefused
from phaul_client.remote import GrpcRemote
from phaul_criu.criu import Criu, Features
from phaul_criu.version import Version
from phauld.destination.admission import Terms
from phauld.destination.dataport import DataPort
from phauld.destination.remote_service import RemoteService
from phauld.interceptor import ErrorInterceptor
from phauld.journal import Journal
from phauld.node import Node
from phauld.trees.workloads import Workloads

NOTHING_YET = "#!/bin/sh\nexec cat <&$2 >/dev/null\n"  #: in criu's place: waits until its connection ends


@dataclass
class Destination:
    """A destination, and what it keeps where."""

    directory: Path
    service: RemoteService
    address: str
    channel: grpc.aio.Channel
    data_port: DataPort
    journal: Journal

    @property
    def log_dir(self) -> Path:
        return self.directory / "log"

    @property
    def images(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "images").iterdir())

    @property
    def records(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "workloads").iterdir())

    def remote(self, migration_id: str = "move") -> GrpcRemote:
        return GrpcRemote(self.address, self.channel, migration_id)

    @property
    def stub(self) -> remote_pb2_grpc.RemoteAsyncStub:
        stub: remote_pb2_grpc.RemoteAsyncStub = remote_pb2_grpc.RemoteStub(self.channel)
        return stub

    def is_clean(self) -> bool:
        return not self.images and not self.records and not self.data_port._expected


@asynccontextmanager
async def destination(directory: Path, **terms: Any) -> AsyncIterator[Destination]:
    for name in ("images", "log", "workloads"):
        (directory / name).mkdir(exist_ok=True, parents=True)
    criu = directory / "criu"
    criu.write_text(NOTHING_YET)
    criu.chmod(0o755)
    journal = await Journal.open(directory / "journal.sqlite")
    node = Node(
        node_id=journal.node_id,
        name="node-b",
        criu=Criu(criu),
        criu_version=Version(4, 1, 1),
        features=Features(mem_track=False, lazy_pages=True, pidfd_store=True),
        images_dir=directory / "images",
        insecure=True,
        incoming_limit=2,
        outgoing_limit=2,
    )
    workloads = Workloads(directory / "workloads", directory / "log")
    data_port = DataPort()
    await data_port.start("127.0.0.1", 0)
    granted = {"memory_dir": None, "lease_seconds": 30.0, "max_incoming": 2, "clear_pages": True, **terms}
    granted |= {"images_dir": directory / "images", "log_dir": directory / "log"}
    service = RemoteService(node, Terms(**granted), workloads, data_port, journal)
    await service.recover()
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    remote_pb2_grpc.add_RemoteServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    address = f"127.0.0.1:{port}"
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield Destination(directory, service, address, channel, data_port, journal)
    await server.stop(0.1)
    await service.close()
    await data_port.stop()
    await workloads.close()
    await journal.aclose()


def opening(migration_id: str = "move", **fields: Any) -> remote_pb2.OpenSessionRequest:
    return remote_pb2.OpenSessionRequest(migration_id=migration_id, **fields)


def piece(data: bytes = b"line\n", **fields: Any) -> remote_pb2.FilePiece:
    return remote_pb2.FilePiece(**{"size_bytes": len(data), "crc32": zlib.crc32(data), "data": data, **fields})


async def reason(call: Any) -> str:
    with pytest.raises(PeerRefused) as refused:
        await call
    return refused.value.reason
