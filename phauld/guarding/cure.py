"""Gives a tree back its registers, signal masks and code when the criu that had changed them is killed. x86-64 alone.

While criu puts its code into a task, the task's own registers are in criu's memory alone. A criu that is killed then
leaves a task that runs on in that code, and ends at the next breakpoint of it. So in the last moment of criu, in which
the kernel still holds the tree for it, what it remembers is read, and SIGSTOP is sent to the tree: it takes effect
before anything runs. When criu is gone, each task that was changed is made what it was, and all go on.

The invariant: a task of which there is any doubt is let go as it is, which is what happened to all before.
"""

import contextlib
import os
import signal
from collections.abc import Iterable
from typing import NamedTuple

from phauld.guarding import criu_memory
from phauld.guarding.criu_memory import IP, Saved
from phauld.guarding.lazy_guard import PTRACE_CONT, ptrace, told_by_status, tracer
from phauld.guarding.tracee import Lost, Tracee
from phauld.proc import descendants

CLOSE, MUNMAP = 3, 11
#: compel/arch/x86/src/lib/infect.c, code_syscall; behind it criu puts the name of a file for a moment
INJECTED, FILE_NAME = b"\x0f\x05\xcc\xcc\xcc\xcc\xcc\xcc", b"CRIUMFD\0"
CODE_BYTES = len(INJECTED) + len(FILE_NAME)
SMALLEST_AREA = 4096
END_OF_MEMORY = 1 << 63
CRIU_FILE = "/memfd:CRIUMFD"
LARGEST_STRETCH = 1 << 28
HEAP = ("[heap]", "")
STARTED = 19  # in /proc/PID/stat, counted from the state on


class Area(NamedTuple):
    """A line of /proc/PID/maps."""

    start: int
    end: int
    rights: str
    offset: int
    name: str


class Group(NamedTuple):
    """A process that criu holds."""

    pid: int
    threads: tuple[int, ...]
    was_stopped: bool


class Patient(NamedTuple):
    """A process in our hands: its tasks, the first one first."""

    group: Group
    tasks: dict[int, Tracee]


class Before(NamedTuple):
    """What is known of a tree before criu touches it."""

    pids: tuple[int, ...]
    started: dict[int, int]  #: when each did, in clock ticks
    stopped: frozenset[int]
    code: dict[tuple[int, int], bytes]  #: of each process, at an address


def look(root: int) -> Before:
    """While the tree runs."""
    pids, started, stopped, code = descendants([root]), {}, set(), {}
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = stat(pid)
            started[pid] = int(fields[STARTED])
            if fields[0] == b"T":
                stopped.add(pid)
            place = place_of_code(areas(pid))
            if place is not None:
                code[pid, place.start] = peek(pid, place.start, CODE_BYTES)
    return Before(tuple(pids), started, frozenset(stopped), code)


class Cure:
    """Of the tree below `root` in the hands of `criu`."""

    def __init__(self, criu: int, root: int, before: Before) -> None:
        self._criu = criu
        self._root = root
        self._before = before
        self._stopped: dict[int, bool] = {}  # of each process that got SIGSTOP: was it stopped before?
        self._groups: list[Group] = []
        self._saved: dict[int, list[Saved]] = {}

    def prepare(self) -> None:
        """criu is about to end; the kernel still holds the tree for it, but for a task that does what criu told it.

        That one must not come to its breakpoint, so SIGSTOP comes first.
        """
        for pid in (*self._before.pids, *descendants([self._root])):
            if pid not in self._stopped and tracer(pid) == self._criu:
                self._stopped[pid] = pid in self._before.stopped or stop_is_pending(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
        self._groups = [Group(pid, self._held(pid), was_stopped) for pid, was_stopped in self._stopped.items()]
        tasks = {tid for group in self._groups for tid in group.threads}
        for saved in self._remembered(tasks) if tasks else ():
            self._saved.setdefault(saved.task, []).append(saved)

    def perform(self) -> None:
        """criu is gone. On return the tree runs, or stands still if it did before."""
        patients = [Patient(group, self._seize(group.threads)) for group in self._groups]
        for patient in patients:
            with contextlib.suppress(Exception):  # they go on, whatever it is
                self._cure(patient)
        for patient in patients:
            go_on(patient)

    def _held(self, pid: int) -> tuple[int, ...]:
        with contextlib.suppress(OSError):
            tids = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
            return tuple(sorted(tid for tid in tids if tracer(tid) == self._criu))
        return ()

    def _remembered(self, tasks: set[int]) -> Iterable[Saved]:
        with contextlib.suppress(OSError):
            for area in areas(self._criu):
                is_heap = area.rights == "rw-p" and area.name in HEAP and area.end - area.start <= LARGEST_STRETCH
                if is_heap:  # on its stack criu has changed copies of the registers
                    with contextlib.suppress(OSError):
                        yield from criu_memory.find(peek(self._criu, area.start, area.end - area.start), tasks)

    def _seize(self, tids: Iterable[int]) -> dict[int, Tracee]:
        seized = {}
        for tid in tids:
            with contextlib.suppress(OSError):
                seized[tid] = Tracee(tid)
        for tid, task in list(seized.items()):
            try:
                task.settle()
            except (OSError, Lost):
                seized.pop(tid).detach()
        return seized

    def _cure(self, patient: Patient) -> None:
        pid, tasks = patient.group.pid, patient.tasks
        mapped = areas(pid)
        place, inside = place_of_code(mapped), [area for area in mapped if area.name.startswith(CRIU_FILE)]
        is_injected = place is not None and self._mend_code(pid, place)
        for tid, task in tasks.items():
            with contextlib.suppress(OSError, Lost):
                ip = task.registers()[IP]
                if any(area.start <= ip < area.end for area in inside):
                    self._take_out_of_crius_code(task, is_first=tid == pid)
                elif is_injected and place is not None and place.start <= ip <= place.start + CODE_BYTES:
                    self._restore(task, was_called=True)
                else:
                    self._restore_mask(task)
        if pid in tasks:
            clean(tasks[pid], inside, mapped)

    def _take_out_of_crius_code(self, task: Tracee, *, is_first: bool) -> None:
        """The first task of a process goes back by itself as soon as it learns that criu is gone."""
        if is_first:
            task.clear_breakpoints()
            task.finish_handler()
        elif (saved := self._restore(task, was_called=False)) is not None:
            with contextlib.suppress(OSError):
                task.set_extended(saved.extended)

    def _restore(self, task: Tracee, *, was_called: bool) -> Saved | None:
        found = self._saved.get(task.tid, ())
        saved = criu_memory.choose(list(found), task.registers(), was_called=was_called)
        if saved is not None:
            task.set_registers(saved.registers)
            task.set_mask(saved.mask)
        return saved

    def _restore_mask(self, task: Tracee) -> None:
        masks = {each.mask for each in self._saved.get(task.tid, ())}
        if len(masks) == 1:
            task.set_mask(masks.pop())

    def _mend_code(self, pid: int, place: Area) -> bool:
        """Whether criu's code was there."""
        now = peek(pid, place.start, CODE_BYTES)
        if not (now.startswith(INJECTED) or now.endswith(FILE_NAME)):
            return False
        original = self._before.code.get((pid, place.start)) or in_file(pid, place)
        if original:
            with open(f"/proc/{pid}/mem", "r+b", 0) as memory:
                os.pwrite(memory.fileno(), original, place.start)
        return True


def clean(task: Tracee, inside: list[Area], mapped: list[Area]) -> None:
    """Nothing of criu is left in the process: neither memory nor descriptors."""
    fds = [fd for fd, name in descriptors(task.tid) if name.startswith(CRIU_FILE)]
    if not (fds or inside):
        return
    vdso = next((area for area in mapped if area.name == "[vdso]"), None)
    if vdso is None:
        return
    at = peek(task.tid, vdso.start, vdso.end - vdso.start).find(INJECTED[:2])
    if at < 0:
        return
    for fd in fds:
        task.call(vdso.start + at, CLOSE, fd)
    for area in inside:
        task.call(vdso.start + at, MUNMAP, area.start, area.end - area.start)


def go_on(patient: Patient) -> None:
    """Let the process go. SIGCONT is for the kernel: a handler of the process does not hear of it, but where criu had
    not come to seize every task.
    """
    group, tasks = patient
    if not group.was_stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(group.pid, signal.SIGCONT)
        for task in tasks.values() if holds_all(patient) else ():
            if told_mask(group.pid, b"ShdPnd:") >> (signal.SIGCONT - 1) & 1 == 0:
                break
            with contextlib.suppress(OSError, Lost):
                if not task.mask() >> (signal.SIGCONT - 1) & 1:
                    swallow(task, signal.SIGCONT)
    for task in tasks.values():
        task.detach()


def holds_all(patient: Patient) -> bool:
    """Whether no other task of the process can take a signal."""
    with contextlib.suppress(OSError):
        return {int(name) for name in os.listdir(f"/proc/{patient.group.pid}/task")} <= patient.tasks.keys()
    return False


def swallow(task: Tracee, unwanted: int) -> None:
    """Let it run until this signal would be delivered, which is pending."""
    number = 0
    while True:
        ptrace(PTRACE_CONT, task.tid, number)
        event, number = task.next_stop()
        if event:
            number = 0
        elif number == unwanted:
            return


def areas(pid: int) -> list[Area]:
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
        return [_area(line) for line in lines]


def _area(line: str) -> Area:
    words = line.rstrip("\n").split(maxsplit=5)
    start, end = (int(word, 16) for word in words[0].split("-"))
    return Area(start, end, words[1], int(words[2], 16), words[5] if len(words) > 5 else "")


def place_of_code(mapped: Iterable[Area]) -> Area | None:
    """Where criu puts its first system calls (criu/include/vma.h, get_exec_start): not into the kernel's own page."""
    mine = (each for each in mapped if each.rights[2] == "x" and each.end <= END_OF_MEMORY)
    return next((each for each in mine if each.end - each.start >= SMALLEST_AREA), None)


def peek(pid: int, address: int, size: int) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        return os.pread(memory.fileno(), size, address)


def in_file(pid: int, area: Area) -> bytes:
    """What is at the beginning of an area in the file of which it is; empty if it is of none."""
    if not area.name.startswith("/"):
        return b""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/map_files/{area.start:x}-{area.end:x}", "rb", 0) as file:
        return os.pread(file.fileno(), CODE_BYTES, area.offset)
    return b""


def descriptors(pid: int) -> list[tuple[int, str]]:
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append((int(name), os.readlink(f"/proc/{pid}/fd/{name}")))
    return found


def stat(pid: int) -> list[bytes]:
    """From its state on."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def stop_is_pending(pid: int) -> bool:
    return any(told_mask(pid, name) >> (signal.SIGSTOP - 1) & 1 for name in (b"ShdPnd:", b"SigPnd:"))


def told_mask(pid: int, name: bytes) -> int:
    return told_by_status(pid, name, base=16)
