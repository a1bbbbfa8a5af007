"""Calls of `Node` whose end depends on what happens meanwhile."""

from __future__ import annotations

import asyncio
import signal
from types import SimpleNamespace
from typing import Any, cast

from google.protobuf.duration_pb2 import Duration

from phaul.v1 import node_pb2
from phaul_client.errors import InvalidRequest
from phauld import node_service
from phauld.node_service import NodeService
from phauld.workloads import Workloads


class _EndsByTheFirstSignal:
    """A tree that the first signal ends, with a shim that takes its time to say so."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._said = asyncio.Event()

    def get(self, name: str) -> Any:
        return SimpleNamespace(pid=7 if not self.signals else None)

    def send_signal(self, name: str, number: int) -> None:
        if self.signals:
            self._said.set()
            raise InvalidRequest(f"{name} does not run here (it is starting)")
        self.signals.append(number)

    async def wait(self, name: str) -> Any:
        await self._said.wait()
        return "ended"


async def test_a_tree_that_ends_as_its_grace_does_is_stopped(monkeypatch: Any) -> None:
    workloads = _EndsByTheFirstSignal()
    monkeypatch.setattr(node_service, "_message", lambda workload: node_pb2.Workload(name=workload))
    service = NodeService(cast(Any, None), cast(Workloads, workloads), cast(Any, None), lambda: (0, 0))
    answer = await service.StopWorkload(node_pb2.StopWorkloadRequest(name="x", grace=Duration()), cast(Any, None))
    assert answer.workload.name == "ended"
    assert workloads.signals == [signal.SIGTERM]
