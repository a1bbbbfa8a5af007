"""Holding a real busy process back: how much it still runs, and that nothing of it ever stays frozen or elsewhere."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from phauld.trees import throttler
from phauld.trees.freezer import CannotFreeze, Freezer, find_cgroup, undo_leftover

pytestmark = pytest.mark.criu

SLICE_SECONDS: Final = 1.5
PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
BUSY: Final = "import os\nos.fork()\nwhile True: pass"
FORKING: Final = """
import os
os.fork()
while True:
    if os.fork() == 0:
        os._exit(0)
    os.wait()
"""
#: Holds a tree back as phauld does, and waits to be killed.
HOLDER: Final = """
import asyncio, sys
from phauld.trees.freezer import Freezer
async def main():
    async with Freezer(int(sys.argv[1])) as freezer:
        await freezer.hold_back(90)
        print("held", freezer._child.pid, flush=True)
        await asyncio.sleep(100)
asyncio.run(main())
"""


class Busy:
    """A process and its child, both as busy as they can be."""

    def __init__(self, script: str) -> None:
        self._popen = subprocess.Popen([sys.executable, "-I", "-S", "-c", script], start_new_session=True)
        self.pid = self._popen.pid
        while len(self.pids) < 2:
            time.sleep(0.01)
        self.before = self.cgroups()

    @property
    def pids(self) -> list[int]:
        return throttler.descendants(self.pid)

    def cgroups(self) -> list[str]:
        """In which cgroups they are."""
        lines = [line for pid in self.pids for line in _text(f"/proc/{pid}/cgroup").splitlines()]
        return sorted({line for line in lines if line.startswith("0::")})

    def cpu_seconds(self) -> float:
        """Of processor time that they have had."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.pids]
        return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")

    async def share(self) -> float:
        """Of the time that one of them runs, for a while."""
        started, used = time.monotonic(), self.cpu_seconds()
        await asyncio.sleep(SLICE_SECONDS)
        return (self.cpu_seconds() - used) / (time.monotonic() - started) / 2

    async def is_free(self) -> bool:
        """Whether it is where it was and runs."""
        return self.cgroups() == self.before and await self.share() > 0

    async def becomes_free(self) -> bool:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.cgroups() == self.before:
                return await self.is_free()
            await asyncio.sleep(0.02)
        return False

    def end(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.fixture
def busy(request: pytest.FixtureRequest) -> Iterator[Busy]:
    started = Busy(getattr(request, "param", BUSY))
    try:
        find_cgroup(started.pid)
    except CannotFreeze as exc:
        started.end()
        pytest.skip(f"no throttle here: {exc}")
    yield started
    started.end()


async def test_the_share_of_time_falls_with_the_percentage(busy: Busy) -> None:
    free = await busy.share()
    shares = []
    async with Freezer(busy.pid) as freezer:
        for percent in (20, 50, 80, 95):
            await freezer.hold_back(percent)
            shares.append(await busy.share())
    assert await busy.is_free()
    twenty, _, eighty, ninety_five = shares
    assert max(eighty, ninety_five) < twenty / 2, (free, shares)  # a busy machine is late to freeze and to thaw it


async def test_zero_lets_go_altogether_and_may_be_followed_by_more(busy: Busy) -> None:
    async with Freezer(busy.pid) as freezer:
        await freezer.hold_back(0)
        assert busy.cgroups() == busy.before
        for _ in range(2):
            await freezer.hold_back(99)
            assert busy.cgroups() != busy.before
            await freezer.hold_back(0)
            assert await busy.is_free()


@pytest.mark.parametrize("busy", [FORKING], indirect=True)
async def test_what_forks_meanwhile_comes_back_too(busy: Busy) -> None:
    async with Freezer(busy.pid) as freezer:
        await freezer.hold_back(70)
        await asyncio.sleep(1)
        assert busy.cgroups() != busy.before
    assert busy.cgroups() == busy.before


async def hold(pid: int) -> tuple[asyncio.subprocess.Process, int]:
    """A stand-in for phauld, and the PID of its throttler."""
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, str(pid), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert holder.stdout is not None
    async with asyncio.timeout(20):
        return holder, int((await holder.stdout.readline()).split()[1])


async def test_phauld_killed_leaves_nothing_frozen(busy: Busy) -> None:
    holder, _ = await hold(busy.pid)
    assert busy.cgroups() != busy.before
    holder.kill()
    await holder.wait()
    assert await busy.becomes_free()


async def test_a_killed_throttler_leaves_nothing_frozen(busy: Busy) -> None:
    holder, throttler_pid = await hold(busy.pid)
    os.kill(throttler_pid, signal.SIGKILL)
    assert await busy.becomes_free()
    holder.terminate()
    await holder.wait()


async def test_both_killed_leave_what_the_next_phauld_undoes(busy: Busy) -> None:
    holder, throttler_pid = await hold(busy.pid)
    holder.send_signal(signal.SIGSTOP)
    os.kill(throttler_pid, signal.SIGKILL)
    holder.kill()
    await holder.wait()
    assert busy.cgroups() != busy.before
    await undo_leftover(busy.pid)
    assert await busy.is_free()


async def test_a_tree_in_a_tracers_hands_is_not_frozen(busy: Busy) -> None:
    async with Freezer(busy.pid) as freezer:
        await freezer.hold_back(99)
        child = next(path for path in find_cgroup(busy.pid).parent.iterdir() if path.name.startswith("phaul-throttle-"))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.ptrace(PTRACE_SEIZE, busy.pid, 0, 0) == 0
        try:
            await asyncio.sleep(0.3)
            looks = []
            for _ in range(100):
                looks.append((child / "cgroup.freeze").read_text().strip())
                await asyncio.sleep(0.005)
        finally:
            os.kill(busy.pid, signal.SIGSTOP)  # a tracer can only let go of what stands still
            os.waitpid(busy.pid, 0)  # noqa: ASYNC222 (at once)
            assert libc.ptrace(PTRACE_DETACH, busy.pid, 0, signal.SIGCONT) == 0
        assert set(looks) == {"0"}
    os.kill(busy.pid, signal.SIGCONT)
    assert await busy.is_free()


def test_a_tree_in_two_cgroups_is_refused(busy: Busy) -> None:
    other = find_cgroup(busy.pid) / f"test-{busy.pid}"
    other.mkdir()
    try:
        throttler.move(busy.pids[1:], str(other))
        with pytest.raises(CannotFreeze, match="spread over 2 cgroups"):
            find_cgroup(busy.pid)
    finally:
        throttler.release(str(other))
