"""Ends the repair of a tree's TCP connections if the criu that dumps the tree is killed.

    repair_guard FD

From the dump of a connection on, and until criu lets go of the tree, the kernel has it under repair (TCP_REPAIR): who
reads or writes is refused. A criu that is killed (for want of memory, by hand) lets the tree run on like that, and most
programs end at such an error. So criu is traced: PTRACE_EVENT_EXIT comes, after SIGKILL as well, before the kernel lets
go of what criu itself traces, so the tree still stands while the repair is ended here.

FD is a socket: in comes "ROOT_PID" of a tree that a criu holds, out goes "ok" or what is wrong. It ends with criu, or
when the socket is closed before anything came. The standard library alone.
"""

import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Callable, Iterator

from phaul_criu.foreign_sockets import copy_of
from phauld.lazy_guard import (
    ALL_CHILDREN,
    EVENT_STOP,
    PTRACE_CONT,
    PTRACE_O_TRACEEXIT,
    PTRACE_SEIZE,
    obey,
    ptrace,
    see_to_its_end,
    tracer,
)
from phauld.proc import descendants

PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
MASK_BYTES = 8
TCP_REPAIR = 19
REPAIR_ENDS = 0


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


def begin(root: int) -> Callable[[], None]:
    """Raises OSError."""
    criu = tracer(root)
    if not criu:
        raise ProcessLookupError("no criu holds the tree")
    seize(criu)
    return lambda: see_to_its_end(criu, lambda: end_repair(root))


def main() -> None:
    obey(begin)
