"""Holding a tree back for a share of time: phauld's end of `throttler.py`.

The invariant: phauld and the throttler watch each other. If phauld dies, the throttler's input ends; if the throttler
dies, another one undoes what it left. A tree that cannot be held back migrates all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Final

from phaul_client.tree import descendants, identity
from phaul_criu.child import Child, finish, run, spawn
from phauld.trees import throttler

logger = logging.getLogger(__name__)

START_SECONDS: Final = 10.0
#: Longer than the throttler itself tries.
RELEASE_SECONDS: Final = throttler.RELEASE_SECONDS + 5.0
_PREFIX: Final = "phaul-throttle-"
_THROTTLER: Final = (sys.executable, "-I", "-S", throttler.__file__)


class CannotFreeze(Exception):
    """The tree cannot be held back; the message says why, as the rest of a sentence."""


class Freezer:
    """Holds back the tree below `pid`. A context manager: at its end the tree runs freely where it was."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._path: Path | None = None
        self._child: Child | None = None
        self._orders: socket.socket | None = None
        self._failed = False
        self._undoing: asyncio.Task[None] | None = None

    async def hold_back(self, percent: int) -> None:
        """Hold the tree back for so many percent of time from now on; 0 lets go of it altogether."""
        if percent == 0:
            await self.release()
        elif not self._failed:
            try:
                if self._orders is None:
                    await self._start()
                assert self._orders is not None
                self._orders.sendall(f"{percent}\n".encode())
            except (OSError, TimeoutError, CannotFreeze) as exc:
                self._failed = True
                logger.warning("not throttled pid=%d error=%s", self._pid, exc)
                await self.release()

    async def release(self) -> None:
        """Let go of the tree. On return every task of it is where it was before."""
        await finish(self._release())

    async def __aenter__(self) -> Freezer:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.release()

    async def _start(self) -> None:
        self._path = find_cgroup(self._pid) / _child_name(self._pid)
        ours, theirs = socket.socketpair()
        with theirs:
            self._orders = ours
            self._child = await spawn([*_THROTTLER, self._path, str(self._pid)], stdin=theirs.fileno())
        self._child.on_end(self._throttler_ended)
        ours.setblocking(False)
        async with asyncio.timeout(START_SECONDS):
            if not await asyncio.get_running_loop().sock_recv(ours, 16):
                raise CannotFreeze("the throttler did not start")
        logger.info("throttled pid=%d cgroup=%s", self._pid, self._path)

    def _throttler_ended(self) -> None:
        """By itself: killed, perhaps while the tree was frozen."""
        if self._child is not None:
            self._failed = True
            self._undoing = asyncio.create_task(self.release())

    async def _release(self) -> None:
        if self._orders is not None:
            self._orders.close()
            self._orders = None
        if self._child is None or self._path is None:
            return
        child, self._child = self._child, None
        await child.aclose(patience_seconds=RELEASE_SECONDS)
        if child.returncode != 0:
            logger.warning("throttler failed pid=%d error=%s", self._pid, child.stderr_tail.rpartition("\n")[2])
            await undo(self._path)


def find_cgroup(pid: int) -> Path:
    """The cgroup that holds the tree, if a child of it can be made and frozen. Raises `CannotFreeze`."""
    paths = {path for each in descendants(pid) if (path := _cgroup2_of(each)) is not None}
    if len(paths) != 1:
        raise CannotFreeze(f"it is spread over {len(paths)} cgroups" if paths else "it is in no cgroup of version 2")
    directory = _directory_of(paths.pop())
    kind = _read(directory / "cgroup.type").strip()
    if kind not in ("", "domain"):  # the root cgroup has no type
        raise CannotFreeze(f"its cgroup {directory} is of type {kind!r}")
    probe = directory / f"{_child_name(pid)}-probe"
    try:
        probe.mkdir()
        try:
            if not (probe / "cgroup.freeze").exists():
                raise CannotFreeze("the kernel has no freezer in cgroup version 2 (Linux 5.2)")
        finally:
            probe.rmdir()
    except OSError as exc:
        raise CannotFreeze(f"no cgroup can be made in {directory}: {exc.strerror}") from exc
    return directory


def own_cgroup(pid: int | str = "self") -> Path:
    """The directory of the cgroup of version 2 that a process is in. Raises `CannotFreeze` if there is none."""
    path = _cgroup2_of(pid)
    if path is None:
        raise CannotFreeze("it is in no cgroup of version 2")
    return _directory_of(path)


async def undo_leftover(pid: int) -> None:
    """phauld and the throttler of an earlier migration were both killed: set the tree free."""
    with contextlib.suppress(CannotFreeze, FileNotFoundError, ProcessLookupError):
        path = _cgroup2_of(pid)
        if path is not None and path.rpartition("/")[2] == _child_name(pid):
            await undo(_directory_of(path))


async def undo(path: Path) -> None:
    """Thaw what is in a child cgroup, if there is one, move it back and remove the cgroup."""
    ended = await run([*_THROTTLER, path], timeout_seconds=RELEASE_SECONDS)
    if ended.returncode != 0:
        logger.error("the cgroup %s is left: %s", path, ended.output.rpartition("\n")[2])


def _child_name(pid: int) -> str:
    """Unique on a machine, whatever the PID namespace of phauld."""
    return f"{_PREFIX}{pid}-{identity(pid)['start_ticks']}"


def _cgroup2_of(pid: int | str) -> str | None:
    for line in _read(Path(f"/proc/{pid}/cgroup")).splitlines():
        if line.startswith("0::"):
            return line[3:]
    return None


def _directory_of(path: str) -> Path:
    """Where a cgroup of version 2 is mounted here. Raises `CannotFreeze`."""
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        fields, _, tail = line.partition(" - ")
        root, mount_point = fields.split()[3:5]
        if tail.startswith("cgroup2 "):
            inside = os.path.relpath(path, root)
            if not inside.startswith(".."):
                return Path(os.path.normpath(f"{mount_point}/{inside}"))
    raise CannotFreeze("no cgroup of version 2 is mounted where phauld sees it")


def _read(path: Path) -> str:
    """The whole file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
