"""What each fault of the matrix does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from phaul.v1 import migrations_pb2, types_pb2
from phaul.v1.types_pb2 import Options
from tests.daemon import IMAGES_DIR, STATE_DIR
from tests.faults.bench import MEMORY_DIR, Bench
from tests.faults.gates import Verdict
from tests.faults.judge import Judgement, judge
from tests.faults.points import Point
from tests.faults.victims import Victim
from tests.inventory import processes
from tests.nodes import Node
from tests.started import Process

CUT_SECONDS: Final = 1.0
STALL_SECONDS: Final = 1.0
LONG_SECONDS: Final = 8.0  #: longer than the freeze budget of its points
FULL_SECONDS: Final = 1.5
REACH_SECONDS: Final = 15.0
LATER_MS: Final = (2, 4, 6, 9)  #: between two boundaries: while a call is being served
_TREES: Final[dict[str, dict[str, int]]] = {
    "one": {},
    "three": {"children": 2, "threads": 2},
    "outside": {"outside": True},
}


class NotReached(AssertionError):
    """The fault never happened."""


class Run:
    """One point, once."""

    def __init__(self, bench: Bench, point: Point, migration_id: str) -> None:
        self._bench = bench
        self._point = point
        self._migration_id = migration_id
        self._cli: Process | None = None
        self._later: list[asyncio.Task[None]] = []
        self._happened = asyncio.Event()
        self._faults: dict[str, Callable[[], Awaitable[Verdict | None]]] = {
            "kill-source-phauld": lambda: bench.kill_daemon("a"),
            "kill-destination-phauld": lambda: bench.kill_daemon("b"),
            **{f"kill-source-phauld-{ms}-ms-later": self._kill_later("a", ms) for ms in LATER_MS},
            **{f"kill-destination-phauld-{ms}-ms-later": self._kill_later("b", ms) for ms in LATER_MS},
            "kill-source-criu": lambda: self._kill_criu("a:dump"),
            "kill-destination-criu": lambda: self._kill_criu("b:restore"),
            "kill-page-server": lambda: self._kill_criu("b:page-server"),
            "kill-source-pipe": lambda: self._kill_pipe("a"),
            "kill-destination-pipe": lambda: self._kill_pipe("b"),
            "kill-cli": self._kill_cli,
            "link-cut": self._cut,
            "link-stalled": lambda: self._stall(STALL_SECONDS),
            "link-stalled-for-long": lambda: self._stall(LONG_SECONDS),
            "lose": self._lose,
            "lose-all": self._lose,
            "repeat": self._repeat,
            "wait-5-seconds": lambda: asyncio.sleep(5),
            "kill-lazy-pages": self._kill_lazy_pages,
            "kill-destination-root": lambda: self._kill_task(0),
            "kill-destination-child": lambda: self._kill_task(-1),
            "kill-source-shim": lambda: self._kill_shim("a", "run"),
            "kill-destination-shim": lambda: self._kill_shim("b", "restore"),
            "cancel": self._cancel,
            "destination-images-full": lambda: self._fill("b", IMAGES_DIR, MEMORY_DIR),
            "source-images-full": lambda: self._fill("a", IMAGES_DIR, MEMORY_DIR),
            "destination-state-full": lambda: self._fill("b", STATE_DIR),
            "source-state-full": lambda: self._fill("a", STATE_DIR),
            "destination-images-read-only": lambda: self._make_read_only("b", IMAGES_DIR, MEMORY_DIR),
        }

    async def run(self) -> Judgement:
        """Start a victim, let the fault happen on its way, wait, judge. Raises NotReached, TimeoutError, Wrong."""
        victim = await self._bench.run_victim(**_TREES[self._point.tree])  # type: ignore[arg-type]
        self._bench.gates.clear()
        for at, fault in self._point.first:
            self._bench.gates.plan(at, self._faults[fault])
        self._bench.gates.plan(self._point.at, self._happen, always=self._point.fault == "lose-all")
        try:
            return await self._run(victim)
        finally:
            for task in self._later:
                task.cancel()
            self._bench.link.mend()

    async def _run(self, victim: Victim) -> Judgement:
        if self._point.fault == "kill-cli":
            self._cli = await self._bench.start_cli(victim, "--restore", "eager", "--quiet")
        else:
            with contextlib.suppress(Exception):  # the daemon may be killed before it has answered
                await self._bench.migrate(victim, migration_id=self._migration_id, options=self._options())
        try:
            async with asyncio.timeout(REACH_SECONDS):
                await self._happened.wait()
        except TimeoutError:
            raise NotReached(f"{self._point.at}: only {self._bench.gates.seen}") from None
        await asyncio.gather(*self._later)
        migration_id = self._migration_id
        if self._cli is not None:
            migration_id = await self._bench.find_record(victim)
        await self._bench.settle(migration_id)
        return await judge(self._bench, victim, migration_id)

    def _options(self) -> Options:
        mode = types_pb2.RESTORE_MODE_LAZY if self._point.lazy else types_pb2.RESTORE_MODE_EAGER
        options = Options(restore_mode=mode, checksum=self._point.pipe)
        options.freeze_budget.FromMilliseconds(round(self._point.freeze_budget_seconds * 1000))
        return options

    async def _happen(self) -> Verdict | None:
        try:
            return await self._faults[self._point.fault]()
        finally:
            self._happened.set()

    def _afterwards(self, seconds: float, undo: Callable[[], object]) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            undo()

        self._later.append(asyncio.create_task(wait()))

    async def _kill_criu(self, key: str) -> None:
        self._bench.gates.kill_criu(key)
        at = ":".join(self._point.at.split(":")[:2])
        if self._bench.gates.criu.get(at) != self._bench.gates.criu[key]:  # else its wrapper waits for us
            await self._bench.gates.until_gone(key)
            await asyncio.sleep(0.05)

    async def _kill_pipe(self, name: str) -> None:
        node = self._bench.nodes[name]
        (pid,) = [each.parent.name for each in (node.root / "proc").glob("[0-9]*/cmdline") if _is_pipe(each)]
        await node.run(["kill", "-KILL", pid])
        while _is_pipe(node.root / "proc" / pid / "cmdline"):  # noqa: ASYNC110 (it is phauld's child)
            await asyncio.sleep(0.005)

    def _kill_later(self, name: str, milliseconds: int) -> Callable[[], Awaitable[None]]:
        async def kill() -> None:
            await asyncio.sleep(milliseconds / 1000)
            await self._bench.kill_daemon(name)

        async def happen() -> None:
            self._later.append(asyncio.create_task(kill()))

        return happen

    async def _kill_cli(self) -> None:
        assert self._cli is not None
        await self._cli.stop(9)

    async def _cut(self) -> Verdict:
        self._bench.link.cut()
        self._afterwards(CUT_SECONDS, self._bench.link.mend)
        return Verdict.LOSE

    async def _stall(self, seconds: float) -> None:
        self._bench.link.stall()
        self._afterwards(seconds, self._bench.link.mend)

    async def _lose(self) -> Verdict:
        return Verdict.LOSE

    async def _repeat(self) -> Verdict:
        return Verdict.REPEAT

    async def _cancel(self) -> None:
        request = migrations_pb2.CancelMigrationRequest(migration_id=self._migration_id)
        call = self._bench.migrations("a").CancelMigration(request, timeout=10)
        self._later.append(asyncio.ensure_future(_answered(call)))
        await asyncio.sleep(0.05)  # it has arrived

    async def _fill(self, name: str, *directories: Path) -> None:
        fillers = [self._bench.nodes[name].root / each.relative_to("/") / "filler" for each in directories]
        for filler in fillers:
            fill(filler)

        def undo() -> None:
            for filler in fillers:
                filler.unlink()

        self._afterwards(FULL_SECONDS, undo)

    async def _kill_lazy_pages(self) -> None:
        signal_lazy_pages(self._bench.nodes["b"])

    async def _kill_task(self, number: int) -> None:
        """Of the tree that criu holds."""
        node = self._bench.nodes["b"]
        pids = sorted(pid for pid, line in processes(node) if "victim.py" in line)
        signal_pid(node, pids[number])

    async def _kill_shim(self, name: str, mode: str) -> None:
        node, words = self._bench.nodes[name], f"shim {mode} "
        signal_one(node, words)
        while any(words in line for _, line in processes(node)):  # noqa: ASYNC110 (it is phauld's child, or init's)
            await asyncio.sleep(0.005)

    async def _make_read_only(self, name: str, *directories: Path) -> None:
        node = self._bench.nodes[name]

        async def remount(option: str) -> None:
            for directory in directories:
                await node.run(["mount", "-o", f"remount,{option}", directory])

        async def undo() -> None:
            await self._bench.settle(self._migration_id)  # however long it takes to come to the first file
            await remount("rw")

        await remount("ro")
        self._later.append(asyncio.create_task(undo()))


def _is_pipe(command_line: Path) -> bool:
    with contextlib.suppress(OSError):
        return b"phaul_client.pipe_process" in command_line.read_bytes()
    return False


def signal_lazy_pages(node: Node, number: signal.Signals = signal.SIGKILL) -> int:
    """To the `criu lazy-pages` of a node; its PID there."""
    return signal_one(node, "lazy-pages -D", number, but_not="python")


def signal_one(node: Node, words: str, number: signal.Signals = signal.SIGKILL, *, but_not: str = "\0") -> int:
    """To the one process of a node whose command line has these words; its PID there."""
    (pid,) = [pid for pid, line in processes(node) if words in line and but_not not in line]
    signal_pid(node, pid, number)
    return pid


def signal_pid(node: Node, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """To a process by its PID on a node: a descriptor finds it."""
    process = os.open(node.root / f"proc/{pid}", os.O_DIRECTORY)
    signal.pidfd_send_signal(process, number)
    os.close(process)


async def _answered(call: Awaitable[object]) -> None:
    await call


def fill(filler: Path) -> None:
    """Take what is left of the file system, though others take of it meanwhile."""
    with filler.open("wb", buffering=0) as file:
        while (status := os.statvfs(filler)).f_bavail:
            size_bytes = os.fstat(file.fileno()).st_size + status.f_bavail * status.f_frsize
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
