"""What is tried for one outgoing migration: the move, once, and the recoveries that may follow it.

An attempt ends by itself or by an error, of which `endings.py` knows what it means. The invariant: who sees the
migration through (`coordinator`) is known from the moment that anything of it could be in the journal.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client import commit
from phaul_client.commit import Event, Phase
from phaul_client.coordinator import Coordinator
from phaul_client.errors import PeerError, PeerUnavailable, PhaulError, PreflightRefused
from phaul_client.last_step import LAST_DUMP
from phaul_client.remote import GrpcRemote
from phaul_client.serving import criu_gone
from phaul_client.tree import waits_for_pages
from phaul_client.tree_lock import unlock_network
from phauld import convert
from phauld.costs import CostBook
from phauld.guard import open_channel
from phauld.guarding.one_processor import give_back
from phauld.journal import OutgoingEntry, OutgoingRecord
from phauld.node import Node
from phauld.observer import Observer
from phauld.source.belongings import Belongings
from phauld.source.controls import Controls
from phauld.source.coordinators import Coordinators
from phauld.source.departure import Departure
from phauld.source.endings import why_rolled_back
from phauld.source.meter import Meter
from phauld.source.movement import Movement
from phauld.source.report import Report
from phauld.source.source_relay import SourceRelay
from phauld.source.target import Target
from phauld.trees.freezer import undo_leftover

logger = logging.getLogger(__name__)

UNWIND_SECONDS: Final = 10.0  #: for an earlier phauld's criu, which has lost its socket
FILLED_SECONDS: Final = 0.1
PROCESSORS: Final = "processors.json"  #: on which the tree might run before its guard kept it on one
#: Here the tree's addresses are the destination's, or may be.
_WITHOUT_ADDRESSES: Final = frozenset({*commit.IN_DOUBT, Phase.FILLING, Phase.CONFIRMED})


class Attempts:
    """At one migration; `on_lost` is told of a destination that is silent or has given up."""

    def __init__(
        self,
        record: migrations_pb2.Migration,
        target: Target,
        *,
        node: Node,
        directory: Path,
        journal: OutgoingRecord,
        costs: CostBook,
        observer: Observer,
        report: Report,
        on_lost: Callable[[PeerError], None],
    ) -> None:
        self._record = record
        self._target = target
        self._node = node
        self._directory = directory
        self._observer = observer
        self._report = report
        self._on_lost = on_lost
        self._remote: GrpcRemote | None = None
        self._meter = meter = Meter(report)
        self._relay = SourceRelay(node, record.destination_address, directory / "relay", journal)
        self._departure = Departure(node, target, record)
        self._belongings = Belongings(target, node, report)
        self.controls: Final = Controls(record, self._relay)
        self._coordinators = Coordinators(
            record,
            target,
            journal,
            relay=self._relay,
            belongings=self._belongings,
            meter=meter,
            processors=directory / PROCESSORS,
            clean_up=self._clean_up,
        )
        self._movement = Movement(
            node,
            target.pid,
            directory,
            report,
            controls=self.controls,
            belongings=self._belongings,
            meter=meter,
            costs=costs,
        )
        self.coordinator: Coordinator | None = None  #: who sees it through, of the newest attempt
        self.is_recovery = False
        self.has_opened = False  #: from then on it is rolled back, not refused

    @property
    def phase(self) -> Phase | None:
        """`None`: it has not come so far as to have one."""
        return self.coordinator.phase if self.coordinator is not None else None

    @property
    def pipe_failure(self) -> PhaulError | None:
        """Of the page pipe, which knows why a stream broke."""
        return self._remote.pipe_failure if self._remote is not None else None

    def stayed(self) -> None:
        """It was rolled back: what would have gone along stays."""
        self._belongings.stay()

    def forget(self) -> None:
        """It is over."""
        self.coordinator = None  # its errors hold on to the connection that they are of

    async def check(self) -> types_pb2.TreeFacts | None:
        """Only the preflight: the tree; the record then has what else it found. Raises `PeerError`."""
        async with (
            self._channel() as channel,
            GrpcRemote(self._record.destination_address, channel, self._record.migration_id) as remote,
        ):
            try:
                await self._departure.plan(remote, self.controls.options)
            except PeerUnavailable as exc:
                self._report.fail("peer-unreachable", self._record.destination_address, exc.message, exc.remedy)
            except PreflightRefused:
                pass  # the record has the problems
        self._report.note_total()
        return self._departure.tree

    def _channel(self) -> grpc.aio.Channel:
        interceptors = self._observer.client_interceptors(self._record.migration_id)
        return open_channel(self._record.destination_address, interceptors, self._node.guard)

    def _use(self, remote: GrpcRemote) -> None:
        self._remote = remote
        self.controls.reach(remote)
        remote.on_lost = self._on_lost

    async def _clean_up(self) -> None:
        assert self.coordinator is not None
        await self._relay.wait()
        await self._belongings.part(self.coordinator)
        # For a tree that criu did not let go, or whose phauld was killed; the images alone know the lock's name.
        await asyncio.to_thread(unlock_network, self._directory / LAST_DUMP)
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def migrate(self) -> None:
        """Move the process. Raises what it ended as, if that is not DONE."""
        async with (
            self._channel() as channel,
            GrpcRemote(self._record.destination_address, channel, self._record.migration_id) as remote,
            asyncio.timeout(self.controls.options.deadline_seconds) as deadline,
        ):

            def on_phase(phase: Phase) -> None:
                if phase is Phase.COMMITTED and not deadline.expired():  # else it is left in doubt, to a recovery
                    deadline.reschedule(None)
                self._meter.look()
                self._report.on_phase(phase)

            self._use(remote)
            await self._until_filled()
            plan = await self._departure.plan(remote, self.controls.options)
            local = self._coordinators.local(remote, plan, self.controls.options, on_phase)
            self.coordinator = local
            try:
                await local.fire(Event.PREFLIGHT_PASSED)
                await local.hooks.prepare()
                await self._departure.open(remote, plan)
                self.has_opened = True
                await local.fire(Event.SESSION_OPENED)
                await self._movement.run(local, remote, plan)
            except (Exception, asyncio.CancelledError) as exc:
                await local.unwind(exc)
            finally:
                await self._belongings.unpack(local.cargo)
                self._report.on_last_step(local)
            self.moved(local)

    async def _until_filled(self) -> None:
        """Wait for the pages that the move to here has still to bring."""
        while await asyncio.to_thread(waits_for_pages, self._target.pid):
            self._record.status_text = "waits for the memory that its last move, a lazy one, has still to bring here"
            await self._report.notify()
            await asyncio.sleep(FILLED_SECONDS)
        self._record.status_text = ""

    async def recover(self, entry: OutgoingEntry) -> None:
        """Bring to its end what an earlier attempt left in the journal. Raises as `migrate`."""
        self.is_recovery = True
        self._report.again()
        await undo_leftover(self._target.pid)
        self.has_opened = True
        if "relay" not in entry.detail:  # else criu may still serve pages
            await criu_gone(entry.detail.get("criu") or {}, patience_seconds=UNWIND_SECONDS)
        give_back(str(self._directory / PROCESSORS))
        async with (
            self._channel() as channel,
            GrpcRemote(
                self._record.destination_address,
                channel,
                self._record.migration_id,
                destination_node_id=entry.detail["destination_node_id"],
            ) as remote,
        ):
            self._use(remote)
            recovery = self._coordinators.recovery(remote, entry, self.controls.options, self._report.on_phase)
            self.coordinator = recovery
            if entry.phase in _WITHOUT_ADDRESSES:
                await recovery.addresses.withdraw()  # a boot brings them back
            self._report.on_phase(entry.phase)
            if await recovery.run() is Phase.DONE:
                self.moved(recovery)
            else:
                raise why_rolled_back(self._record.migration_id, recovery.cause)

    def moved(self, coordinator: Coordinator) -> None:
        """The process runs at the destination."""
        self._belongings.forget(self.controls.options.sync)
        self._report.moved(coordinator.destination_pid, coordinator.spoken_for)
        logger.info(
            "moved migration_id=%s pid=%d destination=%s pause_ms=%.1f",
            self._record.migration_id,
            self._target.pid,
            self._record.destination_address,
            convert.seconds_of(self._record.pause) * 1000,
        )
