"""A tree that criu is restoring: a handle to kill it with if criu itself dies before the tree is let run."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from phaul_criu.processes import descendants


class HeldTree:
    """Remembers the root of a tree by pidfd. Until `release`, `kill` may be called; then the tree is on its own."""

    def __init__(self) -> None:
        self._pid = 0
        self._pidfd: int | None = None

    def note(self, pid: int) -> None:
        """The root is `pid`."""
        if self._pidfd is None:
            with suppress(ProcessLookupError):
                self._pidfd, self._pid = os.pidfd_open(pid), pid

    def kill(self) -> None:
        """Kill every process of the tree, if it has not been released. criu does so itself as long as it lives."""
        if self._pidfd is None:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, 0)  # alive, so that the PID is still this process's
            for pid in list(descendants(self._pid))[1:]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.release()

    def release(self) -> None:
        """The tree is going to run, or is gone: forget it."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
