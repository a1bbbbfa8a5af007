"""Starts the shims of this node, each in a scope of its own with the limits of its workload, and reaps them.

The invariant: a shim whose tree is not within its limits has ended, and all that it may have started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any, Final

from phaul_client.tree import Tree
from phaul_criu.child import Child, spawn
from phauld.bare import bare_python
from phauld.scope import in_scope, is_booted
from phauld.trees import cgroup_limits
from phauld.trees.restore_slot import POLL_SECONDS
from phauld.trees.workload_records import START_TIMEOUT_SECONDS
from phauld.trees.workload_spec import UNLIMITED, WorkloadSpec
from phauld.whole_files import write_json

_SHIM: Final = bare_python("trees.shim")


class Shims:
    """They outlive phauld."""

    def __init__(self) -> None:
        self._reapers: set[asyncio.Task[int]] = set()

    async def run(self, spec: WorkloadSpec, directory: Path, needed: dict[str, Any]) -> dict[str, Any]:
        """Start a workload; what its shim says of it: a "pid", or an "error", and then the shim has ended.

        Raises `InvalidRequest`, `TimeoutError`, `OSError`; then nothing of it is left.
        """
        write_json(str(directory), "spec.json", needed)
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                arguments = ("run", str(directory), str(theirs.fileno()))
                child = await self._start(spec, arguments, theirs.fileno())
            try:
                async with asyncio.timeout(START_TIMEOUT_SECONDS):
                    outcome: dict[str, Any] = json.loads(await _read_all(ours) or '{"error": "its shim died"}')
                    if "error" in outcome:
                        await child.wait()
                    else:
                        self._check_limits(spec, child)
            except BaseException:
                await _end(child)
                raise
        return outcome

    async def restore(
        self, spec: WorkloadSpec, directory: Path, criu: Path, inherited: tuple[int, ...], *, waits: bool
    ) -> tuple[socket.socket, Child, int | None]:
        """Start one with a `criu swrk` below it: the connection to that, the shim, and where criu waits for a word.

        It waits only if it is to. Raises `InvalidRequest`, `TimeoutError`, `OSError`; then it has ended.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        go_fds = os.pipe() if waits else ()
        try:
            fd = theirs.fileno()
            go = str(go_fds[0]) if go_fds else "-"
            arguments = ("restore", str(directory), str(fd), str(criu), go, *map(str, inherited))
            child = await self._start(spec, arguments, fd, *go_fds[:1], *inherited)
            await self._limits_hold(spec, child, directory)
        except BaseException:
            ours.close()
            for go_fd in go_fds[1:]:
                os.close(go_fd)
            raise
        finally:
            theirs.close()
            for go_fd in go_fds[:1]:
                os.close(go_fd)
        return ours, child, go_fds[1] if go_fds else None

    async def close(self) -> None:
        """Stop watching. They stay, and their trees."""
        if self._reapers:
            await asyncio.wait(self._reapers, timeout=0)  # reaps those that have ended
        for task in self._reapers:
            task.cancel()
        await asyncio.gather(*self._reapers, return_exceptions=True)

    def _check_limits(self, spec: WorkloadSpec, child: Child) -> None:
        """Raises `InvalidRequest` if its scope does not have them."""
        if is_booted():
            cgroup_limits.verify(spec.cgroup, child.pid)

    async def _limits_hold(self, spec: WorkloadSpec, child: Child, directory: Path) -> None:
        """Once the shim is in its scope. Raises `InvalidRequest`, `TimeoutError`; then it has ended."""
        if spec.cgroup == UNLIMITED:
            return
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                while not (directory / "shim.json").exists():  # noqa: ASYNC110 (it is another process)
                    await asyncio.sleep(POLL_SECONDS)
            self._check_limits(spec, child)
        except BaseException:
            await _end(child)
            raise

    async def _start(self, spec: WorkloadSpec, arguments: tuple[str, ...], *fds: int) -> Child:
        record = Path(arguments[1])
        if not is_booted():
            cgroup_limits.make(spec.cgroup, record)
        scope = in_scope("tree", record.name, cgroup_limits.scope_properties(spec.cgroup))
        child = await spawn([*scope, *_SHIM, *arguments], pass_fds=fds)
        task = asyncio.create_task(child.wait(), name=f"shim-{child.pid}")
        self._reapers.add(task)
        task.add_done_callback(self._reapers.discard)
        return child


async def _end(child: Child) -> None:
    """Kill a shim, and what it may have started: stopped, it starts no more."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(child.pid, signal.SIGSTOP)
        with Tree.below(child.pid) as tree:
            await tree.is_still()
        with Tree.below(child.pid) as tree:
            await tree.kill()


async def _read_all(sock: socket.socket) -> bytes:
    sock.setblocking(False)
    data = b""
    while chunk := await asyncio.get_running_loop().sock_recv(sock, 4096):
        data += chunk
    return data
