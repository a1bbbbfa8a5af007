"""A workload that is started again, watched from outside of all nodes."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phaul.v1 import node_pb2, node_pb2_grpc
from phaul_client.cli.json_output import to_json
from tests.nodes import Node

BEATS_SECONDS: Final = 20.0
_PROGRAM: Final = Path(__file__).parent / "victims" / "restarting.py"


@dataclass(frozen=True, slots=True)
class Restarting:
    """The program of `victims/restarting.py`; its files are seen from all nodes."""

    name: str
    directory: Path

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-IS", str(_PROGRAM), str(self.file), str(self.order)]

    @property
    def file(self) -> Path:
        return self.directory / f"{self.name}.starts"

    @property
    def order(self) -> Path:
        return self.directory / f"{self.name}.order"

    async def run(self, node: Node, *options: str) -> None:
        """By the command line."""
        await node.phaul("run", "--name", self.name, *options, "--", *self.argv, check=True)
        await self.beats(1)

    def end(self, code: int) -> None:
        """It exits with this code as soon as it runs."""
        written = self.order.with_suffix(".new")
        written.write_text(f"{code}\n")
        os.rename(written, self.order)

    @property
    def starts(self) -> int:
        """How often it was started. Raises `AssertionError` if ever two ran at a time, or a beat was lost."""
        lines = [tuple(map(int, line.split())) for line in self._lines()]
        for (start, beat), following in itertools.pairwise(lines):
            assert following in ((start, beat + 1), (start + 1, 0)), f"{following} after {(start, beat)}"
        return lines[-1][0] if lines else 0

    def _lines(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []

    async def beats(self, start: int, seconds: float = BEATS_SECONDS) -> None:
        """Wait for some more beats of that start. Raises `TimeoutError`."""
        count = len(self._lines())
        async with asyncio.timeout(seconds):
            while self.starts != start or len(self._lines()) <= count + 5:  # noqa: ASYNC110 - another process's
                await asyncio.sleep(0.02)

    async def shown(self, node: Node) -> dict[str, Any]:
        """What `phaul ps --all --json` says of it there."""
        async with node.daemon.channel() as channel:
            request = node_pb2.GetWorkloadRequest(name=self.name)
            answer = await node_pb2_grpc.NodeStub(channel).GetWorkload(request, timeout=10, wait_for_ready=True)
        return to_json(answer.workload)
