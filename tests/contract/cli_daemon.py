"""A daemon in this process that answers as a test says, and `phaul` as a child process that asks it."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from phaul.v1 import migrations_pb2, migrations_pb2_grpc, node_pb2, node_pb2_grpc, types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.errors import InvalidRequest, MigrationNotFound, PhaseError, PhaulError, WorkloadNotFound
from phaul_client.status import to_status

REPOSITORY = Path(__file__).resolve().parents[2]


def phase(name: str) -> types_pb2.MigrationPhase.ValueType:
    return types_pb2.MigrationPhase.Value(f"MIGRATION_PHASE_{name}")


def snapshot(phase_name: str, migration_id: str = "3f2a9c0187", **fields: Any) -> Migration:
    """A migration as the scripted daemon tells it."""
    known: dict[str, Any] = {"pid": 4242, "workload": "redis", "destination_address": "10.0.0.2:7707"}
    return Migration(migration_id=migration_id, phase=phase(phase_name), **{**known, **fields})


@dataclass
class Script:
    """What the daemon knows and does, and what it was asked."""

    workloads: dict[str, node_pb2.Workload] = field(default_factory=dict)
    log: bytes = b""
    snapshots: list[Migration] = field(default_factory=list)
    history: list[Migration] = field(default_factory=list)
    preflight: node_pb2.PreflightResponse = field(default_factory=node_pb2.PreflightResponse)
    checks: list[node_pb2.Check] = field(default_factory=list)
    start_error: PhaulError | None = None
    cancel_error: PhaulError | None = None
    cancel_answer: Migration | None = None
    hang: bool = False  #: after the last snapshot, until it is cancelled
    break_off_after: int | None = None  #: snapshots, once
    asked: list[Message] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def of(self, kind: type[Message]) -> list[Any]:
        """The requests of a kind."""
        return [each for each in self.asked if isinstance(each, kind)]


class Node(node_pb2_grpc.NodeServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def workload(self, name: str) -> node_pb2.Workload:
        if name not in self.script.workloads:
            raise WorkloadNotFound(name)
        return self.script.workloads[name]

    async def GetInfo(self, request: Any, context: Any) -> node_pb2.GetInfoResponse:
        return node_pb2.GetInfoResponse(node=types_pb2.NodeInfo(node_name="node-a", version="0.1.0"))

    async def Doctor(self, request: Any, context: Any) -> node_pb2.DoctorResponse:
        return node_pb2.DoctorResponse(checks=self.script.checks)

    async def Preflight(self, request: Any, context: Any) -> node_pb2.PreflightResponse:
        self.script.asked.append(request)
        return self.script.preflight

    async def RunWorkload(self, request: Any, context: Any) -> node_pb2.RunWorkloadResponse:
        self.script.asked.append(request)
        if request.spec.name == "taken-in-a-race":
            await fail(context, PhaulError("taken", reason="WORKLOAD_EXISTS", remedy="choose another name"))
        if request.spec.argv[0] == "nothing":
            await fail(context, InvalidRequest("'nothing' is no program on this node", remedy="searched in /bin"))
        made = node_pb2.Workload(name=request.spec.name, pid=77, state=node_pb2.WORKLOAD_STATE_RUNNING)
        made.spec.CopyFrom(request.spec)
        self.script.workloads[made.name] = made
        return node_pb2.RunWorkloadResponse(workload=made)

    async def ListWorkloads(self, request: Any, context: Any) -> node_pb2.ListWorkloadsResponse:
        if self.script.hang:
            await asyncio.sleep(60)
        found = [each for each in self.script.workloads.values() if not request.states or each.state in request.states]
        return node_pb2.ListWorkloadsResponse(workloads=found)

    async def GetWorkload(self, request: Any, context: Any) -> node_pb2.GetWorkloadResponse:
        try:
            return node_pb2.GetWorkloadResponse(workload=self.workload(request.name))
        except WorkloadNotFound as exc:
            await fail(context, exc)
            raise

    async def WaitWorkload(self, request: Any, context: Any) -> node_pb2.WaitWorkloadResponse:
        self.script.asked.append(request)
        if self.script.break_off_after is not None:
            self.script.break_off_after = None
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
        return node_pb2.WaitWorkloadResponse(workload=self.workload(request.name))

    async def StopWorkload(self, request: Any, context: Any) -> node_pb2.StopWorkloadResponse:
        self.script.asked.append(request)
        return node_pb2.StopWorkloadResponse(workload=self.workload(request.name))

    async def RemoveWorkload(self, request: Any, context: Any) -> node_pb2.RemoveWorkloadResponse:
        self.script.asked.append(request)
        return node_pb2.RemoveWorkloadResponse()

    async def ReadWorkloadLog(self, request: Any, context: Any) -> AsyncIterator[node_pb2.ReadWorkloadLogResponse]:
        asked = node_pb2.ReadWorkloadLogRequest()
        asked.CopyFrom(request)
        self.script.asked.append(asked)
        for offset in range(request.offset_bytes, len(self.script.log), 4):
            data = self.script.log[offset : offset + 4]
            yield node_pb2.ReadWorkloadLogResponse(data=data, next_offset_bytes=offset + len(data))
            if self.script.break_off_after is not None:
                self.script.break_off_after = None
                await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")


class Migrations(migrations_pb2_grpc.MigrationsServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def StartMigration(self, request: Any, context: Any) -> migrations_pb2.StartMigrationResponse:
        self.script.asked.append(request)
        if self.script.start_error is not None:
            await fail(context, self.script.start_error)
        return migrations_pb2.StartMigrationResponse(migration=snapshot("PREFLIGHT"))

    async def WatchMigration(self, request: Any, context: Any) -> AsyncIterator[migrations_pb2.WatchMigrationResponse]:
        self.script.asked.append(request)
        for number, each in enumerate(self.script.snapshots):
            if number == self.script.break_off_after:
                self.script.break_off_after = None
                await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
            yield migrations_pb2.WatchMigrationResponse(migration=each)
        if self.script.hang:
            await self.script.cancelled.wait()
            yield migrations_pb2.WatchMigrationResponse(migration=snapshot("CANCELLED"))

    async def GetMigration(self, request: Any, context: Any) -> migrations_pb2.GetMigrationResponse:
        for each in self.script.history:
            if each.migration_id == request.migration_id:
                return migrations_pb2.GetMigrationResponse(migration=each)
        await fail(context, MigrationNotFound(request.migration_id))
        raise AssertionError

    async def ListMigrations(self, request: Any, context: Any) -> migrations_pb2.ListMigrationsResponse:
        self.script.asked.append(request)
        begin = int(request.page_token or 0)
        end = begin + 2 if request.page_size == 1000 else len(self.script.history)
        more = str(end) if end < len(self.script.history) else ""
        return migrations_pb2.ListMigrationsResponse(migrations=self.script.history[begin:end], next_page_token=more)

    async def CancelMigration(self, request: Any, context: Any) -> migrations_pb2.CancelMigrationResponse:
        self.script.asked.append(request)
        if self.script.cancel_error is not None:
            await fail(context, self.script.cancel_error)
        self.script.cancelled.set()
        answer = self.script.cancel_answer or snapshot("CANCELLED", request.migration_id)
        return migrations_pb2.CancelMigrationResponse(migration=answer)

    async def UpdateMigration(self, request: Any, context: Any) -> migrations_pb2.UpdateMigrationResponse:
        raise NotImplementedError

    async def Resolve(self, request: Any, context: Any) -> migrations_pb2.ResolveResponse:
        self.script.asked.append(request)
        kill = request.resolution == migrations_pb2.RESOLUTION_KILL
        ended = snapshot("DONE" if kill else "ROLLED_BACK", request.migration_id, resolution=request.resolution)
        return migrations_pb2.ResolveResponse(migration=ended)


async def fail(context: Any, error: PhaulError) -> None:
    await context.abort_with_status(to_status(error))


def too_late() -> PhaulError:
    return PhaseError("COMMITTED", "cancel")


@dataclass
class Cli:
    """`phaul` with a scripted daemon."""

    address: str
    script: Script

    async def start(self, *arguments: str, daemon: str | None = None) -> asyncio.subprocess.Process:
        environment = {**os.environ, "PHAUL_DAEMON": self.address if daemon is None else daemon, "COLUMNS": "100"}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "phaul_client.cli", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd=REPOSITORY,
        )

    async def run(self, *arguments: str, daemon: str | None = None) -> "Done":
        return await ended(await self.start(*arguments, daemon=daemon))


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """Standard output as lines of JSON."""
        return [json.loads(line) for line in self.out.splitlines()]


async def ended(process: asyncio.subprocess.Process) -> Done:
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())


async def interrupt_when(process: asyncio.subprocess.Process, text: str) -> None:
    """Send Ctrl-C's signal as soon as a line with `text` has come on standard error."""
    assert process.stderr is not None
    async with asyncio.timeout(20):
        while text not in (line := (await process.stderr.readline()).decode()):
            assert line, f"{text!r} never came"
    process.send_signal(signal.SIGINT)


@contextlib.asynccontextmanager
async def scripted_daemon(directory: Path) -> AsyncIterator[Cli]:
    script = Script()
    server = grpc.aio.server()
    node_pb2_grpc.add_NodeServicer_to_server(Node(script), server)
    migrations_pb2_grpc.add_MigrationsServicer_to_server(Migrations(script), server)
    address = f"unix:{directory}/phauld.sock"
    server.add_insecure_port(address)
    await server.start()
    try:
        yield Cli(address, script)
    finally:
        await server.stop(None)
