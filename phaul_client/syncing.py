"""Makes directories at the destination the same as here: while the tree runs, and once more while it stands still.

The invariant: `finish` returns only if everything that the frozen tree can see in them is there, as rsync's checksum of
each file that was sent says. What changed is found by time (rsync, and `find` for what is too fresh to tell), and what
is mapped for writing is compared by content, for its times tell nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from phaul.v1 import migrations_pb2, remote_pb2
from phaul_client import rsync
from phaul_client.errors import PhaulError
from phaul_client.remote import GrpcRemote
from phaul_client.rsync import Copied, Pass
from phaul_client.status import from_rpc_error
from phaul_client.timeline import Step
from phaul_client.tree import descendants
from phaul_criu.child import Child, finish, spawn

logger = logging.getLogger(__name__)

CHUNK_BYTES: Final = 1 << 18
START_SECONDS: Final = 10.0
FIND_SECONDS: Final = 600.0
#: While the tree runs: passes over a directory, and how short the last one is to be.
PASSES: Final = 4
SHORT_SECONDS: Final = 0.5
#: Times of files are coarse: what is so little older than a pass may have changed after it was read.
SLACK_SECONDS: Final = 1.0
SAID_LINES: Final = 3
_SHELL: Final = Path(__file__).with_name("rsync_shell.py")


def _failed(directory: str, why: str, remedy: str = "") -> PhaulError:
    return PhaulError(f"{directory} was not synchronised: {why}", reason="SYNC_FAILED", remedy=remedy)


class FileSync:
    """The directories of one migration. Whoever makes it closes it."""

    def __init__(
        self,
        remote: GrpcRemote,
        directories: Sequence[str],
        pid: int,
        *,
        in_place: bool = True,
        bandwidth_bytes_per_second: int = 0,
        after_dump: bool = False,
    ) -> None:
        """`after_dump`: the dump itself makes files in them (link_remap), so the last pass has to wait for it."""
        self._remote = remote
        self._pid = pid
        self._pass = Pass(in_place=in_place, bandwidth_bytes_per_second=bandwidth_bytes_per_second)
        self._directories = [_Directory(each) for each in directories]
        self._after_dump = after_dump
        self._last: asyncio.Task[None] | None = None
        self._runs: set[_Run] = set()
        self.step: Step | None = None  #: the last pass

    async def copy(self) -> None:
        """All of them, while the tree runs. Raises `PhaulError`."""
        for each in self._directories:
            each.mapped = await asyncio.to_thread(self._mapped, each.path)
            each.since = time.time()
            wanted = dataclasses.replace(self._pass, checksum=True)
            each.before += await self._run(each.path, wanted, first=True, is_last=False)
            for _ in range(PASSES - 1):
                if time.time() - each.since < SHORT_SECONDS:
                    break
                await self._differences(each)

    async def prepare(self) -> None:
        """What changed since; and have the last pass ready, up to its first word. Raises `PhaulError`."""
        for each in self._directories:
            await self._differences(each)
            each.listed = await self._start(each.path, dataclasses.replace(self._pass, listed=True))
            each.all = await self._start(each.path, self._pass)

    def freeze(self) -> None:
        """The tree stands still: begin the last pass, if it can begin already."""
        if self._last is None and not self._after_dump and self._directories:
            self._last = asyncio.create_task(self._finish(), name="sync")

    async def finish(self) -> None:
        """The tree stands still, and is dumped: on return everything is there. Raises `PhaulError`, `OSError`."""
        if self._directories:
            self._last = self._last or asyncio.create_task(self._finish(), name="sync")
            await self._last

    async def aclose(self) -> None:
        """Nothing of it runs after this."""
        await finish(self._close())

    async def _close(self) -> None:
        if self._last is not None:
            self._last.cancel()
            await asyncio.gather(self._last, return_exceptions=True)
        for each in tuple(self._runs):
            await each.aclose()
        self._runs.clear()

    def report(self) -> list[migrations_pb2.SyncedDirectory]:
        """What was copied until now."""
        return [each.message() for each in self._directories]

    async def _finish(self) -> None:
        started = time.monotonic()
        for each in self._directories:
            begun = time.monotonic()
            listed, everything = each.listed, each.all
            changed = await self._changed(each, is_last=True)
            if changed:
                listed = listed or await self._start(each.path, dataclasses.replace(self._pass, listed=True))
                each.frozen += await self._go(listed, each.path, changed, is_last=True)
            everything = everything or await self._start(each.path, self._pass)
            each.frozen += await self._go(everything, each.path, is_last=True)
            each.frozen_seconds = time.monotonic() - begun
        self.step = Step("sync files", started, time.monotonic())

    async def _differences(self, each: _Directory) -> None:
        """What changed since the last pass, while the tree runs."""
        changed, started = await self._changed(each), time.time()
        each.mapped = await asyncio.to_thread(self._mapped, each.path)
        copied = Copied()
        if changed:
            run = await self._start(each.path, dataclasses.replace(self._pass, listed=True))
            copied += await self._go(run, each.path, changed, is_last=False)
        copied += await self._run(each.path, self._pass, first=False, is_last=False)
        each.before += copied
        each.since = started

    async def _changed(self, each: _Directory, *, is_last: bool = False) -> bytes:
        """Names, each with a zero behind it, of what may have changed since the last pass without other times."""
        mapped = each.mapped | await asyncio.to_thread(self._mapped, each.path)
        since = f"@{each.since - SLACK_SECONDS:.3f}"
        words = ["find", each.path, "-xdev", "-type", "f", "(", "-newermt", since, "-o", "-newerct", since, ")"]
        found = await _output([*words, "-printf", r"%P\0"], must_succeed=is_last)
        names = {name for name in found.split(b"\0") if name}
        names |= await asyncio.to_thread(_relative, mapped, each.path)
        return b"".join(name + b"\0" for name in sorted(names))

    def _mapped(self, directory: str) -> frozenset[str]:
        found: set[str] = set()
        for pid in descendants(self._pid):
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="surrogateescape")
                found |= rsync.shared_writable(maps, directory)
        return frozenset(found)

    async def _run(self, directory: str, wanted: Pass, *, first: bool, is_last: bool) -> Copied:
        return await self._go(await self._start(directory, wanted, first=first), directory, is_last=is_last)

    async def _start(self, directory: str, wanted: Pass, *, first: bool = False) -> _Run:
        started = _Run(self._remote, directory)
        self._runs.add(started)
        await started.start(wanted, first=first)
        return started

    async def _go(self, started: _Run, directory: str, listed: bytes = b"", *, is_last: bool) -> Copied:
        try:
            status, said = await started.go(listed)
        finally:
            await started.aclose()
            self._runs.discard(started)
        if status != 0 and (is_last or status not in rsync.NOT_COMPLETE):
            raise _failed(directory, f"rsync ended with {status}: {said or 'no reason given'}")
        if status != 0:
            logger.info("sync not complete yet directory=%s status=%d said=%s", directory, status, said)
        return started.copied


class _Directory:
    """One directory and how far it has come."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.since = 0.0  # the clock when its last pass began
        self.mapped: frozenset[str] = frozenset()  # what was mapped for writing then
        self.before = self.frozen = Copied()
        self.frozen_seconds = 0.0
        self.listed: _Run | None = None
        self.all: _Run | None = None

    def message(self) -> migrations_pb2.SyncedDirectory:
        made = migrations_pb2.SyncedDirectory(
            directory=self.path,
            files=self.before.files,
            bytes=self.before.bytes,
            freeze_files=self.frozen.files,
            freeze_bytes=self.frozen.bytes,
            freeze_paths=self.frozen.paths,
        )
        made.freeze_duration.FromMicroseconds(round(self.frozen_seconds * 1e6))
        return made


class _Run:
    """One rsync here, the stream, and the rsync at its far end."""

    def __init__(self, remote: GrpcRemote, directory: str) -> None:
        self._remote = remote
        self._directory = directory
        self._stack = contextlib.AsyncExitStack()
        self._child: Child | None = None
        self._call: Any = None
        self.copied = Copied()
        self._error_text = ""  # of the other rsync, which may die before it can send it

    async def start(self, wanted: Pass, *, first: bool = False) -> None:
        """Up to where rsync waits for the other one's first word. Raises `PhaulError`."""
        try:
            await self._start(wanted, first)
        except BaseException:
            await self.aclose()
            raise

    async def _start(self, wanted: Pass, first: bool) -> None:
        self._phone, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stack.callback(self._phone.close)
        self._phone.setblocking(False)
        self._list, self._output = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("list", "output"))
        self._stack.callback(os.close, self._list)
        self._stack.callback(os.close, self._output)
        shell = [sys.executable, "-I", "-S", os.fspath(_SHELL), str(theirs.fileno())]
        with theirs:
            try:
                self._child = await spawn(
                    rsync.client_arguments(shell, wanted),
                    pass_fds=[theirs.fileno()],
                    stdin=self._list,
                    stdout=self._output,
                    cwd=self._directory,
                )
            except FileNotFoundError as exc:
                raise _failed(self._directory, str(exc), rsync.PACKAGE_REMEDY) from exc
        self._stack.push_async_callback(self._child.aclose)
        arguments = await self._wait_for_shell()
        self._call = self._remote.sync_files()
        self._stack.callback(self._call.cancel)
        request = remote_pb2.SyncFilesRequest(
            migration_id=self._remote.migration_id, directory=self._directory, arguments=arguments, first=first
        )
        await self._say(request)
        if first:
            probe = (await self._hear()).probe
            if not probe or await asyncio.to_thread(os.path.lexists, probe):
                why = "both nodes see the same directory" if probe else "the destination made no probe"
                raise _failed(self._directory, why, "leave --sync away: the files are there already")

    async def _wait_for_shell(self) -> list[str]:
        """What rsync wants to be started; its two ends of the conversation are ours then."""
        assert self._child is not None
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._phone, arrived.set)
        self._child.on_end(arrived.set)
        try:
            async with asyncio.timeout(START_SECONDS):
                await arrived.wait()
            said, descriptors, _, _ = socket.recv_fds(self._phone, CHUNK_BYTES, 2)
        except (TimeoutError, OSError) as exc:
            raise _failed(self._directory, self._child.stderr_tail or "rsync here did not start") from exc
        finally:
            loop.remove_reader(self._phone)
        if len(descriptors) != 2:
            raise _failed(self._directory, self._child.stderr_tail or "rsync here did not start")
        self._from_rsync, self._to_rsync = (socket.socket(fileno=each) for each in descriptors)
        for each in (self._from_rsync, self._to_rsync):
            self._stack.callback(each.close)
            each.setblocking(False)
        return [os.fsdecode(word) for word in said.split(b"\0")]

    async def go(self, listed: bytes = b"") -> tuple[int, str]:
        """Let it run to its end: its exit status, and what it complained about. Raises `PeerError`."""
        assert self._child is not None
        os.pwrite(self._list, listed, 0)
        await self._say(remote_pb2.SyncFilesRequest(go=True))
        upwards = asyncio.create_task(self._pump_up())
        try:
            status = await self._pump_down()
            self._to_rsync.close()
            with contextlib.suppress(OSError):
                self._phone.send(bytes([status & 0xFF]))
            ended = await self._child.wait()
        finally:
            upwards.cancel()
            await asyncio.gather(upwards, return_exceptions=True)
        size = os.fstat(self._output).st_size
        self.copied = rsync.parse_output(os.pread(self._output, size, 0).decode(errors="surrogateescape"))
        return ended or status, _one_line(f"{self._child.stderr_tail}\n{self._error_text}")

    async def aclose(self) -> None:
        """Nothing of it is left, here; the other end sees the stream end."""
        await finish(self._stack.aclose())

    async def _pump_up(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(self._from_rsync, CHUNK_BYTES):
                await self._call.write(remote_pb2.SyncFilesRequest(data=data))
        await self._call.done_writing()

    async def _pump_down(self) -> int:
        """The exit status of the other rsync."""
        loop = asyncio.get_running_loop()
        while True:
            answer = await self._hear()
            with contextlib.suppress(OSError):  # rsync here has ended: its status says why
                await loop.sock_sendall(self._to_rsync, answer.data)
            if answer.HasField("exit_status"):
                self._error_text = answer.error_text
                return answer.exit_status

    async def _say(self, request: remote_pb2.SyncFilesRequest) -> None:
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as exc:
            raise await self._why(exc) from None

    async def _hear(self) -> remote_pb2.SyncFilesResponse:
        try:
            answer = await self._call.read()
        except grpc.aio.AioRpcError as exc:
            raise await self._why(exc) from None
        if answer is grpc.aio.EOF:
            raise _failed(self._directory, "the destination ended the stream")
        assert isinstance(answer, remote_pb2.SyncFilesResponse)
        return answer

    async def _why(self, error: BaseException) -> PhaulError:
        if isinstance(error, grpc.aio.AioRpcError):
            return from_rpc_error(self._remote.address, error)
        return _failed(self._directory, f"{await self._call.code()}: {await self._call.details()}")


def _relative(paths: frozenset[str], directory: str) -> set[bytes]:
    """Those that are there, as rsync is told them."""
    return {os.fsencode(os.path.relpath(path, directory)) for path in paths if os.path.isfile(path)}


async def _output(argv: Sequence[str], *, must_succeed: bool) -> bytes:
    """All that a program writes; that files vanish under it is not always a failure. Raises `OSError`, `TimeoutError`.

    And `PhaulError` SYNC_FAILED.
    """
    output = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        async with asyncio.timeout(FIND_SECONDS), await spawn(argv, stdout=output) as child:
            status = await child.wait()
        if status and must_succeed:
            raise _failed(argv[1], child.stderr_tail or f"find ended with {status}")
        return os.pread(output, os.fstat(output).st_size, 0)
    finally:
        os.close(output)


def _one_line(text: str) -> str:
    """What rsync complained about, without its last line, which only says where in its source."""
    lines = [line for line in text.splitlines() if line and not line.startswith("rsync error: some files")]
    grave = [line for line in lines if not line.startswith("file has vanished")]
    return "; ".join((grave or lines)[:SAID_LINES])
