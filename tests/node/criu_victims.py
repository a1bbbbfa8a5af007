"""Processes to dump and restore, and directories to do it with."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

PR_SET_CHILD_SUBREAPER: Final = 36

#: Beats: counts up in a file, touches one page of its memory at each beat, and ends if the page is not what it was.
SCRIPT: Final = """
import os, signal, sys, time, socket, fcntl
path, mebibytes, workers, obstacle = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if os.getsid(0) != os.getpid():
    os.setsid()
pages = mebibytes * 256
memory = bytearray(pages * 4096)
for page in range(pages):
    memory[page * 4096] = page % 251 + 1
for worker in range(workers):
    if os.fork() == 0:
        path += f".{worker}"
        break
fd = os.open(path, os.O_RDWR | os.O_CREAT)
if obstacle.startswith("tcp"):
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted = None if obstacle == "tcp-in-flight" else server.accept()
if obstacle == "lock":
    fcntl.flock(fd, fcntl.LOCK_EX)
if obstacle == "ghost":
    ghost = open(path + ".ghost", "wb")
    ghost.write(bytes(3 << 20))
    ghost.flush()
    os.unlink(path + ".ghost")
count = 0
while True:
    count += 1
    page = count % pages
    if memory[page * 4096] != page % 251 + 1:
        os._exit(1)
    os.pwrite(fd, count.to_bytes(8, "little"), 0)
    time.sleep(0.002)
"""


class Victim:
    """A tree that beats. `pid` is its root, also after it was restored."""

    def __init__(self, popen: subprocess.Popen[bytes], pid: int, beats_file: Path) -> None:
        self.popen = popen
        self.pid = pid
        self.beats_file = beats_file
        self._restored: list[int] = []

    def beats(self, worker: int | None = None) -> int:
        """How often it has beaten."""
        path = self.beats_file if worker is None else Path(f"{self.beats_file}.{worker}")
        try:
            return int.from_bytes(path.read_bytes(), "little")
        except FileNotFoundError:
            return 0

    def is_beating(self, worker: int | None = None) -> bool:
        """Whether it beats on."""
        before, deadline = self.beats(worker), time.monotonic() + 20
        while time.monotonic() < deadline:
            if self.beats(worker) > before:
                return True
            time.sleep(0.002)
        return False

    def is_silent(self) -> bool:
        """Whether it does not beat for a tenth of a second."""
        before = self.beats()
        time.sleep(0.1)
        return self.beats() == before

    def reaped(self) -> None:
        """Wait until the original tree is gone, and make its PIDs free again."""
        self.popen.wait(timeout=30)
        for pid in children():
            if not alive(pid):
                os.waitpid(pid, 0)

    def restored_as(self, pid: int) -> None:
        """The tree lives again; it is our child now, for we are a subreaper."""
        self.pid = pid
        self._restored.append(pid)

    def kill(self) -> None:
        """End what there is of it."""
        for pid in (self.pid, self.popen.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()
        for pid in self._restored:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


@contextmanager
def subreaper() -> Iterator[None]:
    """Restored trees become children of this process instead of init's."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def start_victim(
    directory: Path, *, mebibytes: int = 4, workers: int = 0, own_pid_namespace: bool = True, obstacle: str = ""
) -> Victim:
    """Start a victim and wait until it beats. In a PID namespace of its own its root is the namespace's init."""
    beats_file = directory / "beats"
    argv = [sys.executable, "-I", "-S", "-c", SCRIPT, str(beats_file), str(mebibytes), str(workers), obstacle]
    if own_pid_namespace:
        argv = ["unshare", "--pid", "--fork", *argv]
    null = subprocess.DEVNULL
    popen = subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True)
    victim = Victim(popen, popen.pid, beats_file)
    deadline = time.monotonic() + 30
    while not all(victim.is_beating(worker) for worker in (None, *range(workers))):
        assert time.monotonic() < deadline, "the victim does not beat"
        assert popen.poll() is None, f"the victim ended with {popen.returncode}"
    if own_pid_namespace:
        victim.pid = int(Path(f"/proc/{popen.pid}/task/{popen.pid}/children").read_text())
    return victim


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """A descriptor of a directory, which is made if it does not exist."""
    directory.mkdir(exist_ok=True)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def alive(pid: int) -> bool:
    """Whether a process exists that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children() -> list[int]:
    """The PIDs of our children."""
    listings = Path("/proc/self/task").glob("*/children")
    return [int(word) for listing in listings for word in listing.read_text().split()]


@contextmanager
def no_leaks() -> Iterator[None]:
    """Afterwards there are no more descriptors and no more living children than before."""
    descriptors, processes = os.listdir("/proc/self/fd"), set(children())
    yield
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and any(alive(pid) for pid in set(children()) - processes):
        time.sleep(0.01)  # orphans of a killed criu may take a moment to die
    left = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in set(children()) - processes if alive(pid)}
    assert not left, f"processes are left: {left}"
    while set(children()) - processes:  # orphans that we inherited as a subreaper
        for pid in set(children()) - processes:
            os.waitpid(pid, 0)
    assert not set(os.listdir("/proc/self/fd")) - set(descriptors)  # gRPC closes some of its own later than a test ends


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection over the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return client, server.accept()[0]
