"""A tree of processes that keeps asking itself whether everything still works.

    tree.py BEATS_FILE [PROCESSES [own]]

Until SIGTERM; the file's last line says how far, the longest gap in ms, and PASS or why not. 50 if not said otherwise.
Each has all the ends that it was forked with, 88 of them for 50; `own`: only those that it uses.

A token goes round through all of them: by pipes, unix stream pairs, unix datagram pairs and eventfds in turn. Every
process waits for it with epoll, has a timerfd that ticks, a watch of inotify on a file that the first one writes, a
counter in shared memory of all, a deleted file of its own, and a lock that nobody else may have.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import time

PROCESSES = int(sys.argv[2]) if len(sys.argv) > 2 else 50
TICK_NS = 50_000_000
LOOK_SECONDS = 0.25
PATIENCE_SECONDS = 10
libc = ctypes.CDLL(None, use_errno=True)
stopped: list[int] = []


def eventfd_pair() -> tuple[int, int]:
    descriptor = libc.eventfd(0, os.O_NONBLOCK)
    return descriptor, descriptor


def socket_pair(kind: int) -> tuple[int, int]:
    left, right = socket.socketpair(socket.AF_UNIX, kind)
    return left.detach(), right.detach()


def links() -> list[tuple[int, int]]:
    """How the token comes to each."""
    made = []
    for number in range(PROCESSES):
        make = (
            os.pipe,
            lambda: socket_pair(socket.SOCK_STREAM),
            lambda: socket_pair(socket.SOCK_DGRAM),
            eventfd_pair,
        )[number % 4]
        made.append(make())
    return made


def note(beats: str, line: str) -> None:
    """Not kept open: preflight compares the sizes of open files, and both nodes see this one grow."""
    with open(beats, "a") as file:
        print(line, file=file)


class Timer:
    """A timerfd that ticks."""

    def __init__(self) -> None:
        self.fd = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        every = struct.pack("qqqq", 0, TICK_NS, 0, TICK_NS)
        assert libc.timerfd_settime(self.fd, 0, every, None) == 0


def keep_own(number: int, ends: list[tuple[int, int]]) -> None:
    """Only with `own`."""
    used = {ends[number][0], ends[(number + 1) % PROCESSES][1]}
    if sys.argv[3:] == ["own"]:
        for descriptor in {each for pair in ends for each in pair} - used:
            os.close(descriptor)


def member(number: int, ends: list[tuple[int, int]], shared: mmap.mmap, directory: str) -> None:
    """One process; it fails by an exception, which ends the token's round."""
    here, there = ends[number][0], ends[(number + 1) % PROCESSES][1]
    keep_own(number, ends)
    timer = Timer()
    notify = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(notify, directory.encode() + b"/watched", 2) >= 0  # IN_MODIFY
    lock = os.open(f"{directory}/lock-{number}", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    ghost = os.open(f"{directory}/ghost-{number}", os.O_RDWR | os.O_CREAT, 0o600)
    os.unlink(f"{directory}/ghost-{number}")
    os.pwrite(ghost, b"%08d" % number * 1000, 0)
    poll = select.epoll()
    for descriptor in (here, timer.fd, notify):
        poll.register(descriptor, select.EPOLLIN)
    while True:
        for descriptor, _ in poll.poll(10):
            data = os.read(descriptor, 8 if descriptor != notify else 4096)
            slot = {here: 0, timer.fd: 1, notify: 2}[descriptor]
            position = (number * 4 + slot) * 8
            value = struct.unpack_from("q", shared, position)[0]
            struct.pack_into("q", shared, position, value + 1)
            if descriptor == here:
                assert data == struct.pack("Q", 1), data
                assert os.pread(ghost, 8, 7992) == b"%08d" % number
                os.write(there, data)


def holds_locks(directory: str) -> bool:
    """Whether every lock is held by its process: none can be had from here."""
    for number in range(1, PROCESSES):
        descriptor = os.open(f"{directory}/lock-{number}", os.O_RDWR)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except OSError:
            pass
        finally:
            os.close(descriptor)
    return True


def counts(shared: mmap.mmap) -> list[tuple[int, int, int]]:
    """Tokens, ticks and touches of each process but the first."""
    return [struct.unpack_from("qqq", shared, number * 32) for number in range(1, PROCESSES)]


def stands_still(shared: mmap.mmap, before: list[tuple[int, int, int]], watched: str) -> str:
    """Which timer does not tick or which watch sees nothing, now that it has all the time that it can want.

    Something may have been due when it was moved: that alone is no sign of life.
    """
    deadline = time.time() + PATIENCE_SECONDS
    while True:
        with open(watched, "a") as file:
            file.write("x")
        time.sleep(0.1)
        now = counts(shared)
        dead = [
            what
            for index, what in ((1, "timer"), (2, "watch"))
            if any(new[index] <= old[index] for new, old in zip(now, before, strict=True))
        ]
        if not dead or time.time() > deadline:
            return f"a {dead[0]} stands still" if dead else ""


def first(ends: list[tuple[int, int]], shared: mmap.mmap, directory: str, beats: str) -> str:
    """Send the token round and look at what the others count; what was wrong in the end."""
    here, there = ends[0][0], ends[1][1]
    longest, last, rounds, shown = 0.0, time.time(), 0, 0.0
    before = counts(shared)  # since the tree was moved
    while not stopped:
        os.write(there, struct.pack("Q", 1))
        if not select.select([here], [], [], PATIENCE_SECONDS)[0]:
            numbers = [number for number, count in enumerate(counts(shared), 1) if count[0] <= rounds]
            return f"the token was lost in round {rounds} before {numbers[:1]}"
        os.read(here, 8)
        rounds += 1
        now = time.time()
        gap, last = now - last, now
        longest = max(longest, gap * 1000)
        if gap > LOOK_SECONDS:
            before = counts(shared)
        if now > shown + LOOK_SECONDS:
            if any(count[0] != rounds for count in counts(shared)):
                return "a process has missed the token"
            if not holds_locks(directory):
                return "a lock is lost"
            last = shown = time.time()
            note(beats, f"{rounds} {longest:.1f} RUNS")
    if wrong := stands_still(shared, before, f"{directory}/watched"):
        return wrong
    note(beats, f"{rounds} {longest:.1f} PASS")
    return ""


def main() -> int:
    beats = sys.argv[1]
    directory = tempfile.mkdtemp(dir=os.path.dirname(beats))
    with open(f"{directory}/watched", "w"):
        pass
    shared = mmap.mmap(-1, 1 << 16)
    ends = links()
    children = []
    for number in range(1, PROCESSES):
        if (pid := os.fork()) == 0:
            try:
                member(number, ends, shared, directory)
            finally:
                os._exit(1)
        children.append(pid)
    keep_own(0, ends)
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    wrong = first(ends, shared, directory, beats)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if wrong:
        note(beats, f"0 0 {wrong}")
    return 1 if wrong else 0


sys.exit(main())
