"""A criu that is killed at one instant of a dump after the other, and a program that knows each of its registers.

An instant is a call of ptrace or wait4 by criu: `killed.c`, preloaded into it, has it end there by SIGKILL. Nothing
here waits for luck.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import shutil
import signal
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from phaul_client.tree import descendants
from phaul_criu.child import Child, spawn
from phaul_criu.install import find_binary
from phaul_criu.urgency import hurry
from phauld.guarding.dump_hold import DumpGuard
from tests.need import need

HERE: Final = Path(__file__).parent
VICTIM: Final = HERE.parent / "victims/registers.c"
SLOT_BYTES: Final = 64
START_SECONDS: Final = 20.0
BEAT_SECONDS: Final = 60.0  #: a busy machine is no harm
BEATS, ERRORS, ASKED, TID, HANDLED = range(0, 40, 8)
COMPUTES, SLEEPS, READS, WAITS = range(4)
_FUTEX, _FUTEX_WAKE = 202, 1
_CODE_BYTES: Final = 64
_KEPT: Final = ("SigBlk", "SigPnd", "ShdPnd", "SigCgt", "SigIgn", "TracerPid", "Threads", "Cpus_allowed")
PTRACE_CONT: Final = 7
#: Where criu keeps what it has found out of the kernel: not what `killed.c` has made it believe.
_OWN_RUN: Final = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh")


class Tools:
    """What is compiled, once."""

    def __init__(self, directory: Path) -> None:
        """Raises `RuntimeError`."""
        if reason := need({"gcc": "gcc", "x86_64-linux-gnu-gcc": "libc6-dev"}):
            raise RuntimeError(reason)
        self.killed, self.victim = directory / "killed.so", directory / "registers"
        _compile(HERE / "killed.c", self.killed, "-shared", "-fPIC")
        _compile(VICTIM, self.victim, "-pthread")


def _compile(source: Path, result: Path, *options: str) -> None:
    argv = ["gcc", "-O2", "-Wall", "-Werror", *options, "-o", str(result), str(source), "-ldl"]
    subprocess.run(argv, check=True)


class Victim:
    """A tree of the program; a child of ours."""

    def __init__(self, tools: Tools, directory: Path, processes: int, threads: int, shift: int = 0) -> None:
        self.lay_out(tools, directory, processes, threads, shift)
        self._process = subprocess.Popen(
            self.argv,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.begin(self._process.pid)

    def lay_out(self, tools: Tools, directory: Path, processes: int, threads: int, shift: int) -> None:
        """Its files, and `argv`, which begins in `directory`."""
        directory.mkdir()
        self.directory = directory
        self.patience_seconds = BEAT_SECONDS
        self.threads = threads
        self._shift = shift
        self._tasks = range(processes * threads)
        slots = directory / "slots"
        slots.write_bytes(bytes(max(mmap.PAGESIZE, SLOT_BYTES * len(self._tasks))))
        with slots.open("r+b") as file:
            self._slots = mmap.mmap(file.fileno(), 0)
        for task in self._tasks:
            os.mkfifo(directory / f"pipe-{task}")
        self.argv = [str(word) for word in (tools.victim, slots, processes, threads, shift)]

    def begin(self, pid: int) -> None:
        """Once it was started."""
        self.pid = pid
        deadline = time.monotonic() + START_SECONDS
        while not all(self._word(task, TID) for task in self._tasks):
            assert time.monotonic() < deadline, self.has_ended()
            time.sleep(0.002)
        self._pipes = {
            task: os.open(self.directory / f"pipe-{task}", os.O_WRONLY)
            for task in self._tasks
            if self._kind(task) == READS
        }
        assert self.beats() == ""
        self.usual = self.state()

    def has_ended(self) -> int | None:
        """How."""
        return self._process.poll()

    def _kind(self, task: int) -> int:
        return (task % self.threads + task // self.threads + self._shift) % 4

    def _word(self, task: int, name: int) -> int:
        (value,) = struct.unpack_from("<Q", self._slots, task * SLOT_BYTES + name)
        return int(value)

    def beats(self) -> str:
        """Whether each task goes on, once; what is wrong."""
        before = [self._word(task, BEATS) for task in self._tasks]
        handled = self._word(0, HANDLED)
        self._ask()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + self.patience_seconds
        while left := [task for task in self._tasks if self._word(task, BEATS) == before[task]]:
            if (status := self.has_ended()) is not None:
                return f"it has ended: {status}"
            if time.monotonic() > deadline:
                return f"no beat of {left}"
            self._wake()
            time.sleep(0.001)
        while self._word(0, HANDLED) == handled:
            if time.monotonic() > deadline:
                return "no handler"
            time.sleep(0.001)
        twice = [
            task
            for task in self._tasks
            if self._kind(task) in (READS, WAITS) and self._word(task, BEATS) != before[task] + 1
        ]
        wrong = [task for task in self._tasks if self._word(task, ERRORS)]
        return f"more than once: {twice}, wrong: {wrong}" if twice or wrong else ""

    def _ask(self) -> None:
        for task in self._tasks:
            match self._kind(task):
                case kind if kind == READS:
                    with suppress(BrokenPipeError):
                        os.write(self._pipes[task], b"x")
                case kind if kind == WAITS:
                    at = task * SLOT_BYTES + ASKED
                    (seen,) = struct.unpack_from("<I", self._slots, at)
                    struct.pack_into("<I", self._slots, at, seen + 1)

    def _wake(self) -> None:
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._slots))
        for task in self._tasks:
            if self._kind(task) == WAITS:
                word = ctypes.c_void_p(base + task * SLOT_BYTES + ASKED)
                ctypes.CDLL(None).syscall(_FUTEX, word, _FUTEX_WAKE, 1, None, None, 0)

    def state(self) -> dict[str, Any]:
        """What must be as before: masks, signals, memory, descriptors, code, where it may run."""
        found: dict[str, Any] = {}
        for number, pid in enumerate(sorted(descendants(self.pid))):
            proc = Path(f"/proc/{pid}")
            areas = [line.split() for line in (proc / "maps").read_text().splitlines()]
            found[f"{number} maps"] = [(area[0], area[1], *area[5:]) for area in areas]
            found[f"{number} fd"] = sorted(os.readlink(each) for each in (proc / "fd").iterdir())
            code = next(area[0] for area in areas if area[1] == "r-xp")
            with (proc / "mem").open("rb", 0) as memory:
                found[f"{number} code"] = os.pread(memory.fileno(), _CODE_BYTES, int(code.split("-")[0], 16))
            for tid in sorted(map(int, os.listdir(proc / "task"))):
                lines = (proc / f"task/{tid}/status").read_text().splitlines()
                fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
                found |= {f"{number} {tid - pid} {name}": fields[name] for name in _KEPT}
                found[f"{number} {tid - pid} stands"] = fields["State"][0] in "tT"
        return found

    def harm(self) -> str:
        """What is not as it was."""
        if wrong := self.beats():
            return wrong
        now = self.state()
        keys = sorted(self.usual.keys() | now.keys())
        return "; ".join(
            f"{key}: {self.usual.get(key)} is {now.get(key)}" for key in keys if now.get(key) != self.usual.get(key)
        )

    def end(self) -> None:
        with suppress(ProcessLookupError):
            for pid in reversed(list(descendants(self.pid))):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for descriptor in self._pipes.values():
            os.close(descriptor)


class Criu:
    """Dumps (or pre-dumps) a victim, which runs on; images go into `directory`."""

    def __init__(self, tools: Tools, directory: Path, operation: str, guard: DumpGuard | None) -> None:
        directory.mkdir()
        self._tools = tools
        self._directory = directory
        self._operation = operation
        self._guard = guard

    async def instants(self, victim: Victim) -> list[tuple[str, int]]:
        """The calls that it makes when nobody kills it: "p" and the request, or "w"."""
        log = self._directory / "calls"
        returncode = await self.run(victim, KILLED_COUNT=str(log))
        assert returncode == 0, (self._images / "log").read_text()
        return [(line.split()[1], int(line.split()[2])) for line in log.read_text().splitlines()]

    @property
    def _images(self) -> Path:
        return self._directory / "images"

    async def run(self, victim: Victim, **settings: str) -> int:
        """How it ended."""
        shutil.rmtree(self._images, ignore_errors=True)
        self._images.mkdir()
        argv: list[str | Path] = [find_binary(), self._operation, "-t", str(victim.pid), "-D", self._images]
        argv += ["-o", "log", "-v1"]
        if self._operation == "dump":
            argv.append("--leave-running")
        else:
            argv = [*_OWN_RUN, *argv]
            settings["KILLED_TRACKS"] = "1"
        env = os.environ | {"LD_PRELOAD": str(self._tools.killed), "KILLED_STOPS": "1"} | settings
        async with await spawn(argv, env=env) as criu:
            await stopped(criu.pid)
            await self._prepare(criu, victim)
            os.kill(criu.pid, signal.SIGCONT)
            async with asyncio.timeout(60):
                returncode = await criu.wait()
        if self._guard is not None:
            await self._guard.settled()
        return returncode

    async def _prepare(self, criu: Child, victim: Victim) -> None:
        if self._guard is None:
            return
        if self._operation == "dump":
            hurry(criu.pid)
            await self._guard.watch(criu.pid, victim.pid)
            await self._guard.note_frozen()  # a little early: nobody tells us when
        else:
            await self._guard.watch(criu.pid, victim.pid, is_told=False)


async def stopped(pid: int) -> None:
    async with asyncio.timeout(START_SECONDS):
        while Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"T":  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.001)


def may_be_real_time() -> bool:
    """Whether criu and its guard may go first: else what has been set in motion is not caught for certain."""
    try:
        before = os.sched_getscheduler(0)
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        os.sched_setscheduler(0, before, os.sched_param(0))
    except OSError:
        return False
    return True
