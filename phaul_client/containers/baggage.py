"""Sends the root file system of a container: whole while it runs, then what has changed, while it stands still.

The invariant: what the destination has after `rest` is what was there when the tree was frozen. What changed after the
first look, or was not read well the first time, is sent again.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import fcntl
import logging
import os
import re
import stat
import termios
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Final

from phaul.v1 import remote_pb2
from phaul_client.containers.changes import Changes, Entry, Look, changes
from phaul_client.errors import PhaulError
from phaul_client.remote import GrpcRemote
from phaul_client.tree import descendants
from phaul_criu import child

logger = logging.getLogger(__name__)

PIECE_BYTES: Final = 256 << 10
NAMES_BYTES: Final = 512 << 10
WHOLE_SECONDS: Final = 24 * 3600.0  #: the deadline of the migration ends it sooner
RUNNING_ROUNDS: Final = 2
DRAIN_SECONDS: Final = 1.0
WRITTEN_SECONDS: Final = 0.01  #: from the read of a line to its place in the log
MAX_SAID: Final = 60_000  #: what is kept of it is no more
_CHANGE: Final = re.compile(
    r"tar: .*: (file changed as we read it|File removed before we read it|Cannot (stat|open): No such file or directory"
    r"|File shrank by \d+ bytes?; padding with zeros)"
    r"|tar: Exiting with failure status due to previous errors"
)
_TAR: Final = ("tar", "--create", "--file=-", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls", "--sparse")


class Baggage:
    """The files of one container, on their way; `pid` is its init."""

    def __init__(self, root: Path, pid: int, remote: GrpcRemote, log: Path | None = None) -> None:
        self._log = log  # of whoever reads what it writes into a pipe
        self._log_bytes = 0
        self._root = root
        self._pid = pid
        self._remote = remote
        self._known: Look = {}
        self.bytes = 0  #: sent

    async def first(self) -> None:
        """Send everything, then what has changed meanwhile; the tree runs. Raises `PeerError`, `PhaulError`."""
        for _ in range(RUNNING_ROUNDS):
            now = await asyncio.to_thread(look, self._root, sync=True)
            status, said = await self._send(changes(self._known, now))
            if status == 0 or is_change(said):  # what changed or went while it was read differs from this look
                self._known = now
            else:  # it is not known what is missing
                logger.warning("files not all sent root=%s error=%s", self._root, said[-500:])
                self._known = {path: entry._replace(ctime_ns=-1) for path, entry in now.items()}

    async def rest(self) -> None:
        """Send what has changed; the tree stands still. Raises `PeerError`, `PhaulError`."""
        if self._log is not None:
            await asyncio.to_thread(drained, self._pid)
        now = await asyncio.to_thread(look, self._root)
        mapped = await asyncio.to_thread(mapped_inodes, self._pid)
        known = {path: entry for path, entry in self._known.items() if entry.inode not in mapped}
        missing = tuple(sorted(self._known.keys() - now.keys(), reverse=True))
        found = changes(known, now)
        found = found._replace(deleted=tuple(sorted({*found.deleted, *missing}, reverse=True)))
        if not found.deleted and not found.changed and self._log is None:
            return
        status, said = await self._send(found)
        if status != 0:
            raise PhaulError(f"tar of {self._root}: {said[-300:] or status}", reason="IMAGE_CORRUPT")

    async def _send(self, found: Changes) -> tuple[int, str]:
        """tar's exit status, and what it said."""
        names = os.memfd_create("names")
        read_end, write_end = os.pipe()
        try:
            os.write(names, b"".join(os.fsencode(path) + b"\0" for path in found.changed))
            os.lseek(names, 0, os.SEEK_SET)
            argv = [*_TAR, "--directory", str(self._root), "--no-recursion", "--null", "--verbatim-files-from"]
            tar = await child.spawn([*argv, "--files-from=-"], stdin=names, stdout=write_end)
            os.close(write_end)
            write_end = -1
            async with tar, _reader(read_end) as reader:
                read_end = -1
                await self._remote.put_files(self._messages(found.deleted, reader), WHOLE_SECONDS)
                status = await tar.wait()
            return status, tar.stderr_tail
        finally:
            for descriptor in (names, read_end, write_end):
                if descriptor >= 0:
                    os.close(descriptor)

    async def _messages(
        self, deleted: Sequence[str], reader: asyncio.StreamReader
    ) -> AsyncIterator[remote_pb2.PutFilesRequest]:
        first = remote_pb2.PutFilesRequest(migration_id=self._remote.migration_id)
        for batch in batches(deleted):
            first.deleted.extend(batch)
            yield first
            first = remote_pb2.PutFilesRequest()
        yield first
        while data := await reader.read(PIECE_BYTES):
            yield remote_pb2.PutFilesRequest(data=data)
            self.bytes += len(data)
        async for piece in self._log_pieces():
            yield remote_pb2.PutFilesRequest(log=piece)
        yield remote_pb2.PutFilesRequest(complete=True)

    async def _log_pieces(self) -> AsyncIterator[bytes]:
        """What has been added to its log since they were asked for last."""
        if self._log is None:
            return
        with contextlib.suppress(FileNotFoundError), self._log.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._log_bytes:
                self._log_bytes = 0  # its reader has begun another
            file.seek(self._log_bytes)
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                self._log_bytes += len(piece)
                yield piece


def batches(names: Iterable[str]) -> Iterable[list[str]]:
    """Names, as many at a time as one message holds."""
    batch: list[str] = []
    size = 0
    for name in names:
        size += len(os.fsencode(name)) + 8
        if batch and size > NAMES_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(name)
    if batch:
        yield batch


def is_change(said: str) -> bool:
    """Whether all that tar complains of is that files changed or went while it read them."""
    lines = said.splitlines()
    return len(said) < MAX_SAID and all(_CHANGE.fullmatch(line) for line in lines)


def drained(pid: int) -> None:
    """Wait until what the tree has written into the pipes at 1 and 2 was read, and its reader is idle again."""
    until = time.monotonic() + DRAIN_SECONDS
    for number in (1, 2):
        with contextlib.suppress(OSError):
            descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                while _pending(descriptor) and time.monotonic() < until:
                    time.sleep(0.002)
            finally:
                os.close(descriptor)
    time.sleep(WRITTEN_SECONDS)


def _pending(descriptor: int) -> int:
    answer = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, answer)
    return answer[0]


def mapped_inodes(pid: int) -> set[int]:
    """Files that the tree may write to through a mapping: on a tmpfs their times do not tell."""
    found = set()
    for each in descendants(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{each}/maps").read_text(errors="replace").splitlines():
                words = line.split(maxsplit=5)
                if words[1][1] == "w" and words[1][3] == "s":
                    found.add(int(words[4]))
    return found


def look(root: Path, *, sync: bool = False) -> Look:
    """Every file of one file system below `root`. Raises `OSError` if there is no such directory.

    A write through a mapping changes the times of its file only if the page was clean. With `sync` all pages are: then
    any later write shows in a later look.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if sync:
            _sync(descriptor)
        device = os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)
    found: dict[str, Entry] = {".": _entry(os.stat(root))}
    pending = [""]
    while pending:
        directory = pending.pop()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(root / directory) as entries:
            for each in entries:
                path = f"{directory}/{each.name}" if directory else each.name
                with contextlib.suppress(FileNotFoundError):
                    info = each.stat(follow_symlinks=False)
                    if info.st_dev != device or stat.S_ISSOCK(info.st_mode):
                        continue
                    found[path] = _entry(info)
                    if stat.S_ISDIR(info.st_mode):
                        pending.append(path)
    return found


def _entry(info: os.stat_result) -> Entry:
    return Entry(info.st_ino, info.st_mode, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _sync(descriptor: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.syncfs(descriptor)


@contextlib.asynccontextmanager
async def _reader(descriptor: int) -> AsyncIterator[asyncio.StreamReader]:
    """The end of a pipe; closed at the end."""
    reader = asyncio.StreamReader(limit=PIECE_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    try:
        yield reader
    finally:
        transport.close()
