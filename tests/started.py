"""What was started in a node: a process that runs, or a command that has ended."""

import asyncio
import contextlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

END_SECONDS: Final = 30.0
RUN_SECONDS: Final = 60.0


class CommandFailed(Exception):
    """A command in a node did not end with 0."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that has ended. `returncode` is negative after a signal."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """Standard output as one JSON value. Raises ValueError."""
        return json.loads(self.stdout)

    def events(self) -> list[dict[str, Any]]:
        """Standard output as lines of JSON. Raises ValueError."""
        return [json.loads(line) for line in self.stdout.splitlines()]


class Process:
    """A process that was started in a node. `pid` is the host's, `node_pid` the node's own number for it."""

    def __init__(self, entered: asyncio.subprocess.Process, pid: int, log: Path) -> None:
        self._entered = entered
        self.pid = pid
        self.node_pid = node_pid(pid)
        self.log = log

    @property
    def returncode(self) -> int | None:
        return self._entered.returncode

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError if it has ended."""
        os.kill(self.pid, number)
        if number == signal.SIGCONT:  # nsenter stops itself when its child stops
            self._entered.send_signal(number)

    async def wait(self, timeout_seconds: float = RUN_SECONDS) -> int:
        """Wait for its end; the exit status, negative after a signal. Raises TimeoutError."""
        async with asyncio.timeout(timeout_seconds):
            return await self._entered.wait()

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its end; the exit status. Raises TimeoutError."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.send_signal(number)
        return await self.wait(END_SECONDS)


def node_pid(pid: int) -> int:
    """The number of a process in the PID namespace below ours. Raises FileNotFoundError if there is no process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[2])
    raise ValueError("this kernel has no PID namespaces")
