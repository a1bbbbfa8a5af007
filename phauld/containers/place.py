"""A container's place at its destination: files, cgroups, the runtime's record of it, links.

Everything is made before the freeze, by the runtime itself: `create` makes the cgroups with their limits and a record
in the form of this node's version. The init that it makes is killed at once; the restored one takes its place in the
record while it is still held. The invariant: what is here before the commit is undone by `discard`, after it by nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from google.protobuf import json_format

from phaul.v1 import remote_pb2, types_pb2
from phaul_client.containers.inspect import read_init, read_record, record_path
from phaul_client.containers.links import announce
from phaul_client.containers.mounts import restore_externals
from phaul_client.containers.programs import command
from phaul_client.containers.runtimes import ContainerName, parse_container, runtime_of
from phaul_client.errors import InvalidRequest, PhaulError
from phaul_client.tree import wait_until_gone
from phaul_criu import child
from phaul_criu.requests import InheritFd, RestoreOptions
from phauld.containers.cgroups import cgroups_of, join, mounts
from phauld.containers.checks import check_container
from phauld.containers.files import unpack
from phauld.proc import start_ticks
from phauld.whole_files import write_json

logger = logging.getLogger(__name__)

PROGRAM_SECONDS: Final = 30.0
#: What a created container waits at, in the directory of its record.
STARTS_BY: Final = "exec.fifo"
UNFINISHED_SECONDS: Final = 2.0
FIRST_RETRY_SECONDS: Final = 0.5
LAST_RETRY_SECONDS: Final = 60.0


class ContainerPlace:
    """The place of one container, in a directory of phaul's: its bundle."""

    #: Whether it must be open before there is a criu for it.
    is_opened_first = False

    def __init__(self, container: types_pb2.Container, directory: Path) -> None:
        """Raises `InvalidRequest`, and `PhaulError` UNSUPPORTED for a runtime whose containers do not move."""
        name = parse_container(f"{container.runtime}:{container.id}")
        assert name is not None
        self.name: ContainerName = name
        self.directory = directory
        self._runtime = runtime_of(name)
        self._container = container
        self._is_made = False  # the runtime knows it
        self._is_recovered = False
        self._is_discarded = False
        self._given_up = asyncio.Event()
        self._cgroups: Mapping[str, str] = {}
        self._log_fds: tuple[int, ...] = ()

    @classmethod
    def from_journal(cls, known: Mapping[str, Any]) -> ContainerPlace:
        """As `note` left it."""
        found = cls(json_format.ParseDict(known["container"], types_pb2.Container()), Path(known["directory"]))
        found._is_made = found._is_recovered = True
        return found

    def note(self) -> dict[str, Any]:
        """For the journal: what a later phauld has to know to undo it."""
        small = types_pb2.Container()
        small.CopyFrom(self._container)
        small.ClearField("config")
        if small.HasField("podman"):
            small.podman.ClearField("archive")
        return {"container": json_format.MessageToDict(small), "directory": str(self.directory)}

    @property
    def has_cgroup_namespace(self) -> bool:
        """Whether its cgroups are the roots of what it sees. Of a place from the journal that is not known."""
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            namespaces = json.loads(self._container.config)["linux"]["namespaces"]
            return any(each["type"] == "cgroup" for each in namespaces)
        return False

    @property
    def bundle(self) -> Path:
        """Where its config.json is."""
        return self.directory

    @property
    def rootfs(self) -> Path:
        """Its files."""
        return self.directory / "rootfs"

    @property
    def mountpoint(self) -> Path:
        """Where its files are mounted while criu builds the tree."""
        return self.rootfs

    async def check(self) -> None:
        """Whether it can be here. Raises `PhaulError`."""
        await check_container(self._runtime, self.name, self._container)

    async def open(self) -> None:
        """Make the bundle, without its files. Raises `OSError`, `InvalidRequest`."""
        try:
            config = json.loads(self._container.config)
            config["root"]["path"] = "rootfs"
        except (ValueError, KeyError, TypeError) as exc:
            raise InvalidRequest(f"{self.name}: its config.json is none: {exc}") from exc
        self.directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory.mkdir(mode=0o711)
        self.rootfs.mkdir(mode=0o755)
        (self.directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

    async def take(self, requests: AsyncIterator[remote_pb2.PutFilesRequest], first: remote_pb2.PutFilesRequest) -> int:
        """Write what comes; the bytes of it. Raises `ImageCorrupt`, `NoRoom`, and what `create` raises."""
        written = await unpack(self.rootfs, requests, first, self._take_log)
        if not self._is_made:
            await child.finish(self._create())
        return written

    def _take_log(self, data: bytes) -> None:
        """Add to the log that another keeps of it."""
        raise InvalidRequest(f"nobody keeps a log of {self.name}")

    async def _create(self) -> None:
        """Let the runtime make it, and end the init that comes with it before it can be started."""
        self._is_made = True
        log = self.directory / "create.log"
        argv = ["create", "--bundle", str(self.bundle), self.name.id]
        with log.open("wb") as output:
            running = await child.spawn([*self._program(), *argv], stdout=output, stderr=output)
            async with running:
                try:
                    async with asyncio.timeout(PROGRAM_SECONDS):
                        status = await running.wait()
                except TimeoutError:
                    status = -1
        if status != 0:
            said = log.read_text(errors="replace").strip()[-500:]
            raise PhaulError(f"{self._runtime.name} create {self.name.id}: {said or status}", reason="RESTORE_FAILED")
        init = read_init(self._runtime, self.name)
        self._cgroups = await asyncio.to_thread(
            cgroups_of, init.pid, every=self._container.cgroup_manager == "disabled"
        )
        os.kill(init.pid, signal.SIGKILL)
        await wait_until_gone(init.pid)

    def restore_options(self, options: RestoreOptions) -> RestoreOptions:
        """The same, for a container. Raises `PhaulError`."""
        if not self._is_made:
            raise PhaulError(f"the files of {self.name} have not come", reason="WRONG_PHASE")
        externals = tuple(restore_externals(self._container, self._cgroups))
        inherited = tuple(InheritFd(key=self._container.log, fd=fd) for fd in self._log_fds)
        return dataclasses.replace(
            options, root=str(self.mountpoint), external=(*options.external, *externals), inherit_fds=inherited
        )

    @contextlib.contextmanager
    def log(self, carried: tuple[Path, ...]) -> Iterator[tuple[int, ...]]:
        """The file that its output goes to, opened for criu to inherit. Raises `OSError`."""
        if not self._container.log or not carried:
            yield ()
            return
        carried[0].parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        fd = os.open(carried[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        try:
            self._log_fds = (fd,)  # criu's number for it, and for a moment ours
            yield self._log_fds
        finally:
            os.close(fd)

    async def enter(self, criu_pid: int) -> None:
        """Before a restore: criu joins the cgroups, and the root becomes a mount. Raises `OSError`, `PhaulError`."""
        for path in set(self._cgroups.values()):
            await asyncio.to_thread(join, Path(path) / "cgroup.procs", criu_pid)
        await command(["mount", "--bind", str(self.rootfs), str(self.mountpoint)])
        await command(["mount", "--make-private", str(self.mountpoint)])

    async def leave(self) -> None:
        """After a restore, whatever came of it: the tree has a root of its own."""
        while any(each.point == str(self.mountpoint) for each in mounts()):  # bound to itself: os.path does not see it
            await command(["umount", "--lazy", str(self.mountpoint)])

    def adopt(self, pid: int) -> None:
        """Make the runtime's record name the tree. Raises `OSError`, `ValueError`, `KeyError`."""
        assert self._runtime.with_init is not None
        path = record_path(self._runtime, self.name.id)
        record = self._runtime.with_init(read_record(self._runtime, self.name.id), pid, start_ticks(pid))
        mode = path.stat().st_mode & 0o777
        write_json(str(path.parent), path.name, record)
        path.chmod(mode)
        (path.parent / STARTS_BY).unlink(missing_ok=True)  # else the runtime would take it for one that waits

    async def show(self) -> None:
        """Connect its links, and tell the neighbours. Raises `PhaulError`."""
        for link in self._container.links:
            bridge = ["master", link.bridge] if link.bridge else []
            await command(["ip", "link", "set", "dev", link.outer, *bridge, "up"])
            for address in link.addresses:
                announce(link, address)

    async def attend(self, record: Path) -> None:
        """The shim of that directory is the parent of its tree."""

    async def settle(self) -> None:
        """It runs, and nothing that was made for the restore is needed any more."""

    async def discard(self) -> None:
        """It never ran here: nothing of it is left. Raises `PhaulError`, `OSError`; it may be called again then."""
        await self._discard()
        self._is_discarded = True

    async def is_gone(self) -> bool:
        """Whether it was discarded: tried again and again, unless `give_up` comes first."""
        seconds = FIRST_RETRY_SECONDS
        while not self._is_discarded:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._given_up.wait()
                    return False
            try:
                await self.discard()
            except (PhaulError, OSError) as exc:
                logger.error("container not discarded yet name=%s error=%s", self.name, exc)
            seconds = min(2 * seconds, LAST_RETRY_SECONDS)
        return True

    def give_up(self) -> None:
        """What could not be discarded is the next phauld's."""
        self._given_up.set()

    async def _discard(self) -> None:
        if self._is_recovered and record_path(self._runtime, self.name.id).parent.exists() and not self._is_ours():
            await asyncio.sleep(UNFINISHED_SECONDS)  # a `create` that an earlier phauld began may be about to end
        if self._is_made and self._is_ours():
            await command([*self._program(), "delete", "--force", self.name.id], PROGRAM_SECONDS)
            if self._is_ours():  # runc's status is 0 all the same
                raise PhaulError(f"{self._runtime.name} has not deleted {self.name.id}")
        await self.leave()
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)

    def _is_ours(self) -> bool:
        """Whether the record is the one that was made here."""
        try:
            init = read_init(self._runtime, self.name)
        except (OSError, ValueError, KeyError):
            return False
        return init.bundle == str(self.bundle)

    def _program(self) -> list[str]:
        return [self._runtime.name, *self._runtime.manager(self._container.cgroup_manager or "cgroupfs")]
