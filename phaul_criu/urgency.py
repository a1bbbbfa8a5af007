"""What works while a tree stands still goes first: on a busy node most of a pause is waiting for a processor.

The lowest real-time priority, for as long as the tree stands still. A nice value does not do: it is a share, and does
not make a process that wakes up run at once (measured: 99 % of wake-ups within 1 ms with -20, within 0.1 ms so). The
kernel keeps 5 % for everybody else. A process that has ended, or a node that does not allow it, is none of our
business: it only takes longer then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

FIRST_PAGES_SECONDS: Final = 1.0
FIRST: Final = os.sched_param(1)
USUAL: Final = os.sched_param(0)
NEVER_FOR_MEMORY: Final = "-1000"  # OOM_SCORE_ADJ_MIN


def hurry(pid: int) -> None:
    """Let a process go first, with what it forks, until `calm` or its end.

    It is also the last that the kernel ends for want of memory: a tree in its hands would end with it, or be lost. That
    lasts, and needs CAP_SYS_RESOURCE.
    """
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(NEVER_FOR_MEMORY, encoding="ascii")
    for thread in _threads(pid):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(thread, os.SCHED_RR, FIRST)


def calm(pid: int) -> None:
    """Undo `hurry`."""
    for thread in _threads(pid):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(thread, os.SCHED_OTHER, USUAL)


def calm_soon(*pids: int) -> None:
    """Undo `hurry` after a moment: the first pages that a tree wants are as much of its pause as the freeze was."""
    pidfds = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            pidfds[pid] = os.pidfd_open(pid)

    def now() -> None:
        for pid, pidfd in pidfds.items():
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(pidfd, 0)  # it lives, so that the PID is no stranger's
                calm(pid)
            os.close(pidfd)

    asyncio.get_running_loop().call_later(FIRST_PAGES_SECONDS, now)


class Hurry:
    """This very process goes first while anybody is inside `with`; what it starts meanwhile does not."""

    def __init__(self) -> None:
        self._inside = 0
        self._before: dict[int, int] = {}  # of each thread: its policy

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """One more is in a hurry."""
        self._inside += 1
        if self._inside > 1:
            return
        self._before = {}
        for thread in _threads(os.getpid()):
            with contextlib.suppress(OSError):
                policy = os.sched_getscheduler(thread)
                if policy == os.SCHED_OTHER:
                    os.sched_setscheduler(thread, os.SCHED_RR | os.SCHED_RESET_ON_FORK, FIRST)
                    self._before[thread] = policy

    def leave(self) -> None:
        """One less is."""
        self._inside -= 1
        if self._inside:
            return
        for thread, policy in self._before.items():
            with contextlib.suppress(OSError):
                os.sched_setscheduler(thread, policy, USUAL)


#: For this process.
in_a_hurry: Final = Hurry()


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # of PID 0 there is none: it means ourselves
    except OSError:
        return []
