"""Stands between phauld and criu: phauld's `--criu` names a copy of this file with a first line put before it.

It starts the real criu on a socket pair of its own and carries every message of `criu swrk` on, whole and in order.
Before it does, it tells the test of it and waits for a word. So a test can stop the world at any notification, and
neither phauld nor criu is changed. When criu ends, it ends in the same way, by the same signal.

criu opens the image directory through /proc of the process that made its socket pair, which is this one here: so the
descriptors that a request names are fetched from the process at the other end and get the same numbers here.
Our own descriptors are above them.

Beside this file lies criu.json: {"criu": the real one, "socket": where the test listens}. The standard library alone.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

ABOVE = 300
PR_SET_PDEATHSIG = 1
SYS_PIDFD_GETFD = 438
LARGEST_BYTES = 1 << 16
OPERATIONS = {1: "dump", 2: "restore", 3: "check", 4: "pre-dump", 9: "features", 10: "version", 11: "wait-pid"}
OPERATIONS |= {12: "page-server", 13: "pre-dump"}
NOTIFY = 6  # a type of request
RESPONSE_NOTIFY = 5  # a field of criu_resp
IMAGES_DIR_FD, WORK_DIR_FD = 1, 17  # fields of criu_opts


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a protobuf message; nested ones stay bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield key >> 3, message[at : at + size]
        at += size


class Test:
    """The test that listens; nobody may."""

    def __init__(self, path: str) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(path)
            self._socket: socket.socket | None = above(connection)
        except OSError:
            connection.close()
            self._socket = None

    def tell(self, **what: object) -> None:
        """Tell it of a step and wait for its word."""
        if self._socket is None:
            return
        try:
            self._socket.send(json.dumps(what).encode())
            self._socket.recv(1)
        except OSError:
            self._socket = None


def above(sock: socket.socket) -> socket.socket:
    """The same socket under a number that nobody else uses."""
    moved = socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, ABOVE))
    sock.close()
    return moved


def fetch_descriptors(request: bytes, pid: int) -> None:
    """The directories that a request names, from the process that made it."""
    options = next((value for number, value in fields(request) if number == 2), b"")
    for number, value in fields(options):
        if number in (IMAGES_DIR_FD, WORK_DIR_FD) and value < 1 << 31:
            pidfd = os.pidfd_open(pid)
            theirs = ctypes.CDLL(None, use_errno=True).syscall(SYS_PIDFD_GETFD, pidfd, value, 0)
            os.close(pidfd)
            if theirs >= 0 and theirs != value:
                os.dup2(theirs, value, inheritable=False)
                os.close(theirs)


def start(criu: str, inherited: list[int]) -> tuple[int, socket.socket]:
    """The real criu, and our end of its socket pair."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, theirs = above(pair[0]), above(pair[1])
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for descriptor in (*inherited, theirs.fileno()):
            os.set_inheritable(descriptor, True)
        os.execv(criu, [criu, "swrk", str(theirs.fileno())])
    theirs.close()
    return pid, ours


def carry(phauld: socket.socket, criu: socket.socket, test: Test, pid: int) -> None:
    """Carry messages to and fro until one side ends."""
    peer = struct.unpack("3i", phauld.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    operation = step = ""
    ended = os.pidfd_open(pid)  # what criu forks may hold its end of the socket pair open
    sources: list[Any] = [phauld, criu, ended]
    while True:
        readable, _, _ = select.select(sources, [], [])
        if phauld in readable:
            message = receive(phauld)
            if not message:
                test.tell(operation=operation, step="closed", pid=pid)
                return
            kind = next(value for number, value in fields(message) if number == 1)
            if kind == NOTIFY:
                success = any(number == 3 and value for number, value in fields(message))
                step = f"{step.partition(':')[0]}:{'answer' if success else 'refusal'}"
            else:
                operation, step = OPERATIONS.get(kind, str(kind)), "request"
                fetch_descriptors(message, peer)
            test.tell(operation=operation, step=step, pid=pid)
            criu.send(message)
        if criu in readable:
            message = receive(criu)
            if not message:
                return
            notify = next((value for number, value in fields(message) if number == RESPONSE_NOTIFY), None)
            script = dict(fields(notify)).get(1, b"").decode() if notify is not None else ""
            step = f"{script}:notify" if script else "response"
            test.tell(operation=operation, step=step, pid=pid)
            phauld.send(message)
        elif ended in readable:
            return


def receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(LARGEST_BYTES)
    except ConnectionError:
        return b""


def main() -> None:
    with open(os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "criu.json"), encoding="utf-8") as file:
        configuration = json.load(file)
    criu = configuration["criu"]
    if sys.argv[1:2] != ["swrk"]:
        os.execv(criu, [criu, *sys.argv[1:]])
    number = int(sys.argv[2])
    inherited = [int(name) for name in os.listdir("/proc/self/fd") if 2 < int(name) < ABOVE and int(name) != number]
    inherited = [descriptor for descriptor in inherited if os.path.exists(f"/proc/self/fd/{descriptor}")]
    phauld = above(socket.socket(fileno=number))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    pid, ours = start(criu, inherited)
    for descriptor in inherited:
        os.close(descriptor)
    with contextlib.suppress(ConnectionError):
        carry(phauld, ours, Test(configuration["socket"]), pid)
    ours.close()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
