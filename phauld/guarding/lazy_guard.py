"""Kills a tree whose `criu lazy-pages` dies before it could read a zero in place of a page that is missing.

    lazy_guard FD

FD is a socket: in comes "LAZY_PAGES_PID ROOT_PID", out goes "ok" or what is wrong. It ends with lazy-pages, or when the
socket is closed before anything came. The standard library alone.

The kernel answers a missing page with zeros as soon as nobody has the userfaultfd any more. A copy of it in another
process would exclude that, but criu closes that of each process that is complete and counts on the kernel to forget
it: with a copy about, criu is told of it for ever, and a task of which there is something to tell stands still. So
lazy-pages is traced: PTRACE_EVENT_EXIT comes, after SIGKILL as well, before the kernel closes anything.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable

from phauld.proc import descendants

PTRACE_CONT = 7
PTRACE_GETEVENTMSG = 0x4201
PTRACE_SEIZE = 0x4206
PTRACE_LISTEN = 0x4208
PTRACE_O_TRACEEXIT = 0x40
EVENT_EXIT = 6
EVENT_STOP = 128
ALL_CHILDREN = 0x40000000  # __WALL
LINE_BYTES = 128

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int, data: object = None, address: int | None = None) -> None:
    """Raises OSError."""
    if _libc.ptrace(request, pid, address, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace: {os.strerror(code)}")


def kill_tree(root: int, criu: str) -> None:
    """On return no task below it runs again. First all are stopped, so that none is born meanwhile.

    A `criu restore` that still has them in its hands would wait for ever: for an init whose children only it can reap,
    or, before it has seized any, for an answer of theirs (criu/cr-restore.c: SIGCHLD is ignored after `post-restore`).
    """
    holders = {parent(root)}
    stopped: set[int] = set()
    while new := set(descendants([root])) - stopped:
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        stopped |= new
    holders |= set(map(tracer, stopped))
    for pid in stopped | {pid for pid in holders if program(pid) == criu}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def tracer(pid: int) -> int:
    """Who traces it; 0: nobody."""
    return told_by_status(pid, b"TracerPid:")


def parent(pid: int) -> int:
    """0: it is gone."""
    return told_by_status(pid, b"PPid:")


def told_by_status(pid: int, name: bytes, base: int = 10) -> int:
    """A number of /proc/PID/status; 0: the process is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/status", "rb") as file:
        return next((int(line.split()[1], base) for line in file if line.startswith(name)), 0)
    return 0


def program(pid: int) -> str:
    """The file that it runs; "" if it has ended."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/exe")
    return ""


def watch(lazy_pages: int, root: int) -> None:
    """Until it has ended."""
    criu = program(lazy_pages)
    see_to_its_end(lazy_pages, lambda: kill_tree(root, criu))


def see_to_its_end(pid: int, act: Callable[[], None], on_signal: Callable[[int], None] = lambda _: None) -> None:
    """Until a traced process has ended; if not well, `act` in its last moment, when the kernel has closed nothing.

    `on_signal` is called before a signal is delivered to it.
    """
    while True:
        _, status = os.waitpid(pid, ALL_CHILDREN)
        if not os.WIFSTOPPED(status):
            return
        event, number = status >> 16, os.WSTOPSIG(status)
        if event == EVENT_EXIT:
            message = ctypes.c_ulong()
            ptrace(PTRACE_GETEVENTMSG, pid, ctypes.byref(message))
            if message.value != 0:
                act()
        if event == 0:
            on_signal(number)
        if event == EVENT_STOP and number != signal.SIGTRAP:  # a stop of its group lasts
            ptrace(PTRACE_LISTEN, pid)
        else:
            ptrace(PTRACE_CONT, pid, None if event else number)


def begin(lazy_pages: int, root: int) -> Callable[[], None]:
    """Raises OSError."""
    ptrace(PTRACE_SEIZE, lazy_pages, PTRACE_O_TRACEEXIT)
    return lambda: watch(lazy_pages, root)


def obey(begin: Callable[..., Callable[[], None]]) -> None:
    """What comes in on the socket begins the watch, and "ok" or what is wrong goes out before it."""
    told = socket.socket(fileno=int(sys.argv[2]))
    pids = [int(word) for word in told.recv(LINE_BYTES).split()]
    if not pids:
        return
    try:
        until_its_end = begin(*pids)
    except OSError as exc:
        told.sendall(str(exc).encode())
        return
    told.sendall(b"ok")
    told.close()
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # killed in the middle of a stop
        until_its_end()


def main() -> None:
    obey(begin)
