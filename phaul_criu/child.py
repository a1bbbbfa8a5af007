"""The one place of phaul that starts a child process from a running event loop.

The invariant: whoever leaves the `async with` of a Child leaves no process, no zombie and no descriptor behind, also
when cancelled. Built on vfork + exec (no Python code runs in the child, so threads of gRPC are no danger), a pidfd
and `loop.add_reader`: no threads, no SIGCHLD handler, no asyncio child watcher.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol, Self, TypeVar

logger = logging.getLogger(__name__)

#: A file, a descriptor, or one of subprocess's constants.
Stream = int | IO[bytes]
_Result = TypeVar("_Result")

_DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TAIL_BYTES: Final = 1 << 16
_KEPT_VARIABLES: Final = ("PATH", "HOME", "TMPDIR")


class Spawn(Protocol):
    """The type of `spawn`, as far as those need it who may be given another one."""

    async def __call__(self, argv: Sequence[str | Path], *, pass_fds: Sequence[int] = ()) -> Child:
        """Start a child."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a child ended that was only started to be waited for."""

    #: Exit status, or minus the number of the signal that killed it.
    returncode: int
    #: What it wrote to its standard output and standard error, at most the last 64 KiB.
    output: str


def scrubbed_environment() -> dict[str, str]:
    """The environment of a child: nothing of ours but where to find programs and the home directory."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {"PATH": _DEFAULT_PATH, "HOME": "/", "LANG": "C"} | kept


async def spawn(
    argv: Sequence[str | Path],
    *,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    stdin: Stream = subprocess.DEVNULL,
    stdout: Stream = subprocess.DEVNULL,
    stderr: Stream | None = None,
    cwd: str | Path | None = None,
) -> Child:
    """Start `argv` in a session of its own.

    The descriptors in `pass_fds` keep their numbers in the child; all others are closed there. `env` replaces the
    scrubbed environment. Without `stderr`, the end of it is kept in `Child.stderr_tail`. Raises OSError if the program
    cannot be started.
    """
    kept_stderr_fd = os.memfd_create("stderr", os.MFD_CLOEXEC)
    try:
        # vfork + exec takes a millisecond; asyncio's own way needs a child watcher
        popen = subprocess.Popen(  # noqa: ASYNC220
            [os.fspath(word) for word in argv],
            pass_fds=pass_fds,
            env=scrubbed_environment() if env is None else env,
            stdin=stdin,
            stdout=stdout,
            stderr=kept_stderr_fd if stderr is None else stderr,
            cwd=cwd,
            start_new_session=True,
        )
    except BaseException:
        os.close(kept_stderr_fd)
        raise
    logger.debug("started pid=%d argv=%s", popen.pid, popen.args)
    return Child(popen, kept_stderr_fd)


async def run(argv: Sequence[str | Path], *, timeout_seconds: float) -> Ended:
    """Start `argv` and wait for it. Raises TimeoutError, when it has been killed, and OSError."""
    output_fd = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        async with asyncio.timeout(timeout_seconds), await spawn(argv, stdout=output_fd, stderr=output_fd) as child:
            returncode = await child.wait()
        return Ended(returncode=returncode, output=_tail(output_fd))
    finally:
        os.close(output_fd)


async def finish(cleanup: Coroutine[Any, Any, _Result]) -> _Result:
    """Run `cleanup` to its end even if we are cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(cleanup)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as exc:
            cancelled = exc
        except BaseException:
            break
    if cancelled is not None and not task.cancelled():
        if (failure := task.exception()) is not None:
            raise cancelled from failure
        raise cancelled
    return task.result()


class Child:
    """A running child process. As a context manager it kills the child at the end, if it still runs, and reaps it."""

    def __init__(self, popen: subprocess.Popen[bytes], stderr_fd: int) -> None:
        self._popen = popen
        self._stderr_fd = stderr_fd
        self._stderr_tail = ""
        self._pidfd = os.pidfd_open(popen.pid)
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """The PID; it is not reused before the child has been reaped."""
        return self._popen.pid

    @property
    def pidfd(self) -> int:
        """A pidfd of the child, open until the child has been reaped."""
        return self._pidfd

    @property
    def returncode(self) -> int | None:
        """None while the child runs, then its exit status, or minus the number of the signal that killed it."""
        return self._popen.returncode

    @property
    def stderr_tail(self) -> str:
        """The end of what the child wrote to its standard error, once it has ended."""
        return self._stderr_tail

    async def wait(self) -> int:
        """Wait until the child has ended; its exit status, or minus the number of the signal that killed it."""
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        """Send SIGTERM, if the child still runs."""
        self._popen.terminate()

    def kill(self) -> None:
        """Send SIGKILL to the child and to what it forked, if the child still runs."""
        if self._popen.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` from the event loop once the child has ended."""
        self._ended.add_done_callback(lambda _ended: callback())

    async def aclose(self, *, patience_seconds: float = 0) -> None:
        """Give the child `patience_seconds` to end by itself, then kill it. On return it has been reaped."""
        await finish(self._close(patience_seconds))

    async def _close(self, patience_seconds: float) -> None:
        try:
            async with asyncio.timeout(patience_seconds):
                await self.wait()
        except TimeoutError:
            logger.debug("killing pid=%d argv=%s patience_seconds=%g", self.pid, self._popen.args, patience_seconds)
        finally:  # also when the event loop itself is being closed: after SIGKILL the wait is short
            if not self._ended.done():
                self.kill()
                self._popen.wait()
                self._reap()

    def _reap(self) -> None:
        """The pidfd became readable, or we waited: note how the child ended and let go of it."""
        if self._popen.poll() is None or self._ended.done():
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._stderr_tail = _tail(self._stderr_fd)
        os.close(self._stderr_fd)
        logger.debug("ended pid=%d returncode=%s", self.pid, self._popen.returncode)
        self._ended.set_result(self._popen.returncode)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()


def _tail(fd: int) -> str:
    start = max(0, os.fstat(fd).st_size - _TAIL_BYTES)
    return os.pread(fd, _TAIL_BYTES, start).decode(errors="replace").strip()
