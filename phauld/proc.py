"""Processes as /proc shows them, with the standard library alone: see `bare.py`."""

import os
import signal

from phaul_criu import processes

PF_EXITING = 4  # include/linux/sched.h


def start_ticks(pid: int) -> int:
    """Clock ticks since boot at which the process started: with the PID, its identity until the next boot."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def identity(pid: int) -> dict[str, object]:
    """What names a process beyond doubt, also after its PID was used again and after a reboot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return {"pid": pid, "start_ticks": start_ticks(pid), "boot_id": file.read().strip()}


def children() -> list[int]:
    """The PIDs of this process's children."""
    with open("/proc/thread-self/children", "rb") as file:
        return [int(pid) for pid in file.read().split()]


def descendants(roots: list[int]) -> list[int]:
    """The PIDs of trees as they stand now."""
    return list(processes.descendants(*roots))


def was_killed(child: int) -> bool:
    """Whether a child has ended by SIGKILL, as one does when criu unwinds. It is dead, whatever it was."""
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return ended is not None and ended.si_status == signal.SIGKILL and ended.si_code == os.CLD_KILLED


def is_zombie(pid: int) -> bool:
    """Whether a child has ended."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def is_ending(pid: int) -> bool:
    """Whether a process is on its way out, by itself or killed: which of them is known when it is a zombie."""
    state, is_on_its_way = ending(pid)
    return state != b"Z" and is_on_its_way


def is_dead(pid: int) -> bool:
    """Whether a process, not necessarily a child, has ended or is about to."""
    state, is_on_its_way = ending(pid)
    return state in (b"", b"Z", b"X") or is_on_its_way


def ending(pid: int) -> tuple[bytes, bool]:
    """Its state, which is empty if there is no such process; whether it is on its way out."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/status", "rb") as file:
            pending = [int(line.split()[1], 16) for line in file if line.startswith((b"SigPnd:", b"ShdPnd:"))]
    except (FileNotFoundError, ProcessLookupError):
        return b"", False
    killed = any(mask >> (signal.SIGKILL - 1) & 1 for mask in pending)
    return fields[0], killed or bool(int(fields[6]) & PF_EXITING)
