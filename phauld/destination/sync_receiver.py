"""The far end of `--sync`: an rsync that receives into one of the directories that a session was opened with.

The invariant: it is told what to do by `phaul_client.rsync`, never by the source, and it does not outlive its session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Final

from phaul.v1 import remote_pb2
from phaul_client import rsync
from phaul_client.errors import InvalidRequest, PhaulError
from phaul_criu.child import Child, spawn
from phauld.sync_records import State, SyncRecords

logger = logging.getLogger(__name__)

CHUNK_BYTES: Final = 1 << 18
_NEW_MODE: Final = 0o755  # rsync gives it the source's


class SyncReceiver:
    """The directories of one session."""

    def __init__(
        self, records: SyncRecords, migration_id: str, source: str, directories: tuple[str, ...], *, overwrite: bool
    ) -> None:
        self._records = records
        self._migration_id = migration_id
        self._source = source
        self._directories = directories
        self._overwrite = overwrite
        self._children: set[Child] = set()
        self._is_closed = False

    def open(self) -> None:
        """Nobody else may bring them now. Blocking. Raises `PhaulError`."""
        for problem in self._records.check_destination(self._directories, overwrite=self._overwrite):
            message = f"{problem.subject} {problem.message}"
            raise PhaulError(message, reason="PREFLIGHT_FAILED", remedy=problem.remedy)
        for each in self._directories:
            if not self._records.claim(each, self._migration_id):
                self.release()
                raise PhaulError(f"{each} is being brought by another migration", reason="PREFLIGHT_FAILED")

    def arrived(self) -> None:
        """The tree runs here: they are its. Raises `OSError`."""
        for each in self._directories:
            self._records.put(each, State.ARRIVED, self._migration_id, self._source)

    def release(self) -> None:
        """The session is over."""
        self._records.release(self._migration_id)

    async def aclose(self) -> None:
        """No rsync runs after this, and none is started any more."""
        self._is_closed = True
        for each in tuple(self._children):
            await each.aclose()

    async def serve(
        self, first: remote_pb2.SyncFilesRequest, requests: AsyncIterator[remote_pb2.SyncFilesRequest]
    ) -> AsyncGenerator[remote_pb2.SyncFilesResponse, None]:
        """One call of Remote.SyncFiles. Raises `PhaulError`, `OSError`."""
        if first.directory not in self._directories:
            raise InvalidRequest(f"{first.directory!r} was not announced by OpenSession")
        options = rsync.parse_server_arguments(first.arguments)
        directory = Path(first.directory)
        await asyncio.to_thread(self._make, directory)
        if first.first:
            probe = directory / f".phaul-{secrets.token_hex(16)}"
            probe.touch(mode=0o600, exist_ok=False)
            try:
                yield remote_pb2.SyncFilesResponse(probe=str(probe))
                go = await anext(requests, None)
            finally:
                probe.unlink(missing_ok=True)
            if go is None or not go.go:
                return
        if self._is_closed:
            raise PhaulError("the session is over", reason="WRONG_PHASE")
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            with theirs:
                # "./" in the directory: what becomes of its name from now on is not our business
                argv = [rsync.PROGRAM, *options, "./"]
                child = await spawn(argv, stdin=theirs.fileno(), stdout=theirs.fileno(), cwd=directory)
            self._children.add(child)
            feeding = asyncio.create_task(_feed(ours, requests))
            try:
                while data := await _receive(ours):
                    yield remote_pb2.SyncFilesResponse(data=data)
                status = await child.wait()
            finally:
                feeding.cancel()
                await child.aclose()
                self._children.discard(child)
        yield remote_pb2.SyncFilesResponse(exit_status=status, error_text=child.stderr_tail)

    def _make(self, directory: Path) -> None:
        if not directory.is_dir():
            directory.mkdir(parents=True, mode=_NEW_MODE)
        if os.path.realpath(directory) != str(directory):
            raise PhaulError(f"{directory} has become a symbolic link", reason="PREFLIGHT_FAILED")
        self._records.put(str(directory), State.PARTIAL, self._migration_id, self._source)


async def _receive(sock: socket.socket) -> bytes:
    try:
        return await asyncio.get_running_loop().sock_recv(sock, CHUNK_BYTES)
    except ConnectionError:
        return b""


async def _feed(sock: socket.socket, requests: AsyncIterator[remote_pb2.SyncFilesRequest]) -> None:
    """What the source says; its end is the end of what rsync hears."""
    loop = asyncio.get_running_loop()
    try:
        async for request in requests:
            await loop.sock_sendall(sock, request.data)
    except OSError as exc:
        logger.debug("rsync hears no more error=%s", exc)
    finally:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
