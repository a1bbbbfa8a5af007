"""Holds a process tree as criu does, with ptrace; one word on standard input, one line on standard output each.

    seize PID    every thread of the tree is stopped; answers "seized"
    release      the tree runs on (or stops, where a SIGSTOP is pending); answers "released"
    kill         the tree is killed; answers "killed"

Killed itself, with whatever signal, it lets go of the tree, as criu does. Standard library only.
"""

import ctypes
import os
import signal
import sys

PTRACE_DETACH = 17
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
WALL = 0x40000000

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def ptrace(request: int, task: int) -> None:
    if libc.ptrace(request, task, None, None) != 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request} of {task}")


def is_zombie(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


def threads(root: int) -> list[int]:
    """Every thread of every living process of the tree."""
    found, pending = [], [root]
    while pending:
        pid = pending.pop()
        for task in map(int, os.listdir(f"/proc/{pid}/task")):
            if not is_zombie(pid):
                found.append(task)
            with open(f"/proc/{pid}/task/{task}/children") as file:
                pending += map(int, file.read().split())
    return found


def seize(root: int) -> list[int]:
    tasks = threads(root)
    for task in tasks:
        ptrace(PTRACE_SEIZE, task)
        ptrace(PTRACE_INTERRUPT, task)
    for task in tasks:
        os.waitpid(task, WALL)
    return tasks


def main() -> None:
    tasks: list[int] = []
    for line in sys.stdin:
        word, _, argument = line.strip().partition(" ")
        if word == "seize":
            tasks = seize(int(argument))
        elif word == "release":
            for task in tasks:
                ptrace(PTRACE_DETACH, task)
        else:
            for task in tasks:
                try:
                    os.kill(task, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            for task in tasks:
                try:
                    os.waitpid(task, WALL)
                except ChildProcessError:
                    continue
        print({"seize": "seized", "release": "released", "kill": "killed"}[word], flush=True)


if __name__ == "__main__":
    main()
