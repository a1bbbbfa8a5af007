"""Mends a tree if the criu that dumps it is killed.

    dump_guard FD

criu changes the registers of each task (see `cure.py`), and puts TCP connections under repair: from the dump of a
connection on, and until criu lets go of the tree, who reads or writes is refused, and most programs end at such an
error. A criu that is killed (for want of memory, by hand) would let the tree run on like that. So criu is traced:
PTRACE_EVENT_EXIT comes, after SIGKILL as well, before the kernel lets go of what criu itself traces.

FD is a socket of messages. In comes "CRIU_PID ROOT_PID", before criu touches the tree; out goes "ok" or what is wrong.
Then "frozen": criu holds every task, and has changed none; later "whole": it has changed them back. Both are answered
with "ok", but if criu has ended. From the answer to "whole" on the tree is not touched, whatever becomes of criu:
others may stop it, and have to find it stopped. Out goes "end" when criu is gone (which "over" says as well) and what
is to be done then is done; "bye" comes back, and the next watch may begin. It ends when the socket is closed and no
criu is watched. Of a pre-dump nothing is told in between, and its tree stays on its processors. The standard library
alone.
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
OF_THIS_MACHINE = "x86_64"
LOOK_SECONDS = 0.001


def wait_until_it_has_begun(pid: int) -> None:
    """A process that was just started may still be a part of its parent: with Python 3.13 often for milliseconds."""
    while (words := command(pid)) and words == command(parent(pid)):
        time.sleep(LOOK_SECONDS)


def command(pid: int) -> bytes:
    """Empty if it is gone, or about to begin."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()
    return b""


def seize(criu: int) -> None:
    """Raises OSError. Each stop of a task is a SIGCHLD for criu, which would stop for us at each: it waits without."""
    ptrace(PTRACE_SEIZE, criu, PTRACE_O_TRACEEXIT)
    ptrace(PTRACE_INTERRUPT, criu)
    while True:
        _, status = os.waitpid(criu, ALL_CHILDREN)
        if not os.WIFSTOPPED(status):
            raise ProcessLookupError(criu)
        if status >> 16 == EVENT_STOP:
            break
        ptrace(PTRACE_CONT, criu, os.WSTOPSIG(status))
    mask = ctypes.c_uint64()
    ptrace(PTRACE_GETSIGMASK, criu, ctypes.byref(mask), MASK_BYTES)
    mask.value |= 1 << (signal.SIGCHLD - 1)
    ptrace(PTRACE_SETSIGMASK, criu, ctypes.byref(mask), MASK_BYTES)
    ptrace(PTRACE_CONT, criu)


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

    def __init__(self, criu: int, root: int) -> None:
        """Raises OSError."""
        self._root = root
        self._before = look(root)
        self._criu = 0  # nobody yet
        self._is_asked = False  # who it is
        self._found: SimpleQueue[int] = SimpleQueue()  # who holds the tree; 0: nobody
        self._seized: SimpleQueue[bytes] = SimpleQueue()  # what is wrong with that
        self._cure: Cure | None = None
        self._processor = OneProcessor()
        self._is_ending = False
        self._lock = _thread.allocate_lock()
        wait_until_it_has_begun(criu)
        if os.path.basename(program(criu)).startswith("criu"):
            self._seize(criu)

    def until_its_end(self) -> None:
        if self._criu == 0 and not self._has_found():
            return
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # killed in the middle of a stop
            see_to_its_end(self._criu, self._it_ends_badly)
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
                    self._processor.enter(self._criu, descendants([self._root]))
                case b"whole":
                    self._cure = None
                    self._leave_processor()
            return b"ok"

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
        seize(criu)
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


def see_through(told: socket.socket, criu: int, root: int) -> None:
    """Raises OSError if criu cannot be watched."""
    watch, is_over = Watch(criu, root), _thread.allocate_lock()
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
            see_through(told, *map(int, words))
        except OSError as exc:
            told.send(str(exc).encode())
