"""Holds a tree back for a share of time with the freezer of cgroup v2. A process of its own, run as a script.

    python -I -S throttler.py CHILD PID    hold back the tree below PID
    python -I -S throttler.py CHILD        undo what another throttler left, if it was killed

CHILD is the path of a cgroup to make, below the one in which every process of the tree is. The tree is moved into it,
and it is frozen for part of every period. Standard input is a socket: "ready" is written to it when the tree is there,
percentages are read from it, one a line. At end of file (the migration goes on to its last dump, or phauld has died)
the tree is thawed and moved back, and the child cgroup is removed: then the exit status is 0.

The invariant: no task stays frozen, whatever happens to phauld; and no task is frozen while criu holds the tree.

Like the shim it has the standard library alone, so that it starts in milliseconds.
"""

import contextlib
import errno
import os
import select
import signal
import sys
import time

PERIOD_SECONDS = 0.1
#: How late a tree that criu has taken is thawed, at most.
POLL_SECONDS = 0.002
RELEASE_SECONDS = 10.0
IDLE_SECONDS = 60.0
MAX_PERCENT = 99


def descendants(root: int) -> list[int]:
    """The PIDs of a tree as it stands now."""
    found, pending = [], [root]
    while pending:
        pid = pending.pop()
        found.append(pid)
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                    pending += [int(child) for child in file.read().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def members(cgroup: str) -> list[int]:
    """The PIDs in a cgroup."""
    with open(os.path.join(cgroup, "cgroup.procs"), "rb") as file:
        return [int(pid) for pid in file.read().split()]


def move(pids: list[int], cgroup: str) -> None:
    """Move processes; one that has ended is none to move."""
    for pid in pids:
        try:
            with open(os.path.join(cgroup, "cgroup.procs"), "wb", buffering=0) as file:
                file.write(str(pid).encode())
        except ProcessLookupError:
            continue


def gather(root: int, child: str) -> None:
    """Move the tree into its cgroup, until no process of it was forked elsewhere meanwhile."""
    while outside := sorted(set(descendants(root)) - set(members(child))):
        move(outside, child)
        if not os.path.exists(f"/proc/{root}"):
            return


def release(child: str) -> None:
    """Thaw, move everything back, remove the child cgroup. Raises OSError if it cannot be removed for long."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while os.path.isdir(child):
        set_frozen(child, False)
        move(members(child), os.path.dirname(child))
        try:
            os.rmdir(child)
        except OSError as exc:
            if exc.errno != errno.EBUSY or time.monotonic() > deadline:  # busy: somebody forked, or is dying
                raise
            time.sleep(POLL_SECONDS)


def set_frozen(child: str, frozen: bool) -> None:
    with open(os.path.join(child, "cgroup.freeze"), "wb", buffering=0) as file:
        file.write(b"1" if frozen else b"0")


def is_traced(root: int) -> bool:
    """Whether criu (or another tracer) holds the tree: it takes the root first."""
    try:
        with open(f"/proc/{root}/status", "rb") as file:
            for line in file:
                if line.startswith(b"TracerPid:"):
                    return line.split()[1] != b"0"
    except (FileNotFoundError, ProcessLookupError):
        pass
    return False


class Orders:
    """The percentages that arrive on a descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._partial = b""
        self.percent = 0
        self.ended = False

    def wait(self, seconds: float) -> bool:
        """Wait for an order, no longer than that; whether there was one."""
        if not select.select([self._fd], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self._fd, 4096)
        except ConnectionResetError:
            data = b""
        self.ended = not data
        *lines, self._partial = (self._partial + data).split(b"\n")
        if lines:
            self.percent = max(0, min(MAX_PERCENT, int(lines[-1])))
        return True


def hold_back(root: int, child: str, orders: Orders) -> None:
    """Freeze and thaw in turn, until the orders end."""
    while not orders.ended:
        frozen_seconds = PERIOD_SECONDS * orders.percent / 100
        if frozen_seconds == 0:
            orders.wait(IDLE_SECONDS)
            continue
        hold_for(root, child, orders, frozen_seconds)
        if not orders.ended:
            orders.wait(PERIOD_SECONDS - frozen_seconds)


def hold_for(root: int, child: str, orders: Orders, seconds: float) -> None:
    """Freeze the tree for this long, or until an order comes or criu wants the tree."""
    until = time.monotonic() + seconds
    if is_traced(root):
        orders.wait(seconds)
        return
    set_frozen(child, True)
    try:
        while (left := until - time.monotonic()) > 0 and not is_traced(root):
            if orders.wait(min(left, POLL_SECONDS)):
                return
    finally:
        set_frozen(child, False)


def main() -> None:
    child = sys.argv[1]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a service manager may send them to all of phauld: end of file follows
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)  # a thaw that comes late is a longer pause
    try:
        if len(sys.argv) > 2:
            root = int(sys.argv[2])
            os.makedirs(child, exist_ok=True)
            gather(root, child)
            os.write(0, b"ready\n")
            hold_back(root, child, Orders(0))
    finally:
        release(child)


if __name__ == "__main__":
    main()
