"""A phauld in a node: its configuration, its start, its health."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from tests.nodes import Node
from tests.started import Process

BINARY: Final = Path(sys.executable).parent / "phauld"
SOCKET: Final = Path("/run/phaul/phauld.sock")
PORT: Final = 7707
DATA_PORT: Final = 7708
STATE_DIR: Final = Path("/run/phaul/state")
IMAGES_DIR: Final = Path("/run/phaul/images")
LOG_DIR: Final = Path("/run/phaul/log")
READY_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.02


class DaemonFailed(Exception):
    """phauld ended instead of serving, or does not serve in time."""


class Phauld:
    """The daemon of one node. All that it writes is below the node's own /run."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.process: Process | None = None  #: the last one that was started

    @property
    def target(self) -> str:
        """Where this process reaches the daemon by gRPC, across the namespaces."""
        return f"unix:{self._node.root}{SOCKET}"

    def channel(self) -> grpc.aio.Channel:
        """A channel to the daemon; to be closed by the caller."""
        return grpc.aio.insecure_channel(self.target, options=[("grpc.use_local_subchannel_pool", 1)])

    async def start(self, binary: Path | None = None, **config: object) -> Process:
        """Start it and wait until it serves. Raises DaemonFailed."""
        node = self._node
        settings: dict[str, object] = {
            "listen": f"{node.address}:{PORT}",
            "unix": SOCKET,
            "data_port": DATA_PORT,
            "state_dir": STATE_DIR,
            "images_dir": IMAGES_DIR,
            "log_dir": LOG_DIR,
            "node_name": node.name,
            "insecure": True,
            **config,
        }
        file = node.directory / "phauld.toml"
        file.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in settings.items()))
        process = await node.start([binary or node.programs / BINARY.name, "--config", file])
        try:
            await self._until_serving(process)
        except BaseException:
            await process.stop(9)
            raise
        self.process = process
        return process

    async def _until_serving(self, process: Process) -> None:
        request = health_pb2.HealthCheckRequest()
        async with self.channel() as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know no method
            try:
                async with asyncio.timeout(READY_SECONDS):
                    while process.returncode is None:
                        if (self._node.root / SOCKET.relative_to("/")).is_socket():
                            with contextlib.suppress(grpc.aio.AioRpcError):
                                answer = await stub.Check(request, wait_for_ready=True, timeout=1)
                                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                                    return
                        await asyncio.sleep(POLL_SECONDS)
            except TimeoutError:
                raise DaemonFailed(f"phauld does not serve: {process.log.read_text()}") from None
        raise DaemonFailed(f"phauld ended with {process.returncode}: {process.log.read_text()}")


def _toml(value: object) -> str:
    """A string, number or truth value as TOML, which has JSON's notation for them."""
    return json.dumps(str(value) if isinstance(value, Path) else value)
