"""A shim with a criu below it that restores a tree: until the tree runs here, or never will."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from phaul_client.tree import Tree, descendants, is_alive, wait_until_gone
from phaul_criu.child import Child
from phauld.trees.record_files import lives, read_json
from phauld.trees.workload_records import START_TIMEOUT_SECONDS, Records, forget
from phauld.whole_files import write_json

EXIT_RECORD_TIMEOUT_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.01


class RestoreSlot:
    """A shim with the criu that restores below it; `keep` or `discard` ends it."""

    def __init__(
        self,
        records: Records,
        directory: Path,
        swrk: socket.socket | None,
        child: Child | None,
        go_fd: int | None = None,
    ) -> None:
        self._swrk = swrk
        self._go_fd = go_fd  # where criu waits for a word
        self._child = child  # the shim, if it is ours
        self._records = records
        self.directory = directory

    @property
    def ran(self) -> bool:
        """Whether the shim says that the tree ran."""
        ending = read_json(self.directory / "exit.json")
        if ending is not None:
            return bool(ending["outcome"] == "exited")
        return (self.directory / "tree.json").exists()

    def take_swrk(self) -> socket.socket:
        """Our end of the connection to criu, now the caller's."""
        assert self._swrk is not None, "the connection was taken already"
        swrk, self._swrk = self._swrk, None
        return swrk

    async def criu_pid(self) -> int:
        """The criu that waits for its request. Raises `TimeoutError`."""
        async with asyncio.timeout(START_TIMEOUT_SECONDS):
            while True:  # nothing tells when it is there
                if found := [pid for pid in descendants(self.shim_pid) if pid != self.shim_pid]:
                    return found[0]
                await asyncio.sleep(POLL_SECONDS)

    def go(self) -> None:
        """criu is in the cgroups that it is to be in. Raises `OSError` if it has ended."""
        if self._go_fd is not None:
            go_fd, self._go_fd = self._go_fd, None
            with os.fdopen(go_fd, "wb", buffering=0) as pipe:
                pipe.write(b".")

    def release(self) -> None:
        """The tree is about to be let go: from now on its shim asks the tree, not criu, whether it ran."""
        (self.directory / "released").touch(mode=0o600)

    async def outcome(self) -> int | None:
        """Wait until the shim has said whether the tree ran; the PID of its root, if it still runs."""
        while not (self.directory / "tree.json").exists() and not (self.directory / "exit.json").exists():
            if not self._shim_lives():
                break  # killed, or the node was booted since: so is the tree
            await asyncio.sleep(POLL_SECONDS)
        tree = read_json(self.directory / "tree.json")
        return tree["pid"] if tree is not None and is_alive(tree) else None

    @property
    def _has_said(self) -> bool:
        return any((self.directory / name).exists() for name in ("tree.json", "exit.json"))

    @property
    def is_unattended(self) -> bool:
        """Whether the shim was killed before it had said anything about the tree."""
        return not self._has_said and not self._shim_lives()

    def keep(self, name: str) -> None:
        """The tree runs: its record stands for the name from now on."""
        self._records.begun(name, self.directory)

    async def vouch(self, root: Mapping[str, Any]) -> None:
        """Wait until the shim has said that the tree runs; if it is killed before, say it, or nobody could find it."""
        while not self._has_said and self._shim_lives():  # noqa: ASYNC110 (it is another process)
            await asyncio.sleep(POLL_SECONDS)
        if root and not self._has_said:
            with contextlib.suppress(OSError):
                write_json(os.fspath(self.directory), "tree.json", dict(root))

    async def discard(self) -> None:
        """The tree never ran, and criu's connection is closed: wait until its shim has cleaned up, and forget it."""
        if self._swrk is not None:
            self._swrk.close()
        if self._go_fd is not None:
            os.close(self._go_fd)
            self._go_fd = None
        try:
            async with asyncio.timeout(EXIT_RECORD_TIMEOUT_SECONDS):
                await self._ended()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError), Tree.below(self.shim_pid) as left:
                await left.kill()
        forget(self.directory)

    async def _ended(self) -> None:
        if self._child is not None:  # it may not have said yet who it is
            await self._child.wait()
        while self._shim_lives():
            await wait_until_gone(self.shim_pid)

    @property
    def shim_pid(self) -> int:
        if self._child is not None:
            return self._child.pid
        return int((read_json(self.directory / "shim.json") or {})["pid"])

    def _shim_lives(self) -> bool:
        shim_process = read_json(self.directory / "shim.json")
        return shim_process is not None and lives(shim_process)
