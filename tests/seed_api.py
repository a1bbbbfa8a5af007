"""The seed's own test as a function: both halves in one process over a socket pair, with no daemon and no gRPC.

The caller's `Local` dumps over `config.memfd`, and restores while the dump is held at `post-dump`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from phaul_client import Client, Config
from phaul_client.images import open_directory
from phaul_client.policy import IterStats, Policy
from phaul_criu.criu import Criu
from phaul_criu.requests import DumpOptions, RestoreOptions
from phaul_criu.swrk import Notification
from phauld import Server

Check = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """No check."""


class OwnLocal:
    """A user's `Local`. `before_dump` and `before_restore` may raise: that is its failure."""

    def __init__(
        self, server: Server, directory: Path, before_dump: Check = nothing, before_restore: Check = nothing
    ) -> None:
        self._server = server
        self._directory = directory
        self._before_dump = before_dump
        self._before_restore = before_restore
        self.parent: Path | None = None
        self.restored_pid = 0

    async def dump_copy_restore(self, criu: Criu, config: Config, last_client_images_path: Path | None) -> None:
        self.parent = last_client_images_path
        await self._before_dump()
        with open_directory(self._directory) as images_fd:
            options = DumpOptions(
                images_dir_fd=images_fd,
                pid=config.pid,
                page_server_fd=config.memfd,
                parent_img=str(last_client_images_path) if last_client_images_path else None,
                track_mem=last_client_images_path is not None,
            )
            await criu.dump(options, on_notify=self._notified)

    async def _notified(self, notification: Notification) -> None:
        if notification.name == "post-dump":
            await self._before_restore()
            await self._restore()

    async def _restore(self) -> None:
        """The pages are at the server already; put the small images beside them."""
        images = self._server.last_images_dir
        assert images is not None
        for image in self._directory.glob("*.img"):
            os.link(image, images / image.name)
        with open_directory(images) as images_fd:
            self.restored_pid = await self._server.criu.restore(RestoreOptions(images_dir_fd=images_fd))


@dataclass
class OwnRemote:
    """A `Server` as the remote, with a record of what was called."""

    server: Server
    calls: list[str] = field(default_factory=list)
    start_fails: bool = False
    stop_fails: bool = False

    async def start_iter(self) -> None:
        self.calls.append("start")
        if self.start_fails:
            raise ConnectionError("start_iter is not possible")
        await self.server.start_iter()

    async def stop_iter(self) -> None:
        self.calls.append("stop")
        await self.server.stop_iter()
        if self.stop_fails:
            raise ConnectionError("stop_iter is not possible")


@dataclass
class Halves:
    """Both halves of one migration, wired to each other."""

    client: Client
    local: OwnLocal
    remote: OwnRemote
    config: Config

    async def migrate(self, timeout_seconds: float = 60.0) -> tuple[IterStats, ...]:
        async with asyncio.timeout(timeout_seconds):
            return await self.client.migrate()


@contextmanager
def both_halves(
    directory: Path,
    pid: int,
    *,
    before_dump: Check = nothing,
    before_restore: Check = nothing,
    policy: Policy | None = None,
) -> Iterator[Halves]:
    """Everything that a migration of `pid` needs, below `directory`; the socket pair is closed at the end."""
    directories = {name: directory / name for name in ("local", "remote", "test")}
    for each in directories.values():
        each.mkdir(parents=True)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = Server(Config(pid=pid, memfd=theirs.fileno(), wdir=directories["remote"]))
        local = OwnLocal(server, directories["test"], before_dump, before_restore)
        remote = OwnRemote(server)
        config = Config(pid=pid, memfd=ours.fileno(), wdir=directories["local"])
        yield Halves(Client(local, remote, config, policy=policy), local, remote, config)
