"""`phaul.v1.Migrations`: what orchestrators and the command line ask of a source. One short method per call."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf import json_format

from phaul.v1 import migrations_pb2, migrations_pb2_grpc, node_pb2, types_pb2
from phaul_client.errors import InvalidRequest, MigrationNotFound, PhaulError, TooManyMigrations, WorkloadNotFound
from phauld import convert
from phauld.config import DEFAULT_PORT
from phauld.costs import CostBook
from phauld.journal import Journal, OutgoingEntry
from phauld.node import Node
from phauld.observer import NOBODY, Observer
from phauld.source.outgoing import RESOLUTIONS, Outgoing
from phauld.source.target import Target, find_target
from phauld.trees.workloads import Workloads

logger = logging.getLogger(__name__)

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DESTINATION: Final = re.compile(r"(?:\[(?P<ip6>[^\]]+)\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
DEFAULT_WATCH_SECONDS: Final = 0.5
MIN_WATCH_SECONDS: Final = 0.05
DEFAULT_PAGE: Final = 100
HISTORY: Final = 200  #: migrations of earlier phaulds that are still told about
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class MigrationsService(migrations_pb2_grpc.MigrationsServicer):
    """The outgoing migrations of this node."""

    def __init__(
        self,
        node: Node,
        images_dir: Path,
        workloads: Workloads,
        journal: Journal,
        max_outgoing: int,
        observer: Observer = NOBODY,
    ) -> None:
        self._node = node
        self._journal = journal
        self._images_dir = images_dir
        self._workloads = workloads
        self._max_outgoing = max_outgoing
        self._migrations: dict[str, Outgoing] = {}
        self._costs = CostBook()
        self._observer = observer

    @property
    def active(self) -> int:
        """Migrations that are not over."""
        return sum(not each.is_over for each in self._migrations.values())

    def is_open(self, migration_id: str) -> bool:
        """Whether it is one of this node's, and not over."""
        found = self._migrations.get(migration_id)
        return found is not None and not found.is_over

    def newest(self, number: int) -> list[migrations_pb2.Migration]:
        """The records of so many migrations, newest first, and of all that are not over."""
        every = list(reversed(self._migrations.values()))
        return [each.record for index, each in enumerate(every) if index < number or not each.is_over]

    def find(self, migration_id: str) -> migrations_pb2.Migration | None:
        """The record of one migration."""
        found = self._migrations.get(migration_id)
        return found.record if found is not None else None

    @property
    def records(self) -> Iterator[migrations_pb2.Migration]:
        """Those of all migrations that are remembered."""
        return (each.record for each in self._migrations.values())

    async def recover(self) -> None:
        """Take up what an earlier phauld left unfinished, and remember how the others ended."""
        for entry in reversed(await self._journal.list_outgoing(limit=HISTORY)):
            self._migrations[entry.migration_id] = self._from_journal(entry)
        for entry in await self._journal.unfinished_outgoing():
            logger.warning("recovering migration_id=%s phase=%s", entry.migration_id, entry.phase)
            outgoing = self._migrations.setdefault(entry.migration_id, self._from_journal(entry))
            outgoing.resume(entry)

    async def close(self) -> None:
        """phauld stops: see `Outgoing.stop`."""
        await asyncio.gather(*(each.stop() for each in self._migrations.values()))

    async def StartMigration(
        self, request: migrations_pb2.StartMigrationRequest, context: Context
    ) -> migrations_pb2.StartMigrationResponse:
        migration_id = request.migration_id or str(uuid.uuid4())
        if not _ID.fullmatch(migration_id):
            raise InvalidRequest(f"{migration_id!r} is not a migration id")
        if migration_id not in self._migrations:
            target = await find_target(request, self._workloads)
        if migration_id in self._migrations:  # the same call may come twice at once
            known = self._migrations[migration_id].record
            return migrations_pb2.StartMigrationResponse(migration=known)
        outgoing = self._make(migration_id, target, with_port(request.destination), request.options)
        pid = outgoing.record.pid
        if any(each.record.pid == pid for each in self._migrations.values() if not each.is_over):
            raise PhaulError(f"PID {pid} is on the move already", reason="MIGRATION_EXISTS", remedy="phaul status")
        if self.active >= self._max_outgoing:
            raise TooManyMigrations(f"{self.active} migrations leave this node already", remedy="try again in a moment")
        self._migrations[migration_id] = outgoing
        self._forget_oldest()
        outgoing.start()
        return migrations_pb2.StartMigrationResponse(migration=outgoing.record)

    async def GetMigration(
        self, request: migrations_pb2.GetMigrationRequest, context: Context
    ) -> migrations_pb2.GetMigrationResponse:
        return migrations_pb2.GetMigrationResponse(migration=self._get(request.migration_id).record)

    async def ListMigrations(
        self, request: migrations_pb2.ListMigrationsRequest, context: Context
    ) -> migrations_pb2.ListMigrationsResponse:
        if request.page_token and not request.page_token.isdigit():
            raise InvalidRequest(f"{request.page_token!r} is not a page token of this daemon")
        chosen = [
            each.record
            for each in reversed(self._migrations.values())
            if (not request.phases or each.record.phase in request.phases)
            and (not request.workload or each.record.workload == request.workload)
            and not (request.unfinished_only and each.is_over)
        ]
        first, size = int(request.page_token or 0), request.page_size or DEFAULT_PAGE
        more = len(chosen) > first + size
        return migrations_pb2.ListMigrationsResponse(
            migrations=chosen[first : first + size], next_page_token=str(first + size) if more else ""
        )

    async def WatchMigration(
        self, request: migrations_pb2.WatchMigrationRequest, context: Context
    ) -> AsyncIterator[migrations_pb2.WatchMigrationResponse]:
        outgoing = self._get(request.migration_id)
        interval = max(convert.seconds_of(request.interval) or DEFAULT_WATCH_SECONDS, MIN_WATCH_SECONDS)
        while not outgoing.is_over:
            yield migrations_pb2.WatchMigrationResponse(migration=outgoing.record)
            await outgoing.changed(interval)
        yield migrations_pb2.WatchMigrationResponse(migration=outgoing.record)

    async def CancelMigration(
        self, request: migrations_pb2.CancelMigrationRequest, context: Context
    ) -> migrations_pb2.CancelMigrationResponse:
        outgoing = self._get(request.migration_id)
        if outgoing.is_over:
            raise PhaulError("it is over", reason="WRONG_PHASE", remedy=f"phaul status {outgoing.migration_id}")
        if not outgoing.cancel():
            raise PhaulError(
                "it is committed: the destination decides, and nothing here may undo that",
                reason="WRONG_PHASE",
                remedy=f"phaul status {outgoing.migration_id}",
            )
        await outgoing.wait()
        return migrations_pb2.CancelMigrationResponse(migration=outgoing.record)

    async def UpdateMigration(
        self, request: migrations_pb2.UpdateMigrationRequest, context: Context
    ) -> migrations_pb2.UpdateMigrationResponse:
        outgoing = self._get(request.migration_id)
        await outgoing.update(request)
        return migrations_pb2.UpdateMigrationResponse(migration=outgoing.record)

    async def Resolve(self, request: migrations_pb2.ResolveRequest, context: Context) -> migrations_pb2.ResolveResponse:
        outgoing = self._get(request.migration_id)
        if request.resolution not in RESOLUTIONS:
            raise InvalidRequest("resolution is neither KILL nor RESUME")
        if outgoing.record.resolution == request.resolution:
            await outgoing.wait()
        elif not await outgoing.resolve(request):
            raise PhaulError("it is not in doubt: there is nothing to resolve", reason="WRONG_PHASE")
        return migrations_pb2.ResolveResponse(migration=outgoing.record)

    async def preflight(self, request: node_pb2.PreflightRequest) -> node_pb2.PreflightResponse:
        """Both halves of the check that a migration begins with, and nothing more. Raises `PhaulError`."""
        target = await find_target(request, self._workloads)
        outgoing = self._make("preflight", target, with_port(request.destination), request.options)
        tree = await outgoing.check()
        record = outgoing.record
        errors = [each for each in record.problems if each.severity == types_pb2.SEVERITY_ERROR]
        return node_pb2.PreflightResponse(
            ok=not errors,
            problems=record.problems,
            mode=record.mode,
            mode_reason=record.mode_reason,
            restore_mode=record.restore_mode,
            tree=tree,
            source=record.source,
            destination=record.destination,
            duration=record.total,
        )

    def _forget_oldest(self) -> None:
        """The journal keeps them; this process need not."""
        over = [each.migration_id for each in self._migrations.values() if each.is_over]
        for migration_id in over[: max(0, len(over) - HISTORY)]:
            del self._migrations[migration_id]

    def _from_journal(self, entry: OutgoingEntry) -> Outgoing:
        detail = entry.detail
        workload = None
        with contextlib.suppress(WorkloadNotFound):
            workload = self._workloads.get(detail["workload"])
        target = Target(pid=detail["pid"], identity=None, process_name=detail["process_name"], workload=workload)
        options = json_format.ParseDict(dict(detail["options"]), types_pb2.Options(), ignore_unknown_fields=True)
        outgoing = self._make(entry.migration_id, target, detail["destination"], options)
        if entry.report is not None:
            json_format.ParseDict(dict(entry.report), outgoing.record, ignore_unknown_fields=True)
        return outgoing

    def _make(self, migration_id: str, target: Target, destination: str, options: types_pb2.Options) -> Outgoing:
        return Outgoing(
            migration_id,
            target,
            destination,
            options,
            node=self._node,
            directory=self._images_dir / f"out-{migration_id}",
            journal=self._journal.outgoing(migration_id),
            costs=self._costs,
            observer=self._observer,
        )

    def _get(self, migration_id: str) -> Outgoing:
        try:
            return self._migrations[migration_id]
        except KeyError:
            raise MigrationNotFound(migration_id) from None


def with_port(destination: str) -> str:
    """HOST or HOST:PORT as HOST:PORT; an IPv6 HOST with a PORT is in brackets. Raises `InvalidRequest`."""
    if destination.count(":") > 1 and not destination.startswith("["):
        destination = f"[{destination}]"
    found = _DESTINATION.fullmatch(destination)
    if found is None or not 0 < int(found["port"] or DEFAULT_PORT) < 65536 or not _is_ip6(found["ip6"]):
        raise InvalidRequest(f"{destination!r} is not HOST or HOST:PORT")
    return destination if found["port"] else f"{destination}:{DEFAULT_PORT}"


def _is_ip6(address: str | None) -> bool:
    try:
        return address is None or bool(ipaddress.IPv6Address(address))
    except ValueError:
        return False
