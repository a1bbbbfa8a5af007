"""One pass of rsync over a directory: the rsync here, the stream between the nodes, and the rsync at its far end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any, Final

import grpc

from phaul.v1 import remote_pb2
from phaul_client import rsync
from phaul_client.errors import PhaulError
from phaul_client.remote import GrpcRemote
from phaul_client.rsync import Copied, Pass
from phaul_client.status import from_rpc_error
from phaul_criu.child import Child, finish, spawn

CHUNK_BYTES: Final = 1 << 18
START_SECONDS: Final = 10.0
SAID_LINES: Final = 3
_SHELL: Final = Path(__file__).with_name("rsync_shell.py")


def failed(directory: str, why: str, remedy: str = "") -> PhaulError:
    """That of a directory."""
    return PhaulError(f"{directory} was not synchronised: {why}", reason="SYNC_FAILED", remedy=remedy)


class SyncRun:
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
                raise failed(self._directory, str(exc), rsync.PACKAGE_REMEDY) from exc
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
                raise failed(self._directory, why, "leave --sync away: the files are there already")

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
            raise failed(self._directory, self._child.stderr_tail or "rsync here did not start") from exc
        finally:
            loop.remove_reader(self._phone)
        if len(descriptors) != 2:
            raise failed(self._directory, self._child.stderr_tail or "rsync here did not start")
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
            raise failed(self._directory, "the destination ended the stream")
        assert isinstance(answer, remote_pb2.SyncFilesResponse)
        return answer

    async def _why(self, error: BaseException) -> PhaulError:
        if isinstance(error, grpc.aio.AioRpcError):
            return from_rpc_error(self._remote.address, error)
        return failed(self._directory, f"{await self._call.code()}: {await self._call.details()}")


def _one_line(text: str) -> str:
    """What rsync complained about, without its last line, which only says where in its source."""
    lines = [line for line in text.splitlines() if line and not line.startswith("rsync error: some files")]
    grave = [line for line in lines if not line.startswith("file has vanished")]
    return "; ".join((grave or lines)[:SAID_LINES])
