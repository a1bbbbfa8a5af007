"""One outgoing migration, attempt after attempt until it is over, and a record that can be watched.

The first attempt is a departure and a movement; those that may follow, here or after a restart, are recoveries. The
invariant: whatever ends it, the record says where the process runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf import json_format

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client import commit
from phaul_client.commit import Event, Phase
from phaul_client.coordinator import Coordinator
from phaul_client.errors import PeerError, PeerUnavailable, PhaulError, PreflightRefused
from phaul_client.last_step import LAST_DUMP
from phaul_client.local import CriuLocal
from phaul_client.remote import GrpcRemote
from phaul_client.serving import criu_gone
from phaul_client.status import reason_of
from phaul_client.tree import waits_for_pages
from phaul_client.tree_lock import unlock_network
from phaul_criu.child import finish
from phauld import convert
from phauld.belongings import Belongings
from phauld.controls import Controls
from phauld.coordinators import Coordinators
from phauld.costs import CostBook
from phauld.departure import Departure
from phauld.endings import Attempt, ending, why_rolled_back
from phauld.freezer import undo_leftover
from phauld.guard import open_channel
from phauld.journal import OutgoingEntry, OutgoingRecord
from phauld.meter import Meter
from phauld.movement import Movement
from phauld.node import Node
from phauld.observer import NOBODY, Observer
from phauld.report import Report
from phauld.source_relay import SourceRelay
from phauld.target import Target

logger = logging.getLogger(__name__)

UNWIND_SECONDS: Final = 10.0  #: for an earlier phauld's criu, which has lost its socket
FILLED_SECONDS: Final = 0.1
AGAIN_SECONDS: Final = 1.0
ANSWERED_SECONDS: Final = 3.0
#: Here the tree's addresses are the destination's, or may be.
_WITHOUT_ADDRESSES: Final = frozenset({*commit.IN_DOUBT, Phase.FILLING, Phase.CONFIRMED})
RESOLUTIONS: Final = {
    migrations_pb2.RESOLUTION_KILL: Event.RESOLVED_KILL,
    migrations_pb2.RESOLUTION_RESUME: Event.RESOLVED_RESUME,
}


class Outgoing:
    """One migration from its start to its end. `start` or `resume` it once; `record` is what it is up to now."""

    def __init__(
        self,
        migration_id: str,
        target: Target,
        destination: str,
        options: types_pb2.Options,
        *,
        node: Node,
        directory: Path,
        journal: OutgoingRecord,
        costs: CostBook,
        observer: Observer = NOBODY,
    ) -> None:
        self._target = target
        self._node = node
        self._directory = directory
        self._coordinator: Coordinator | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False
        self._remote: GrpcRemote | None = None
        self._is_stopping = False
        self._is_left = False  # its end is a recovery's: soon, or when phauld is started again
        self._is_recovery = False
        self._has_opened = False  # from then on it is rolled back, not refused
        self._journal = journal
        self._observer = observer
        self.record = migrations_pb2.Migration(
            migration_id=migration_id,
            pid=target.pid,
            workload=target.name,
            process_name=target.process_name,
            source=node.info(),
            destination_address=destination,
            options=options,
        )
        self._report = Report(self.record, observer)
        self._meter = meter = Meter(self._report)
        self._relay = SourceRelay(node, destination, directory / "relay", journal)
        self._controls = Controls(self.record, self._relay)
        self._departure = Departure(node, target, self.record)
        self._belongings = Belongings(target, node, self._report)
        self._coordinators = Coordinators(
            self.record,
            target,
            journal,
            relay=self._relay,
            belongings=self._belongings,
            meter=meter,
            clean_up=self._clean_up,
        )
        self._movement = Movement(
            node,
            target.pid,
            directory,
            self._report,
            controls=self._controls,
            belongings=self._belongings,
            meter=meter,
            costs=costs,
        )

    @property
    def migration_id(self) -> str:
        return self.record.migration_id

    @property
    def is_over(self) -> bool:
        return self._report.is_over

    def start(self) -> None:
        """Move the process."""
        self._report.begun()
        self._task = asyncio.create_task(self._see_through(self._migrate()), name=f"migration-{self.migration_id}")

    def resume(self, entry: OutgoingEntry) -> None:
        """Bring to its end what an earlier phauld left in the journal."""
        self._report.begun()
        self._task = asyncio.create_task(self._see_through(self._recover(entry)), name=f"recovery-{self.migration_id}")

    async def check(self) -> types_pb2.TreeFacts | None:
        """Only the preflight: the tree; the record then has what else it found. Raises `PeerError`."""
        async with (
            self._channel() as channel,
            GrpcRemote(self.record.destination_address, channel, self.migration_id) as remote,
        ):
            try:
                await self._departure.plan(remote, self._controls.options)
            except PeerUnavailable as exc:
                self._report.fail("peer-unreachable", self.record.destination_address, exc.message, exc.remedy)
            except PreflightRefused:
                pass  # the record has the problems
        self._report.note_total()
        return self._departure.tree

    async def wait(self) -> None:
        """Wait until it is over."""
        assert self._task is not None
        await asyncio.wait([self._task])

    async def changed(self, timeout_seconds: float) -> None:
        """Wait for a change of the record, but no longer than that."""
        await self._report.changed(timeout_seconds)

    def cancel(self) -> bool:
        """Stop and let the process run on here; `False` when it is too late."""
        if self.is_over or self._task is None:
            return False
        local = self._coordinator
        if isinstance(local, CriuLocal) and local.is_dumping:
            return local.cancel()
        if local is not None and local.phase not in commit.CANCELLABLE:
            return False
        self._cancelled = True
        self._task.cancel()
        return True

    async def update(self, wish: migrations_pb2.UpdateMigrationRequest) -> None:
        """Change it under way. Raises `PhaseError`, `InvalidRequest`, and `PhaulError` UNSUPPORTED; then nothing is."""
        await self._controls.update(wish, self._phase or Phase.PREFLIGHT)
        await self._report.notify()

    @property
    def _phase(self) -> Phase | None:
        """`None`: it has not come so far as to have one."""
        return self._coordinator.phase if self._coordinator is not None else None

    def _channel(self) -> grpc.aio.Channel:
        interceptors = self._observer.client_interceptors(self.migration_id)
        return open_channel(self.record.destination_address, interceptors, self._node.guard)

    def _use(self, remote: GrpcRemote) -> None:
        self._remote = remote
        self._controls.reach(remote)
        remote.on_lost = self._lose_destination

    def _lose_destination(self, error: PeerError) -> None:
        local = self._coordinator
        if isinstance(local, CriuLocal) and local.lose_destination(error) and not local.is_dumping:
            assert self._task is not None
            self._task.cancel()  # a round waits, perhaps for ever, for a connection that is dead

    async def resolve(self, request: migrations_pb2.ResolveRequest) -> bool:
        """An operator's answer to a doubt, seen to its end; `False` when there is none, or nobody to hear it.

        Raises `PhaulError` if the destination answers after all, and does not end it: then it decides.
        """
        if self._is_left or self._coordinator is None or self._task is None:
            return False
        operator = f"an operator ({request.reason})" if request.reason else "an operator"
        answer = self._coordinator.resolve(RESOLUTIONS[request.resolution], operator)
        if answer is None:
            return False
        self.record.resolution = request.resolution
        self._journal.note(resolution=migrations_pb2.Resolution.Name(request.resolution), reason=request.reason)
        answer.add_done_callback(lambda _: self.record.ClearField("resolution"))
        ends: set[asyncio.Future[Any]] = {self._task, answer}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            await asyncio.wait({self._task}, timeout=ANSWERED_SECONDS)
            if not self.is_over:
                raise PhaulError(
                    f"the destination answers for itself ({answer.result()}): it decides",
                    reason="WRONG_PHASE",
                    remedy=f"phaul status {self.migration_id}",
                )
        return True

    async def stop(self) -> None:
        """phauld stops: cancel what can be cancelled; what is in doubt stays so, in the journal."""
        self._is_stopping = True
        if self._task is not None and not self._task.done():
            if not self.cancel():
                self._task.cancel()
            await asyncio.wait([self._task])

    async def _see_through(self, work: Coroutine[None, None, None]) -> None:
        """To the end, unless phauld stops: what failed in doubt goes on from the journal, as after a restart."""
        await self._run(work)
        while self._is_left and not self._is_stopping:
            await asyncio.sleep(AGAIN_SECONDS)
            try:
                entry = await self._journal.entry()
            except OSError as exc:
                logger.error("journal not read migration_id=%s error=%s", self.migration_id, exc)
                continue
            assert entry is not None  # it was in doubt, so it is on record
            await self._run(self._recover(entry))

    async def _run(self, work: Coroutine[None, None, None]) -> None:
        self._is_left = False
        try:
            await work
        except (Exception, asyncio.CancelledError) as exc:
            local = self._coordinator
            if local is None or local.phase is not Phase.DONE:
                self._ended_badly(exc)
            elif self.record.phase != types_pb2.MIGRATION_PHASE_DONE:
                logger.warning("moved, but then migration_id=%s error=%r", self.migration_id, exc)
                self._moved(local)
        finally:
            await finish(self._finish())

    @property
    def _attempt(self) -> Attempt:
        return Attempt(
            migration_id=self.migration_id,
            phase=self._phase,
            is_recovery=self._is_recovery,
            is_cancelled=self._cancelled,
            has_opened=self._has_opened,
            pipe_failure=self._remote.pipe_failure if self._remote is not None else None,
            deadline_seconds=self._controls.options.deadline_seconds,
        )

    def _ended_badly(self, error: BaseException) -> None:
        end = ending(self._attempt, error)
        if end is None:
            logger.warning("left to a recovery migration_id=%s error=%r", self.migration_id, error)
            return
        self._report.ended(end)
        logger.warning(
            "ended migration_id=%s phase=%s reason=%s error=%s",
            self.migration_id,
            types_pb2.MigrationPhase.Name(end.phase),
            reason_of(end.error),
            end.error,
            exc_info=error if reason_of(end.error) == "INTERNAL" else None,
        )

    async def _finish(self) -> None:
        attempt = self._attempt
        if attempt.is_left:
            self._is_left = True
            return
        if attempt.phase is Phase.ROLLED_BACK:
            self._belongings.stay()
        self._report.over()
        if attempt.phase not in (None, Phase.PREFLIGHT):
            with contextlib.suppress(OSError, PhaulError):
                await self._journal.report(json_format.MessageToDict(self.record))
        self._report.told()
        self._coordinator = None  # its errors hold on to the connection that they are of
        await self._report.notify()

    async def _clean_up(self) -> None:
        assert self._coordinator is not None
        await self._relay.wait()
        await self._belongings.part(self._coordinator)
        # For a tree that criu did not let go, or whose phauld was killed; the images alone know the lock's name.
        await asyncio.to_thread(unlock_network, self._directory / LAST_DUMP)
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def _migrate(self) -> None:
        async with (
            self._channel() as channel,
            GrpcRemote(self.record.destination_address, channel, self.migration_id) as remote,
            asyncio.timeout(self._controls.options.deadline_seconds) as deadline,
        ):

            def on_phase(phase: Phase) -> None:
                if phase is Phase.COMMITTED and not deadline.expired():  # else it is left in doubt, to a recovery
                    deadline.reschedule(None)
                self._meter.look()
                self._report.on_phase(phase)

            self._use(remote)
            await self._until_filled()
            plan = await self._departure.plan(remote, self._controls.options)
            local = self._coordinators.local(remote, plan, self._controls.options, on_phase)
            self._coordinator = local
            try:
                await local.fire(Event.PREFLIGHT_PASSED)
                await local.hooks.prepare()
                await self._departure.open(remote, plan)
                self._has_opened = True
                await local.fire(Event.SESSION_OPENED)
                await self._movement.run(local, remote, plan)
            except (Exception, asyncio.CancelledError) as exc:
                await local.unwind(exc)
            finally:
                await self._belongings.unpack(local.cargo)
                self._report.on_last_step(local)
            self._moved(local)

    async def _until_filled(self) -> None:
        """Wait for the pages that the move to here has still to bring."""
        while await asyncio.to_thread(waits_for_pages, self._target.pid):
            self.record.status_text = "waits for the memory that its last move, a lazy one, has still to bring here"
            await self._report.notify()
            await asyncio.sleep(FILLED_SECONDS)
        self.record.status_text = ""

    async def _recover(self, entry: OutgoingEntry) -> None:
        self._is_recovery = True
        self._report.again()
        await undo_leftover(self._target.pid)
        self._has_opened = True
        if "relay" not in entry.detail:  # else criu may still serve pages
            await criu_gone(entry.detail.get("criu") or {}, patience_seconds=UNWIND_SECONDS)
        async with (
            self._channel() as channel,
            GrpcRemote(
                self.record.destination_address,
                channel,
                self.migration_id,
                destination_node_id=entry.detail["destination_node_id"],
            ) as remote,
        ):
            self._use(remote)
            recovery = self._coordinators.recovery(remote, entry, self._controls.options, self._report.on_phase)
            self._coordinator = recovery
            if entry.phase in _WITHOUT_ADDRESSES:
                await recovery.addresses.withdraw()  # a boot brings them back
            self._report.on_phase(entry.phase)
            if await recovery.run() is Phase.DONE:
                self._moved(recovery)
            else:
                raise why_rolled_back(self.migration_id, recovery.cause)

    def _moved(self, coordinator: Coordinator) -> None:
        self._belongings.forget(self._controls.options.sync)
        self._report.moved(coordinator.destination_pid, coordinator.spoken_for)
        logger.info(
            "moved migration_id=%s pid=%d destination=%s pause_ms=%.1f",
            self.migration_id,
            self._target.pid,
            self.record.destination_address,
            convert.seconds_of(self.record.pause) * 1000,
        )
