"""Takes the files of a container at its destination: a stream for tar, and the names of what is gone at the source.

The invariant: nothing outside of the root is removed, whatever its links say.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from phaul.v1 import remote_pb2
from phaul_client.errors import ImageCorrupt, InvalidRequest, NoRoom
from phaul_criu import child

_TAR: Final = ("tar", "--extract", "--file=-", "--numeric-owner", "--same-owner", "--preserve-permissions")


async def unpack(
    root: Path,
    requests: AsyncIterator[remote_pb2.PutFilesRequest],
    first: remote_pb2.PutFilesRequest,
    take_log: Callable[[bytes], None],
) -> int:
    """Write what comes below `root`; the bytes of it. Raises `ImageCorrupt`, `NoRoom`, `InvalidRequest`, `OSError`."""
    read_end, write_end = os.pipe()
    try:
        tar = await child.spawn(
            [*_TAR, "--xattrs", "--xattrs-include=*", "--acls", "--directory", str(root)], stdin=read_end
        )
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    async with tar:
        written = await _feed(root, requests, first, take_log, write_end)
        status = await tar.wait()
    if status != 0:
        kind = NoRoom if "No space left" in tar.stderr_tail else ImageCorrupt
        raise kind(f"tar of {root} ended with {status}: {tar.stderr_tail[-300:]}")
    return written


async def _feed(
    root: Path,
    requests: AsyncIterator[remote_pb2.PutFilesRequest],
    first: remote_pb2.PutFilesRequest,
    take_log: Callable[[bytes], None],
    write_end: int,
) -> int:
    is_complete, written = False, 0
    message: remote_pb2.PutFilesRequest | None = first
    with os.fdopen(write_end, "wb", buffering=0) as pipe:
        while message is not None:
            for path in message.deleted:
                await asyncio.to_thread(_remove, root, path)
            if message.data:
                try:
                    await asyncio.to_thread(_write_all, pipe, message.data)
                except BrokenPipeError:
                    return written  # tar says why
                written += len(message.data)
            if message.log:
                await asyncio.to_thread(take_log, message.log)
            is_complete |= message.complete
            message = await anext(requests, None)
    if not is_complete:
        raise ImageCorrupt("the files of the container ended early")
    return written


def _remove(root: Path, path: str) -> None:
    """A file that is gone at the source. Raises `InvalidRequest`."""
    parent, _, name = path.rpartition("/")
    where = os.path.realpath(root / parent)
    if name in ("", ".", "..") or not f"{where}/".startswith(f"{root}/"):
        raise InvalidRequest(f"{path!r} is outside of the container")
    target = os.path.join(where, name)
    if os.path.isdir(target) and not os.path.islink(target):
        shutil.rmtree(target)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)


def _write_all(pipe: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) :]
