"""The place of a container that podman keeps: podman takes it in before the freeze, and criu builds the tree in it.

`podman container restore --import` makes the storage, the network and the monitor, and calls phaul's stand-in for the
runtime (podman_runtime.py), which leaves a process to the monitor that stands for the container. The monitor's pipes
and podman's network namespace are given to criu. The invariant: until the commit podman knows a container that "runs"
without one process of it, and that is removed by `discard`; nothing that podman does to it can start a second copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from phaul.v1 import remote_pb2, types_pb2
from phaul_client.containers.links import announce
from phaul_client.containers.podman import (
    NETWORK_KEY,
    STAND_IN_FILES,
    inspect_podman,
    podman,
    prepare_stand_in,
)
from phaul_client.containers.programs import command, ip
from phaul_client.errors import InvalidRequest, PhaulError
from phaul_criu.requests import InheritFd, RestoreOptions
from phauld.containers import podman_runtime
from phauld.containers.cgroups import join
from phauld.containers.checks import called, check_podman
from phauld.containers.place import UNFINISHED_SECONDS, ContainerPlace
from phauld.containers.stand_in import StandIn, listen
from phauld.containers.unheard import let_speak, unheard

logger = logging.getLogger(__name__)

_ID: Final = re.compile(r"[0-9a-f]{64}")
_FILES: Final = (*STAND_IN_FILES, "socket", "restore.tar", "create.log")


def place_of(container: types_pb2.Container, parent: Path, migration_id: str, criu: Path) -> ContainerPlace:
    """A place for that container below `parent`. Raises `InvalidRequest`, `PhaulError` UNSUPPORTED."""
    if container.HasField("podman"):
        return PodmanPlace(container, parent / f"podman-{container.id[:12]}@{migration_id}", criu)
    return ContainerPlace(container, parent / f"{container.runtime}-{container.id}@{migration_id}")


def place_from_journal(known: Mapping[str, Any]) -> ContainerPlace:
    """As `ContainerPlace.note` left it."""
    kind = PodmanPlace if "podman" in known["container"] else ContainerPlace
    return kind.from_journal(known)


class PodmanPlace(ContainerPlace):
    """See above."""

    is_opened_first = True

    def __init__(self, container: types_pb2.Container, directory: Path, criu: Path | None = None) -> None:
        super().__init__(container, directory)
        if not _ID.fullmatch(container.id):
            raise InvalidRequest(f"{container.id!r} is no id of podman's")
        self._criu = criu
        self._bundle: Path | None = None
        self._rootfs: Path | None = None
        self._log_path: Path | None = None
        self._network_path = ""
        self._descriptors: dict[str, int] = {}  # what criu calls them, as phauld had them
        self._open: set[int] = set()  # of those, and not yet given away
        self._stand_in: StandIn | None = None

    @property
    def bundle(self) -> Path:
        assert self._bundle is not None
        return self._bundle

    @property
    def rootfs(self) -> Path:
        assert self._rootfs is not None
        return self._rootfs

    @property
    def mountpoint(self) -> Path:
        return self.directory / "root"

    @property
    def _table(self) -> str:
        return f"phaul_{self.name.id[:12]}"

    async def check(self) -> None:
        await check_podman(self._runtime, self.name, self._container)

    async def open(self) -> None:
        """Have podman take it in. Raises `OSError`, `PhaulError`."""
        assert self._criu is not None
        self.directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory.mkdir(mode=0o711)
        self.mountpoint.mkdir()
        archive = self.directory / "restore.tar"
        archive.write_bytes(self._container.podman.archive)
        env = prepare_stand_in(self.directory, self._runtime.name, self._criu, Path(podman_runtime.__file__))
        links = self._container.links if self._container.podman.network else ()
        async with unheard(self._table, [link.mac for link in links]):
            with listen(self.directory) as server:
                await podman(("container", "restore", "--import", str(archive)), env=env)
                self._stand_in, pipes = await asyncio.to_thread(StandIn.receive, server)
            await self._take_over(pipes)

    async def _take_over(self, pipes: list[int]) -> None:
        for key, descriptor in zip(self._container.podman.pipes, pipes, strict=False):
            if key and key not in self._descriptors:
                self._descriptors[key] = descriptor
                self._open.add(descriptor)
            else:
                os.close(descriptor)
        await self._look()
        for outer in (await self._outers()).values():
            await command(["ip", "link", "set", "dev", outer, "down"])
        if self._network_path:
            network = os.open(self._network_path, os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors[NETWORK_KEY] = network
            self._open.add(network)

    async def _look(self) -> None:
        """What podman has made. Raises `PhaulError`."""
        found = await inspect_podman(self.name.id)
        self._bundle = Path(found.static_dir)
        self._log_path = found.log_path
        config = json.loads((self._bundle / "config.json").read_text(encoding="utf-8"))
        self._rootfs = Path(config["root"]["path"])
        sources = {each["destination"].rstrip("/"): each["source"] for each in config["mounts"]}
        for each in self._container.mounts:
            if not each.source:
                if each.mountpoint not in sources:
                    raise PhaulError(
                        f"podman makes no {each.mountpoint} for {called(self._container)} here", reason="UNSUPPORTED"
                    )
                each.source = sources[each.mountpoint]
        namespaces = {each["type"]: each.get("path", "") for each in config["linux"]["namespaces"]}
        self._network_path = namespaces.get("network", "")

    async def _outers(self) -> dict[str, str]:
        """By the name of an interface of its network, the other end of it."""
        if not self._network_path:
            return {}
        inside = await ip(["link", "show"], ("nsenter", f"--net={self._network_path}", "--"))
        here = {each["ifindex"]: each["ifname"] for each in await ip(["link", "show"])}
        ends = {each["ifname"]: here.get(each.get("link_index", 0), "") for each in inside}
        return {name: outer for name, outer in ends.items() if outer}

    @contextlib.contextmanager
    def log(self, carried: tuple[Path, ...]) -> Iterator[tuple[int, ...]]:
        """The monitor's pipes and podman's network namespace, for criu to inherit."""
        try:
            yield tuple(self._descriptors.values())
        finally:
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        while self._open:
            os.close(self._open.pop())

    async def attend(self, record: Path) -> None:
        """What stands for it waits for the shim of that directory from now on. Raises `OSError`."""
        assert self._stand_in is not None
        await asyncio.to_thread(self._stand_in.attend, record)

    async def take(self, requests: AsyncIterator[remote_pb2.PutFilesRequest], first: remote_pb2.PutFilesRequest) -> int:
        if not self._is_made:  # what was deleted from the image comes as nothing
            await asyncio.to_thread(_empty, self.rootfs)
        return await super().take(requests, first)

    def _take_log(self, data: bytes) -> None:
        if self._log_path is not None:
            with self._log_path.open("ab") as file:
                file.write(data)

    def restore_options(self, options: RestoreOptions) -> RestoreOptions:
        options = super().restore_options(options)
        inherited = tuple(InheritFd(key=key, fd=descriptor) for key, descriptor in self._descriptors.items())
        return dataclasses.replace(options, inherit_fds=inherited)

    async def show(self) -> None:
        """Connect its links, and tell the neighbours. Raises `PhaulError`."""
        if not self._network_path:
            await self._look()
        outers = await self._outers()
        masters = {each["ifname"]: each.get("master", "") for each in await ip(["link", "show"])}
        for outer in outers.values():
            await command(["ip", "link", "set", "dev", outer, "up"])
        for link in self._container.links:
            link.bridge = masters.get(outers.get(link.name, ""), "")
            for address in link.addresses:
                announce(link, address)

    async def settle(self) -> None:
        """It runs. What podman takes for it uses its cgroups, in which podman counts. Raises `OSError`."""
        if self._stand_in is not None:
            for path in set(self._cgroups.values()):
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(join, Path(path) / "cgroup.procs", self._stand_in.pid)
            self._stand_in = None
        self._remove_directory()

    async def _discard(self) -> None:
        if self._stand_in is not None:
            self._stand_in.close()
            self._stand_in = None
        self._close_descriptors()
        if not self.directory.exists():
            return
        (self.directory / "runtime").unlink(missing_ok=True)  # a `restore` of an earlier phauld goes no further
        forget = ("container", "rm", "--force", "--ignore", "--time", "0", self.name.id)
        if self._is_recovered:
            await podman(forget)
            await asyncio.sleep(UNFINISHED_SECONDS)
        await self.leave()
        await podman(forget)
        await let_speak(self._table)
        self._remove_directory()

    def _remove_directory(self) -> None:
        """Nothing below what may be a mount."""
        for name in _FILES:
            (self.directory / name).unlink(missing_ok=True)
        for directory in (self.mountpoint, self.directory):
            with contextlib.suppress(FileNotFoundError):
                directory.rmdir()


def _empty(directory: Path) -> None:
    with os.scandir(directory) as entries:
        for each in entries:
            if each.is_dir(follow_symlinks=False):
                shutil.rmtree(each.path)
            else:
                os.unlink(each.path)
