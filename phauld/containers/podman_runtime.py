"""Stands in for an OCI runtime while podman writes down or takes in a container that phaul moves.

podman calls its runtime by the path that its configuration names. While phaul has podman make the archive of a
container (`checkpoint`) or take it in (`restore`), that path is a script of phaul's which runs this; any other command
is the real runtime's. It is run with the standard library alone:
``python -I -S podman_runtime.py DIRECTORY RUNTIME ARGUMENT…``.

`checkpoint` does nothing but what podman looks for. `restore` leaves a process to podman's monitor that stands for the
container: it hands the monitor's pipes to phauld over DIRECTORY/socket, waits for the end of the shim that phauld names
in return, and ends as the shim says that the tree did. The invariant: it runs nothing of the container, so podman may
start it before phaul commits; a phauld that is killed before it names a shim ends it.
"""

import array
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time

WAIT_SECONDS = 5.0
LOOK_SECONDS = 0.05
LOST = 137


def option(arguments: list[str], name: str) -> str:
    """The value of a flag, which podman gives as a word of its own."""
    return arguments[arguments.index(name) + 1]


def checkpoint(arguments: list[str]) -> None:
    """Leave what podman takes for the images and the log of a checkpoint."""
    images, work = option(arguments, "--image-path"), option(arguments, "--work-path")
    os.makedirs(images, mode=0o700, exist_ok=True)
    for path in (f"{images}/inventory.img", f"{work}/dump.log", f"{work}/stats-dump"):
        with open(path, "w", encoding="ascii"):
            pass


def start_ticks(pid: int) -> int:
    """See proc.py."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def find_shim(directory_fd: int) -> int:
    """A pidfd of the shim whose directory this is. Raises OSError if it has ended, or does not begin."""
    until = time.monotonic() + WAIT_SECONDS
    while "shim.json" not in os.listdir(directory_fd) and time.monotonic() < until:
        time.sleep(0.005)
    with open(os.open("shim.json", os.O_RDONLY, dir_fd=directory_fd), encoding="utf-8") as file:
        known = json.load(file)
    pidfd = os.pidfd_open(known["pid"])
    if start_ticks(known["pid"]) != known["start_ticks"]:
        raise ProcessLookupError
    return pidfd


def enter(directory_fd: int) -> None:
    """Join what the tree lives in: podman looks at the container through the process that stands for it."""
    try:
        with open(os.open("tree.json", os.O_RDONLY, dir_fd=directory_fd), encoding="utf-8") as file:
            known = json.load(file)
        kinds = ("cgroup", "ipc", "uts", "net", "mnt")
        descriptors = [os.open(f"/proc/{known['pid']}/ns/{kind}", os.O_RDONLY) for kind in kinds]
        if start_ticks(known["pid"]) != known["start_ticks"]:
            return
        for descriptor in descriptors:
            ctypes.CDLL(None).setns(descriptor, 0)
            os.close(descriptor)
    except (OSError, ValueError, KeyError):
        pass  # it has ended, or `podman top` shows the node


def ending(directory_fd: int) -> tuple[int, int]:
    """How the tree ended: exit code, signal."""
    try:
        with open(os.open("exit.json", os.O_RDONLY, dir_fd=directory_fd), encoding="utf-8") as file:
            known = json.load(file)
        if known["outcome"] != "exited":
            return LOST, 0
        return known["exit_code"] or 0, known["signal"] or 0
    except (OSError, ValueError, KeyError):
        return LOST, 0


def stand_in(connection: socket.socket) -> None:
    """Be the container, as far as the monitor sees. Does not return."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    pipes = array.array("i", [0, 1, 2])
    connection.sendmsg([str(os.getpid()).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, pipes)])
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    kept = connection.detach()
    os.closerange(3, kept)
    os.closerange(kept + 1, 1024)
    connection = socket.socket(fileno=kept)
    said = connection.recv(65536)
    if not said:
        os._exit(LOST)
    directory_fd = os.open(said, os.O_RDONLY | os.O_DIRECTORY)
    pidfd = find_shim(directory_fd)
    connection.sendall(b".")
    connection.close()
    while not select.select([pidfd], [], [], LOOK_SECONDS)[0]:
        if "tree.json" in os.listdir(directory_fd):
            enter(directory_fd)
            select.select([pidfd], [], [])
            break
    code, number = ending(directory_fd)
    if number:
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        time.sleep(1)
    os._exit(code)


def restore(directory: str, arguments: list[str]) -> None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(f"{directory}/socket")
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            stand_in(connection)
        finally:
            os._exit(LOST)
    with open(option(arguments, "--pid-file"), "w", encoding="ascii") as file:
        file.write(str(pid))


def main() -> None:
    directory, runtime, *arguments = sys.argv[1:]
    if "--help" in arguments and "checkpoint" in arguments:
        return None  # a runtime without checkpoints will do
    if "--help" not in arguments:
        if "checkpoint" in arguments:
            return checkpoint(arguments)
        if "restore" in arguments:
            return restore(directory, arguments)
    os.execv(runtime, [runtime, *arguments])


if __name__ == "__main__":
    main()
