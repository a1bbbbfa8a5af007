"""`phaul.v1.Node`: what a node is, what it can move, and the workloads that it runs. One short method per call."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

import grpc

from phaul.v1 import node_pb2, node_pb2_grpc, types_pb2
from phaul_client.errors import InvalidRequest
from phaul_criu import features
from phaul_criu.features import Finding
from phauld import convert
from phauld.node import Node
from phauld.trees.workload_records import ShownState, Workload
from phauld.trees.workload_spec import WorkloadSpec
from phauld.trees.workloads import Workloads

logger = logging.getLogger(__name__)

DEFAULT_GRACE_SECONDS: Final = 10.0
LOG_CHUNK_BYTES: Final = 1 << 16
LOG_POLL_SECONDS: Final = 0.25
TIME_NAMESPACE: Final = Path("/proc/self/ns/time")  # there if the kernel has time namespaces
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_STATES: Final[dict[ShownState, node_pb2.WorkloadState.ValueType]] = {
    "running": node_pb2.WORKLOAD_STATE_RUNNING,
    "arriving": node_pb2.WORKLOAD_STATE_ARRIVING,
    "restarting": node_pb2.WORKLOAD_STATE_RESTARTING,
    "exited": node_pb2.WORKLOAD_STATE_EXITED,
    "moved": node_pb2.WORKLOAD_STATE_MOVED,
    "lost": node_pb2.WORKLOAD_STATE_LOST,
}
_SEVERITIES: Final = {
    features.Severity.REQUIRED: types_pb2.SEVERITY_ERROR,
    features.Severity.FEATURE: types_pb2.SEVERITY_WARNING,
    features.Severity.ADVICE: types_pb2.SEVERITY_INFO,
}
Preflight = Callable[[node_pb2.PreflightRequest], Awaitable[node_pb2.PreflightResponse]]


class NodeService(node_pb2_grpc.NodeServicer):
    """This node."""

    def __init__(
        self, node: Node, workloads: Workloads, preflight: Preflight, active: Callable[[], tuple[int, int]]
    ) -> None:
        self._node = node
        self._preflight = preflight
        self._workloads = workloads
        self._active = active  # migrations in and out

    async def GetInfo(self, request: node_pb2.GetInfoRequest, context: Context) -> node_pb2.GetInfoResponse:
        incoming, outgoing = self._active()
        return node_pb2.GetInfoResponse(node=self._node.info(incoming=incoming, outgoing=outgoing))

    async def Doctor(self, request: node_pb2.DoctorRequest, context: Context) -> node_pb2.DoctorResponse:
        found = await features.findings(self._node.criu.binary)
        checks = [_check(each) for each in found] + _tls_checks(self._node.info().pages_tls)
        return node_pb2.DoctorResponse(checks=checks, ok=not features.missing(found), node=self._node.info())

    async def Preflight(self, request: node_pb2.PreflightRequest, context: Context) -> node_pb2.PreflightResponse:
        return await self._preflight(request)

    async def RunWorkload(self, request: node_pb2.RunWorkloadRequest, context: Context) -> node_pb2.RunWorkloadResponse:
        asked = request.spec
        if not asked.argv:
            raise InvalidRequest("no command was given")
        name = asked.name or self._free_name(asked.argv[0])
        spec = WorkloadSpec(
            name=name,
            argv=tuple(asked.argv),
            env=dict(asked.env) or {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"},
            cwd=asked.working_directory or "/",
            log_path=asked.log_path or self._workloads.log_path(name),
            user=asked.user,
            limits=dict(asked.limits),
            new_ipc_namespace=asked.own_ipc_namespace if asked.HasField("own_ipc_namespace") else True,
            restart=convert.restart(asked.restart),
            cgroup=convert.cgroup(asked.cgroup_limits),
            new_pid_namespace=asked.own_pid_namespace if asked.HasField("own_pid_namespace") else True,
            new_time_namespace=(
                asked.own_time_namespace if asked.HasField("own_time_namespace") else TIME_NAMESPACE.exists()
            ),
        )
        running = next((each for each in self._workloads.list() if each.spec == spec and each.is_present), None)
        return node_pb2.RunWorkloadResponse(workload=_message(running or await self._workloads.run(spec)))

    async def ListWorkloads(
        self, request: node_pb2.ListWorkloadsRequest, context: Context
    ) -> node_pb2.ListWorkloadsResponse:
        messages = (_message(each) for each in self._workloads.list())
        return node_pb2.ListWorkloadsResponse(
            workloads=[each for each in messages if not request.states or each.state in request.states]
        )

    async def GetWorkload(self, request: node_pb2.GetWorkloadRequest, context: Context) -> node_pb2.GetWorkloadResponse:
        return node_pb2.GetWorkloadResponse(workload=_message(self._workloads.get(request.name)))

    async def WaitWorkload(
        self, request: node_pb2.WaitWorkloadRequest, context: Context
    ) -> node_pb2.WaitWorkloadResponse:
        return node_pb2.WaitWorkloadResponse(workload=_message(await self._workloads.wait(request.name)))

    async def StopWorkload(
        self, request: node_pb2.StopWorkloadRequest, context: Context
    ) -> node_pb2.StopWorkloadResponse:
        grace = convert.seconds_of(request.grace) if request.HasField("grace") else DEFAULT_GRACE_SECONDS
        if grace < 0:
            raise InvalidRequest(f"grace: {grace:g} s is less than nothing")
        if not 0 <= request.signal < signal.NSIG:
            raise InvalidRequest(f"signal: there is no signal {request.signal}")
        ended = await self._workloads.stop(request.name, request.signal or signal.SIGTERM, grace)
        return node_pb2.StopWorkloadResponse(workload=_message(ended))

    async def RemoveWorkload(
        self, request: node_pb2.RemoveWorkloadRequest, context: Context
    ) -> node_pb2.RemoveWorkloadResponse:
        self._workloads.remove(request.name)
        return node_pb2.RemoveWorkloadResponse()

    async def ReadWorkloadLog(
        self, request: node_pb2.ReadWorkloadLogRequest, context: Context
    ) -> AsyncIterator[node_pb2.ReadWorkloadLogResponse]:
        workload = self._workloads.get(request.name)
        if not workload.spec.log_path:
            raise InvalidRequest(f"{request.name} was not started by phaul: it has no log here")
        path = Path(workload.spec.log_path)
        offset = request.offset_bytes if request.HasField("offset_bytes") else _tail(path, request.tail_lines)
        while True:
            ended = not self._workloads.get(request.name).is_present
            for data in _chunks(path, offset):
                offset += len(data)
                yield node_pb2.ReadWorkloadLogResponse(data=data, next_offset_bytes=offset)
            if ended or not request.follow:
                return
            await asyncio.sleep(LOG_POLL_SECONDS)

    def _free_name(self, program: str) -> str:
        stem = Path(program).name or "workload"
        taken = {each.name for each in self._workloads.list()}
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        return next(name for name in names if name not in taken)


def _check(finding: Finding) -> node_pb2.Check:
    return node_pb2.Check(
        code=finding.name,
        ok=finding.ok,
        severity=types_pb2.SEVERITY_INFO if finding.ok else _SEVERITIES[finding.severity],
        message=finding.detail,
        remedy=finding.remedy,
    )


def _tls_checks(pages_tls: str) -> list[node_pb2.Check]:
    """What is slower without it is told, and is no defect; none without TLS."""
    if not pages_tls:
        return []
    by_kernel = pages_tls == "the kernel"
    return [
        node_pb2.Check(
            code="kernel-tls",
            ok=by_kernel,
            severity=types_pb2.SEVERITY_INFO,
            message=f"the TLS of pages is made by {pages_tls}",
            remedy=""
            if by_kernel
            else "modprobe tls, and start phauld anew; it works without, with more processor time",
        )
    ]


def _message(workload: Workload) -> node_pb2.Workload:
    message = node_pb2.Workload(
        name=workload.name,
        state=_STATES[workload.shown_state],
        spec=convert.workload_message(workload.spec),
        pid=workload.pid or 0,
        log_path=workload.spec.log_path,
        started_at=convert.timestamp(workload.created_at),
        migration_id=workload.leaving or workload.brought_by,
        moved_to=workload.moved_to or "",
        restarts=workload.attempts.restarts,
        restart_at=convert.timestamp(workload.restart_at) if workload.restart_at is not None else None,
        start_error=workload.error,
    )
    if workload.exit_code is not None:
        message.exit_status.exit_code = workload.exit_code
    if workload.signal is not None:
        message.exit_status.signal = workload.signal
    return message


def _chunks(path: Path, offset: int) -> list[bytes]:
    """What is in the file from `offset` on, in pieces fit for messages."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return list(iter(lambda: file.read(LOG_CHUNK_BYTES), b""))
    except FileNotFoundError:
        return []


def _tail(path: Path, lines: int) -> int:
    """Where the last `lines` lines begin; 0 lines mean all of it."""
    if lines == 0 or not path.exists():
        return 0
    content = path.read_bytes()
    position = len(content.rstrip(b"\n"))
    for _ in range(lines):
        position = content.rfind(b"\n", 0, position)
        if position < 0:
            return 0
    return position + 1
