"""Mends a tree if the criu that dumps it is killed.

    dump_guard FD RECORD

criu changes the registers of each task (see `cure.py`), and puts TCP connections under repair: from the dump of a
connection on, and until criu lets go of the tree, who reads or writes is refused, and most programs end at such an
error. A criu that is killed (for want of memory, by hand) would let the tree run on like that. So criu is traced:
PTRACE_EVENT_EXIT comes, after SIGKILL as well, before the kernel lets go of what criu itself traces.

FD is a socket of messages. In comes "CRIU_PID ROOT_PID 1", before criu touches the tree; out goes "ok" or what is
wrong. Then "frozen": criu holds every task, and has changed none; later "whole": it has changed them back. Both are
answered with "ok", but if criu has ended. From the answer to "whole" on the tree is not touched, whatever becomes of
criu: others may stop it, and have to find it stopped. Out goes "end" when criu is gone (which "over" says as well) and
what is to be done then is done; "bye" comes back, and the next watch may begin. It ends when the socket is closed and
no criu is watched. Of a pre-dump nothing is told in between ("CRIU_PID ROOT_PID 0"): that criu has begun to hold the
tree is seen by its first SIGCHLD. RECORD is a file, see `one_processor.py`. The standard library alone.
"""

import _thread
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from _queue import SimpleQueue
from collections.abc import Iterator

from phaul_criu.foreign_sockets import copy_of
from phauld.guarding.cure import Cure, look
from phauld.guarding.lazy_guard import (
    ALL_CHILDREN,
    EVENT_STOP,
    LINE_BYTES,
    PTRACE_CONT,
    PTRACE_O_TRACEEXIT,
    PTRACE_SEIZE,
    parent,
    program,
    ptrace,
    see_to_its_end,
    tracer,
)
from phauld.guarding.one_processor import OneProcessor
from phauld.guarding.tracee import MASK_BYTES, PTRACE_GETSIGMASK, PTRACE_INTERRUPT, PTRACE_SETSIGMASK
from phauld.proc import descendants

TCP_REPAIR = 19
REPAIR_ENDS = 0
AHEAD = 2  # of criu's priority
ANSWER_BYTES = 200
OF_THIS_MACHINE = "x86_64"
LOOK_SECONDS = 0.001
LOOK_SHARE = 1 / 8  # of the time for which criu has held the tree


def wait_until_it_has_begun(pid: int) -> None:
    """A process that was just started may still be a part of its parent: with Python 3.13 often for milliseconds."""
    while (words := command(pid)) and words == command(parent(pid)):
        time.sleep(LOOK_SECONDS)


def command(pid: int) -> bytes:
    """Empty if it is gone, or about to begin."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()
    return b""


def seize(criu: int, *, is_told: bool) -> None:
    """Raises OSError. Each stop of a task is a SIGCHLD for criu, which would stop for us at each: it waits without.

    But the first one, if nothing else tells when criu freezes the tree.
    """
    ptrace(PTRACE_SEIZE, criu, PTRACE_O_TRACEEXIT)
    ptrace(PTRACE_INTERRUPT, criu)
    while True:
        _, status = os.waitpid(criu, ALL_CHILDREN)
        if not os.WIFSTOPPED(status):
            raise ProcessLookupError(criu)
        if status >> 16 == EVENT_STOP:
            break
        ptrace(PTRACE_CONT, criu, os.WSTOPSIG(status))
    if is_told:
        block_children(criu)
    ptrace(PTRACE_CONT, criu)


def block_children(criu: int) -> None:
    """Raises OSError."""
    mask = ctypes.c_uint64()
    ptrace(PTRACE_GETSIGMASK, criu, ctypes.byref(mask), MASK_BYTES)
    mask.value |= 1 << (signal.SIGCHLD - 1)
    ptrace(PTRACE_SETSIGMASK, criu, ctypes.byref(mask), MASK_BYTES)


def end_repair(root: int) -> None:
    """Of every connection of the tree. SO_REUSEADDR, which the kernel takes with it, is given as servers have it."""
    for pid in descendants([root]):
        for sock in sockets(pid):
            with sock, contextlib.suppress(OSError):  # not of TCP
                if sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR):
                    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_ENDS)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def sockets(pid: int) -> Iterator[socket.socket]:
    """Those of a process, each to be closed."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    is_socket = os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
                    if is_socket and (copy := copy_of(pidfd, int(name))) is not None:
                        yield copy
        finally:
            os.close(pidfd)


class Watch:
    """Of one criu and the tree below `root`.

    What is said to be criu may be a program that starts it: then criu is whoever holds the tree once that is frozen.
    """

    def __init__(self, criu: int, root: int, record: str, *, is_told: bool) -> None:
        """Raises OSError."""
        self._root = root
        self._is_told = is_told
        self._before = look(root)
        self._criu = 0  # nobody yet
        self._is_asked = False  # who it is
        self._found: SimpleQueue[int] = SimpleQueue()  # who holds the tree; 0: nobody
        self._seized: SimpleQueue[bytes] = SimpleQueue()  # what is wrong with that
        self._cure: Cure | None = None
        self._processor = OneProcessor(record)
        self._has_frozen = False  # as far as nobody tells
        self._usual_policy = os.SCHED_OTHER  # of criu
        self._is_ending = False
        self._lock = _thread.allocate_lock()
        wait_until_it_has_begun(criu)
        if os.path.basename(program(criu)).startswith("criu"):
            self._seize(criu)

    def until_its_end(self) -> None:
        if self._criu == 0 and not self._has_found():
            return
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # killed in the middle of a stop
            see_to_its_end(self._criu, self._it_ends_badly, self._on_signal)
        with self._lock:
            self._is_ending = True
            if self._cure is not None:
                self._cure.perform()
            self._leave_processor()

    def note(self, word: bytes) -> bytes:
        """What to answer; empty: nothing."""
        if self._criu == 0 and not self._is_asked and word in (b"frozen", b"over"):
            self._is_asked = True
            self._found.put(tracer(self._root) if word == b"frozen" else 0)
            wrong = self._seized.get()
            if word == b"over" or self._criu == 0:
                return wrong
        with self._lock:
            if word == b"over" or self._is_ending:
                return b""
            match word:
                case b"frozen":
                    self._enter_processor()
                case b"whole":
                    self._cure = None
                    self._leave_processor()
            return b"ok"

    def _on_signal(self, number: int) -> None:
        if self._is_told or self._has_frozen or number != signal.SIGCHLD or tracer(self._root) != self._criu:
            return
        self._has_frozen = True
        with self._lock, contextlib.suppress(OSError):
            block_children(self._criu)
            self._usual_policy = os.sched_getscheduler(self._criu)
            os.sched_setscheduler(self._criu, os.SCHED_RR, os.sched_param(1))
            self._enter_processor()
            _thread.start_new_thread(self._until_it_lets_go, ())

    def _until_it_lets_go(self) -> None:
        """A thread: nobody tells when criu lets go of the tree, and goes on by itself. Who looks takes of its time."""
        with contextlib.suppress(OSError):  # before criu, which keeps the processor while it writes pages
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(AHEAD))
        began = time.monotonic()
        while not self._is_ending and tracer(self._root) == self._criu:
            time.sleep(max(LOOK_SECONDS, (time.monotonic() - began) * LOOK_SHARE))
        with self._lock, contextlib.suppress(OSError):
            if not self._is_ending:
                self._leave_processor()
                os.sched_setscheduler(self._criu, self._usual_policy, os.sched_param(0))

    def _enter_processor(self) -> None:
        self._processor.enter(self._criu, descendants([self._root]), self._before.started)

    def _leave_processor(self) -> None:
        self._processor.leave(descendants([self._root]))

    def _has_found(self) -> bool:
        wrong = b""
        if criu := self._found.get():
            try:
                self._seize(criu)
            except OSError as exc:
                wrong = str(exc).encode()
        self._seized.put(wrong)
        return self._criu != 0

    def _seize(self, criu: int) -> None:
        """Raises OSError."""
        seize(criu, is_told=self._is_told)
        self._criu = criu
        self._cure = Cure(criu, self._root, self._before) if os.uname().machine == OF_THIS_MACHINE else None

    def _it_ends_badly(self) -> None:
        with self._lock:
            self._is_ending = True
            if self._cure is not None:
                self._cure.prepare()
        end_repair(self._root)


def hear(told: socket.socket, watch: Watch, is_over: _thread.LockType) -> None:
    """A thread."""
    with contextlib.suppress(OSError):
        while (word := told.recv(LINE_BYTES)) not in (b"", b"bye"):
            if answer := watch.note(word):
                told.send(answer)
    watch.note(b"over")
    is_over.release()


def see_through(told: socket.socket, record: str, criu: int, root: int, is_told: int) -> None:
    """Raises OSError if criu cannot be watched."""
    watch, is_over = Watch(criu, root, record, is_told=bool(is_told)), _thread.allocate_lock()
    told.send(b"ok")
    is_over.acquire()
    _thread.start_new_thread(hear, (told, watch, is_over))
    watch.until_its_end()
    with contextlib.suppress(OSError):  # phauld is gone
        told.send(b"end")
    is_over.acquire()


def main() -> None:
    told = socket.socket(fileno=int(sys.argv[2]))
    while words := told.recv(LINE_BYTES).split():
        try:
            see_through(told, sys.argv[3], *map(int, words))
        except Exception as exc:  # nobody is watched, but the next one may be
            told.send(repr(exc).encode()[:ANSWER_BYTES])
