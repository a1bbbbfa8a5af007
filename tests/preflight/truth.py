"""Moves one small program with a real criu on this machine, and asks preflight beforehand: who was right?"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from phaul_client.preflight import (
    Problem,
    Severity,
    Wishes,
    check_destination,
    check_source,
    choose_options,
    look_up,
    read_node,
    read_tree,
    requirements,
)
from phaul_client.preflight.options import ChosenOptions
from phaul_client.tree import descendants
from phaul_criu.criu import Criu
from phaul_criu.errors import CriuError
from phaul_criu.network_lock import remove_network_lock
from phaul_criu.requests import DumpOptions, NetworkLock, RestoreOptions
from tests.node.criu_victims import alive, children

PRELUDE: Final = """
import array, ctypes, fcntl, mmap, os, resource, select, signal, socket, stat, struct, sys, tempfile, threading, time
directory = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
def path(name):
    return os.path.join(directory, name)
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def syscall(*arguments):
    return check(libc.syscall(*arguments))
def child(function):
    pid = os.fork()
    if pid == 0:
        function()
        os._exit(0)
    return pid
def busy(function):
    # a child that has done this, and sleeps
    ends = os.pipe()
    def work():
        os.close(ends[0])
        function()
        os.write(ends[1], b"x")
        os.close(ends[1])
        sleep()
    pid = child(work)
    os.close(ends[1])
    if os.read(ends[0], 1) != b"x":
        sys.exit()
    os.read(ends[0], 1)
    os.close(ends[0])
    return pid
def thread(function):
    # a thread that has done this, and sleeps
    done = threading.Event()
    def work():
        function()
        done.set()
        sleep()
    threading.Thread(target=work, daemon=True).start()
    if not done.wait(9):
        sys.exit()
def failed(kind, error, _traceback):
    with open(path("errors"), "w") as file:
        file.write(f"{kind.__name__}: {error}")
sys.excepthook = failed
def sleep():
    while True:
        time.sleep(0.05)
"""
EPILOGUE: Final = """
open(path("ready"), "w").close()
sleep()
"""
#: What preflight rightly says of every program that has no time namespace, which none of the corpus has.
OF_EVERY_PROGRAM: Final = frozenset({"clock-jump"})
_START_SECONDS: Final = 10.0
_CRIU_SECONDS: Final = 20.0


class NotStarted(Exception):
    """The program cannot run here: the kernel lacks what it is about, or a tool is missing."""


@dataclass(slots=True)
class Stage:
    """What a case's surroundings may use: its directory, arguments of its start, and the process to move."""

    directory: Path
    #: Keyword arguments of Popen.
    start: dict[str, Any] = field(default_factory=dict)
    #: Words after the program's directory.
    arguments: list[str] = field(default_factory=list)
    pid: int = 0

    def file(self, name: str) -> Path:
        return self.directory / name


Surroundings = Callable[[Stage], AbstractContextManager[None]]


@contextmanager
def nothing(_stage: Stage) -> Iterator[None]:
    """No surroundings."""
    yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One small program."""

    name: str
    #: Python, run between PRELUDE and EPILOGUE; empty: only sleeps.
    program: str = ""
    #: Codes that preflight must report, at whatever severity; empty: it must not warn.
    codes: frozenset[str] = frozenset()
    #: Whether criu moves it, as recorded; the run checks it.
    moves: bool = True
    wishes: Wishes = field(default_factory=Wishes)
    #: Such as ("unshare", "--pid", "--fork").
    wrapper: tuple[str, ...] = ()
    #: Replaces the interpreter and the program; "{directory}" is filled in.
    argv: tuple[str, ...] = ()
    #: What surrounds the program on the source.
    around: Surroundings = nothing
    #: What is different on the destination.
    destination: Surroundings = nothing
    #: Moved by this function's PID instead of the program's: for trees that have no program.
    pid: Callable[[Stage], int] | None = None
    #: Move the first child of the program.
    move_child: bool = False
    #: It stops itself once it has said that it is ready.
    stops: bool = False
    #: criu is not asked, because it could not be or must not be; `moves` is then what is known of it.
    ask_criu: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What happened."""

    case: Case
    problems: tuple[Problem, ...]
    #: None: not tried.
    moved: bool | None
    #: criu's reason if it did not.
    cause: str = ""

    @property
    def missed(self) -> list[str]:
        """What preflight should have said."""
        found = {problem.code for problem in self.problems}
        silent = self.moved is False and not self.refused
        return [*sorted(self.case.codes - found), *(["(criu failed without an error of preflight)"] if silent else [])]

    @property
    def false_alarms(self) -> list[str]:
        """What preflight should not have said."""
        warned = {problem.code for problem in self.problems if problem.severity >= Severity.WARNING}
        needless = self.moved is True and self.refused
        return [
            *sorted(warned - self.case.codes - OF_EVERY_PROGRAM),
            *(["(refused, but criu moves it)"] if needless else []),
        ]

    @property
    def refused(self) -> bool:
        return any(problem.severity is Severity.ERROR for problem in self.problems)


def run_case(case: Case, criu: Criu) -> Outcome:
    """Start it, ask preflight on both sides, move it with criu in between, and clear everything away."""
    with tempfile.TemporaryDirectory(prefix="phaul-preflight-", ignore_cleanup_errors=True) as directory:
        stage = Stage(directory=Path(directory))
        stage.directory.chmod(0o777)
        with case.around(stage):
            popen = start(case, stage) if case.pid is None else None
            stage.pid = _root(popen, case) if popen else case.pid(stage)  # type: ignore[misc]
            known = set(descendants(stage.pid)) if popen else set()
            try:
                return _move(case, stage, criu, popen)
            finally:
                clear(popen, known)


def start(case: Case, stage: Stage) -> subprocess.Popen[bytes]:
    """Start the program and wait until it is ready. Raises NotStarted if it does not get there."""
    program = [sys.executable, "-I", "-S", "-c", PRELUDE + case.program + EPILOGUE]
    argv = [each.format(directory=stage.directory) for each in case.argv] or program
    argv = [*case.wrapper, *argv, *([] if case.argv else [str(stage.directory), *stage.arguments])]
    null = subprocess.DEVNULL
    options: dict[str, Any] = {"stdin": null, "stdout": null, "stderr": null, "cwd": "/", "start_new_session": True}
    popen: subprocess.Popen[bytes] = subprocess.Popen(argv, **(options | stage.start))
    deadline = time.monotonic() + _START_SECONDS
    while not (stage.directory / "ready").exists():
        if popen.poll() is not None or time.monotonic() > deadline:
            clear(popen, set())
            errors = stage.file("errors")
            why = errors.read_text() if errors.exists() else f"exit status {popen.returncode}"
            raise NotStarted(f"{case.name} does not run here: {why}")
        time.sleep(0.005)
    if case.stops:
        os.waitid(os.P_PID, popen.pid, os.WSTOPPED | os.WNOWAIT)
    while case.argv and popen.poll() is None and not _sleeps(popen.pid):  # it cannot say that it is ready
        time.sleep(0.001)
    return popen


def _sleeps(pid: int) -> bool:
    """Whether it has begun: in the midst of its exec a process has no files mapped."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "S" and "libc" in Path(f"/proc/{pid}/maps").read_text()


def _root(popen: subprocess.Popen[bytes], case: Case) -> int:
    if "--fork" in case.wrapper:
        return _first_child(_first_child(popen.pid)) if case.move_child else _first_child(popen.pid)
    return popen.pid


def _first_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _move(case: Case, stage: Stage, criu: Criu, popen: subprocess.Popen[bytes] | None) -> Outcome:
    tree = read_tree(stage.pid)
    node = read_node(str(stage.directory), criu_version=40201, lazy_pages=True)
    chosen = choose_options(tree, case.wishes)
    problems = check_source(tree, node, case.wishes)
    if not case.ask_criu:
        return Outcome(case=case, problems=problems, moved=None)
    images = stage.directory / "images"
    images.mkdir()
    images_fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            asyncio.run(criu.dump(_dump_options(chosen, stage.pid, images_fd), timeout_seconds=_CRIU_SECONDS))
        except CriuError as exc:
            return Outcome(case=case, problems=problems, moved=False, cause=f"dump: {exc.cause or exc}")
        reap(popen, tree.pids)
        with case.destination(stage):
            needs = requirements(tree, node)
            found = look_up(needs, node)
            problems = (*problems, *check_destination(needs, node, found, case.wishes))
            return _restore(case, chosen, images_fd, criu, problems)
    finally:
        os.close(images_fd)


def _restore(case: Case, chosen: ChosenOptions, images_fd: int, criu: Criu, problems: tuple[Problem, ...]) -> Outcome:
    try:
        pid = asyncio.run(criu.restore(_restore_options(chosen, images_fd), timeout_seconds=_CRIU_SECONDS))
    except CriuError as exc:
        with suppress(OSError, ValueError):
            remove_network_lock(images_fd)
        return Outcome(case=case, problems=problems, moved=False, cause=f"restore: {exc.cause or exc}")
    time.sleep(0.1)
    lives = alive(pid)
    pids = set(descendants(pid))
    clear(None, pids)
    return Outcome(case=case, problems=problems, moved=lives, cause="" if lives else "restored, and ended at once")


def _tree_options(chosen: ChosenOptions) -> dict[str, Any]:
    return {
        "shell_job": chosen.shell_job,
        "ext_unix_sk": chosen.ext_unix_sk,
        "file_locks": chosen.file_locks,
        "link_remap": chosen.link_remap,
        "tcp_established": chosen.tcp_established,
        "tcp_close": chosen.tcp_close,
        "tcp_skip_in_flight": chosen.tcp_skip_in_flight,
        "evasive_devices": chosen.evasive_devices,
        "network_lock": NetworkLock.NFTABLES if chosen.network_lock == "nftables" else NetworkLock.SKIP,
    }


def _dump_options(chosen: ChosenOptions, pid: int, images_fd: int) -> DumpOptions:
    options = _tree_options(chosen)
    return DumpOptions(
        pid=pid,
        images_dir_fd=images_fd,
        ghost_limit_bytes=chosen.ghost_limit_bytes,
        collect_timeout_seconds=3,
        notify=False,
        **options,
    )


def _restore_options(chosen: ChosenOptions, images_fd: int) -> RestoreOptions:
    return RestoreOptions(images_dir_fd=images_fd, **_tree_options(chosen))


def reap(popen: subprocess.Popen[bytes] | None, pids: frozenset[int]) -> None:
    """Make the PIDs of the dumped tree free again."""
    if popen is not None:
        popen.wait(timeout=5)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        for pid in set(children()) & pids:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)


def clear(popen: subprocess.Popen[bytes] | None, pids: set[int]) -> None:
    """End what is left of a tree."""
    if popen is not None:
        pids = {*pids, *descendants(popen.pid)} if popen.poll() is None else pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if popen is not None:
        popen.wait(timeout=5)
    reap(None, frozenset(pids))


def results(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The report: obstacles counted, misses and false alarms named."""
    return {
        "programs": len(outcomes),
        "obstacles": sum(bool(outcome.case.codes) for outcome in outcomes),
        "missed": [f"{each.case.name}: {what}" for each in outcomes for what in each.missed],
        "false_alarms": [f"{each.case.name}: {what}" for each in outcomes for what in each.false_alarms],
    }
