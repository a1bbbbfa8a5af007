"""Keeps criu, its guard and the tree that criu holds on one processor, while criu changes registers.

There criu and its guard go first, with a real-time priority. So when criu is killed while a task does what criu has
told it, the task stands still until its guard has sent it SIGSTOP, and never comes to the breakpoint at which, with
nobody to ask, it would end. It takes less time as well: nobody has to be woken on another processor (measured: 2.5 in
place of 3.3 ms for a process of one thread, 3.7 in place of 7 ms for eight threads).

The invariant: a tree that is kept on one processor is in a record. Should its guard be killed as well, phauld, or the
next one, gives it back by that where it may run. The standard library alone.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping

from phauld.proc import descendants, start_ticks

REAL_TIME = (os.SCHED_FIFO, os.SCHED_RR)
_PROCESSOR = 36  # in /proc/PID/stat, counted behind the name in parentheses


class OneProcessor:
    """It does nothing where it is not permitted, or where no processor is common to all."""

    def __init__(self, record: str) -> None:
        """`record` is the path of a file."""
        self._record = record
        self._before: dict[int, set[int]] = {}

    def enter(self, criu: int, pids: Iterable[int], started: Mapping[int, int]) -> None:
        """`started`: when these processes did, as far as it is known."""
        tasks = [int(name) for pid in pids for name in listed(f"/proc/{pid}/task")]
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(criu) not in REAL_TIME or os.sched_getscheduler(0) not in REAL_TIME:
                return
            ours = {tid: os.sched_getaffinity(tid) for tid in (os.getpid(), criu)}
            theirs = {tid: os.sched_getaffinity(tid) for tid in tasks}
            common = set.intersection(*ours.values(), *theirs.values())
            if not common:
                return
            last = last_processor(tasks[0])
            processor = last if last in common else max(common)
            write(self._record, processor, {pid: started.get(pid) or start_ticks(pid) for pid in pids}, theirs)
            self._before = ours | theirs
            for tid in self._before:
                os.sched_setaffinity(tid, {processor})

    def leave(self, pids: Iterable[int]) -> None:
        """What was born meanwhile gets what its process had."""
        before, self._before = self._before, {}
        if not before:
            return
        born = {int(name): pid for pid in pids for name in listed(f"/proc/{pid}/task")}
        for tid in before | born:
            with contextlib.suppress(OSError):
                processors = before.get(tid) or before.get(born.get(tid, 0)) or next(iter(before.values()))
                os.sched_setaffinity(tid, processors)
        with contextlib.suppress(OSError):
            os.unlink(self._record)


def write(record: str, processor: int, started: Mapping[int, int], tasks: Mapping[int, set[int]]) -> None:
    """Raises OSError. It is not made durable: after a reboot there is nobody to whom to give anything back."""
    usual = Counter(map(frozenset, tasks.values())).most_common(1)[0][0]
    content = {
        "boot": boot(),
        "processor": processor,
        "processes": [*started.items()],
        "usual": [*usual],
        "others": [(tid, [*processors]) for tid, processors in tasks.items() if processors != usual],
    }
    with open(record, "w", encoding="ascii") as file:
        json.dump(content, file)


def give_back(record: str) -> None:
    """Whoever kept a tree on one processor is dead, or soon lets go of it: it may run where it might before.

    Who was moved to other processors meanwhile stays there.
    """
    try:
        with open(record, encoding="ascii") as file:
            content = json.load(file)
    except (OSError, ValueError):  # there is none; or nobody had been moved yet
        return
    others = {tid: set(processors) for tid, processors in content["others"]}
    for tid in _alive(content["processes"]) if content["boot"] == boot() else ():
        with contextlib.suppress(OSError):
            if os.sched_getaffinity(tid) == {content["processor"]}:
                os.sched_setaffinity(tid, others.get(tid) or set(content["usual"]))
    with contextlib.suppress(OSError):
        os.unlink(record)


def _alive(processes: Iterable[tuple[int, int]]) -> list[int]:
    """The tasks of those that live, and of what they have forked."""
    roots = []
    for pid, ticks in processes:
        with contextlib.suppress(OSError):
            if start_ticks(pid) == ticks:
                roots.append(pid)
    return [int(name) for pid in {*descendants(roots)} for name in listed(f"/proc/{pid}/task")]


def boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def last_processor(pid: int) -> int:
    """On which it has run, and has its memory at hand. Raises OSError."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[_PROCESSOR])


def listed(directory: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(directory)
    return []
