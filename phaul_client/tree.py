"""The processes of a tree that is about to be let go or killed: found once, then held by pidfd.

A pidfd names a process beyond doubt for as long as it is open, whatever happens to the PID.
"""

import asyncio
import contextlib
import functools
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from phaul_criu.processes import descendants as descendants

KILL_TIMEOUT_SECONDS: Final = 10.0
SETTLE_SECONDS: Final = 1.0  #: a pending SIGSTOP takes effect at once, but for a task in the middle of a page fault
SETTLE_POLL_SECONDS: Final = 0.01
_STOPPED: Final = ("T", "X", "Z")
_STILL: Final = (*_STOPPED, "t")  # the last one: held by a tracer
_START_TIME: Final = 19  # in /proc/PID/stat, counted behind the name in parentheses


class Tree:
    """A tree as it stands while nothing in it can fork. Use it as a context manager: it holds descriptors."""

    def __init__(self, pids: Iterable[int]) -> None:
        """Take hold of these processes. Raises `ProcessLookupError` if one is gone."""
        self._pidfds: dict[int, int] = {}
        self._stopped_by_us: set[int] = set()
        self._identities: dict[int, dict[str, object]] = {}
        try:
            for pid in pids:
                self._pidfds[pid] = os.pidfd_open(pid)
        except BaseException:
            self.close()
            raise

    @classmethod
    def below(cls, root: int) -> Self:
        """The whole tree as it stands. Raises `ProcessLookupError` if the root is gone."""
        return cls(descendants(root))

    @classmethod
    def again(cls, identities: Iterable[Mapping[str, Any]]) -> Self:
        """What is left of a tree whose `identities` were written down, perhaps before a reboot."""
        tree = cls(())
        for each in identities:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(each["pid"])
                if is_alive(each):  # looked at after the pidfd was made, so that the PID is no stranger's
                    tree._pidfds[each["pid"]] = descriptor
                    if each["stopped_by_us"]:
                        tree._stopped_by_us.add(each["pid"])
                else:
                    os.close(descriptor)
        return tree

    def identities(self) -> list[dict[str, object]]:
        """What `again` needs; who they are is looked up once. Raises `FileNotFoundError`, `ProcessLookupError`."""
        for pid in self._pidfds.keys() - self._identities.keys():
            self._identities[pid] = identity(pid)
        return [{**self._identities[pid], "stopped_by_us": pid in self._stopped_by_us} for pid in self._pidfds]

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self._pidfds)

    def stop(self, already_stopped: frozenset[int]) -> None:
        """Send SIGSTOP to every process; those in `already_stopped` will get no SIGCONT later."""
        for pid, descriptor in self._pidfds.items():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
            if pid not in already_stopped:
                self._stopped_by_us.add(pid)

    def resume(self) -> None:
        """Undo `stop`."""
        for pid in self._stopped_by_us:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfds[pid], signal.SIGCONT)
        self._stopped_by_us.clear()

    def is_traced(self) -> bool:
        """Whether a tracer (criu) still holds every process; a zombie needs none."""
        return all(map(_is_traced, self._pidfds))

    async def is_still(self) -> bool:
        """Whether every process is stopped, held by a tracer, or dead; one that is about to be is given a moment."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while not all(_is_still(pid) for pid in self._pidfds):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(SETTLE_POLL_SECONDS)
        return True

    async def kill(self) -> None:
        """SIGKILL what is left, and wait until nothing of it can run. Raises `TimeoutError`."""
        for descriptor in self._pidfds.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        async with asyncio.timeout(KILL_TIMEOUT_SECONDS):
            for descriptor in self._pidfds.values():
                await ended(descriptor)

    def close(self) -> None:
        for descriptor in self._pidfds.values():
            os.close(descriptor)
        self._pidfds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


async def wait_until_gone(pid: int) -> None:
    """Wait until a process, not necessarily a child, has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await ended(descriptor)
    finally:
        os.close(descriptor)


def identity(pid: int) -> dict[str, object]:
    """What names a process beyond doubt, also after its PID was used again and after a reboot.

    Raises `FileNotFoundError` or `ProcessLookupError` if there is no such process.
    """
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return {"pid": pid, "start_ticks": int(fields[_START_TIME]), "boot_id": boot_id()}


@functools.cache
def boot_id() -> str:
    """That of this boot."""
    return _read("/proc/sys/kernel/random/boot_id").decode("ascii").strip()


def is_alive(known: Mapping[str, Any]) -> bool:
    """Whether the very process that `identity` named still runs (or waits for its parent to reap it)."""
    try:
        return all(known[key] == value for key, value in identity(known["pid"]).items())
    except (FileNotFoundError, ProcessLookupError):
        return False


def shares_namespace(pid: int, kind: str) -> bool:
    """Whether a process is in our own namespace of this kind ("mnt", "net"). Raises `OSError`."""
    return os.path.samefile(f"/proc/{pid}/ns/{kind}", f"/proc/self/ns/{kind}")


def stopped_pids(root: int) -> frozenset[int]:
    """The processes of the tree that somebody has stopped (SIGSTOP, a debugger's stop) while it runs freely."""
    return frozenset(pid for pid in descendants(root) if _status_field(pid, "State")[:1] in _STOPPED)


def waits_for_pages(root: int) -> bool:
    """Whether memory of the tree is still to come: a lazy restore fills it through userfaultfd.

    criu's dump would take what is missing for zeros. Told by the kernel: "um" in /proc/PID/smaps.
    """
    return any(_has_missing_pages(pid) for pid in descendants(root))


def _has_missing_pages(pid: int) -> bool:
    try:
        with Path(f"/proc/{pid}/smaps").open("rb") as lines:
            return any(line.startswith(b"VmFlags:") and b" um" in line for line in lines)
    except (FileNotFoundError, ProcessLookupError):
        return False


def _is_still(pid: int) -> bool:
    return _status_field(pid, "State")[:1] in (*_STILL, "0")  # "0": there is no such process any more


def _is_traced(pid: int) -> bool:
    """Whether it has a tracer, or is a zombie, which needs none."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        status = _read(f"/proc/{pid}/status")
        return b"\nTracerPid:\t0\n" not in status or b"\nState:\tZ" in status
    return False


def _read(path: str) -> bytes:
    """A whole file of /proc. There are several for each task, and the tree stands still: text and no `Path`."""
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _status_field(pid: int, name: str) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
    return "0"


async def ended(pidfd: int) -> None:
    """Wait until the process has ended."""
    loop = asyncio.get_running_loop()
    is_over = asyncio.Event()
    loop.add_reader(pidfd, is_over.set)
    try:
        await is_over.wait()
    finally:
        loop.remove_reader(pidfd)
