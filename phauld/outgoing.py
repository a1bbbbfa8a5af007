"""One outgoing migration: preflight, session, rounds, last step, and a record that can be watched.

It is the library's `Client` with `CriuLocal` and `GrpcRemote`. The invariant: whatever ends it, the record says where
the process runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import shutil
import socket
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf import json_format

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client import commit
from phaul_client.addresses import Address, parse_address
from phaul_client.client import Client
from phaul_client.commit import Event, Phase
from phaul_client.config import Config
from phaul_client.containers.baggage import Baggage
from phaul_client.containers.leaving import clear, leaving
from phaul_client.containers.links import Links
from phaul_client.coordinator import Coordinator, Recovery
from phaul_client.doubt import Doubt
from phaul_client.errors import (
    InvalidRequest,
    PeerError,
    PeerUnavailable,
    PhaseError,
    PhaulError,
    PreflightRefused,
)
from phaul_client.hook_calls import Hooks
from phaul_client.hooks import Facts, Side
from phaul_client.local import LAST_DUMP, CriuLocal, Settings, unlock_network
from phaul_client.modes import RestoreMode
from phaul_client.movers import Addresses
from phaul_client.pipe import LinkTerms
from phaul_client.pipe_choice import Compression
from phaul_client.policy import StopCopyPolicy, Switchable
from phaul_client.postcopy import PostcopyLocal, PostcopyRecovery, RelayGone
from phaul_client.remote import GrpcRemote
from phaul_client.status import reason_of
from phaul_client.syncing import FileSync
from phaul_client.tree import Tree, descendants, identity, is_alive, wait_until_gone, waits_for_pages
from phaul_criu.child import finish
from phauld import convert
from phauld.costs import CostBook
from phauld.decision import WITH_LAZY_PAGES
from phauld.departure import Departure, Plan
from phauld.endings import Attempt, ending, why_rolled_back
from phauld.freezer import Freezer, undo_leftover
from phauld.guard import open_channel
from phauld.journal import OutgoingEntry, OutgoingRecord
from phauld.meter import PROGRESS_SECONDS, Meter
from phauld.node import Node
from phauld.observer import NOBODY, Observer
from phauld.options import dump_options, limits, parse_options
from phauld.relays import Relay
from phauld.report import Report
from phauld.sync_records import State
from phauld.target import Target
from phauld.workloads import Workloads

logger = logging.getLogger(__name__)

UNWIND_SECONDS: Final = 10.0
FILLED_SECONDS: Final = 0.1
AGAIN_SECONDS: Final = 1.0
ANSWERED_SECONDS: Final = 3.0
#: Here the tree's addresses are the destination's, or may be.
_WITHOUT_ADDRESSES: Final = frozenset({*commit.IN_DOUBT, Phase.FILLING, Phase.CONFIRMED})
_ROUNDS: Final = (Phase.PREFLIGHT, Phase.OPENING, Phase.ITERATING)
RESOLUTIONS: Final = {
    migrations_pb2.RESOLUTION_KILL: Event.RESOLVED_KILL,
    migrations_pb2.RESOLUTION_RESUME: Event.RESOLVED_RESUME,
}


class Outgoing:
    """One migration from its start to its end. `run` it once; `record` is what it is up to now."""

    def __init__(
        self,
        migration_id: str,
        target: Target,
        destination: str,
        options: types_pb2.Options,
        *,
        node: Node,
        workloads: Workloads,
        directory: Path,
        journal: OutgoingRecord,
        costs: CostBook,
        observer: Observer = NOBODY,
    ) -> None:
        self._target = target
        self._options = parse_options(options)
        self._node = node
        self._workloads = workloads
        self._directory = directory
        self._coordinator: Coordinator | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False
        self._relay: Relay | None = None
        self._lazy_uses_tls = False  # the relays
        self._lazy_packing: Compression | None = None
        self._remote: GrpcRemote | None = None
        self._client: Client | None = None
        self._policy = Switchable(StopCopyPolicy())  # of the mode, once that is chosen
        self._is_stopping = False
        self._is_left = False  # its end is a recovery's: soon, or when phauld is started again
        self._is_recovery = False
        self._has_opened = False  # from then on it is rolled back, not refused
        self._journal = journal
        self._costs = costs
        self._observer = observer
        self._baggage: Baggage | None = None  # its files
        self._leaving: dict[str, Any] | None = None  # what is left of it here, for the journal
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
        self._meter = Meter(self._report)
        self._departure = Departure(node, target, self.record)

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

    async def check(self) -> None:
        """Only the preflight; the record then has what it found. Raises `PeerError`."""
        async with (
            self._channel() as channel,
            GrpcRemote(self.record.destination_address, channel, self.migration_id) as remote,
        ):
            try:
                await self._departure.plan(remote, self._options)
            except PeerUnavailable as exc:
                self._report.fail("peer-unreachable", self.record.destination_address, exc.message, exc.remedy)
            except PreflightRefused:
                pass  # the record has the problems
        self._report.note_total()

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
        phase = self._coordinator.phase if self._coordinator is not None else Phase.PREFLIGHT
        goal_seconds = convert.seconds_of(wish.downtime_goal)
        if self.is_over or (phase not in _ROUNDS and (wish.switch_to_post_copy or goal_seconds)):
            raise PhaseError(phase, "UPDATE_MIGRATION")
        if goal_seconds < 0:
            raise InvalidRequest("downtime_goal is negative")
        if wish.switch_to_post_copy:
            self._switch()
        if goal_seconds:
            self.record.options.downtime_goal.CopyFrom(wish.downtime_goal)
        if wish.HasField("bandwidth_limit_bytes_per_second"):
            self.record.options.bandwidth_limit_bytes_per_second = wish.bandwidth_limit_bytes_per_second
        self._options = parse_options(self.record.options)
        await self._apply_options()
        await self._report.notify()

    def _switch(self) -> None:
        if self.record.mode not in (types_pb2.MODE_HYBRID, types_pb2.MODE_POST_COPY):
            raise PhaulError(
                "it was not prepared for post-copy", reason="UNSUPPORTED", remedy="start it with --mode hybrid"
            )
        self._policy.is_asked = True

    async def _apply_options(self) -> None:
        limit = self._options.bandwidth_limit_bytes_per_second
        if self._remote is not None:
            self._remote.limit(limit)
        if self._relay is not None:
            with contextlib.suppress(RelayGone):
                await self._relay.limit(limit)
        if self._client is not None:
            self._client.limits = dataclasses.replace(
                self._client.limits,
                downtime_goal_seconds=self._options.downtime_goal_seconds,
                bandwidth_limit_bytes_per_second=limit or None,
            )

    def _channel(self) -> grpc.aio.Channel:
        interceptors = self._observer.client_interceptors(self.migration_id)
        return open_channel(self.record.destination_address, interceptors, self._node.guard)

    def _use(self, remote: GrpcRemote) -> None:
        self._remote = remote
        remote.limit(self._options.bandwidth_limit_bytes_per_second)
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
            phase=self._coordinator.phase if self._coordinator is not None else None,
            is_recovery=self._is_recovery,
            is_cancelled=self._cancelled,
            has_opened=self._has_opened,
            pipe_failure=self._remote.pipe_failure if self._remote is not None else None,
            deadline_seconds=self._options.deadline_seconds,
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
        self._report.over()
        if attempt.phase not in (None, Phase.PREFLIGHT):
            with contextlib.suppress(OSError, PhaulError):
                await self._journal.report(json_format.MessageToDict(self.record))
        self._report.told()
        self._coordinator = None  # its errors hold on to the connection that they are of
        await self._report.notify()

    async def _clean_up(self) -> None:
        if self._relay is not None:
            await self._relay.wait()  # it ends with its criu
        await self._end_container()
        await self._end_hooks()
        # For a tree that criu did not let go, or whose phauld was killed; the images alone know the lock's name.
        await asyncio.to_thread(unlock_network, self._directory / LAST_DUMP)
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def _tell_of_files(self) -> None:
        while self._baggage is not None:
            self.record.status_text = f"sends the root file system: {self._baggage.bytes >> 20} MiB"
            await self._report.notify()
            await asyncio.sleep(PROGRESS_SECONDS)

    def _addresses(self, addresses: Sequence[Address]) -> Addresses:
        return Links(addresses, self._leaving["links"]) if self._leaving is not None else Addresses(addresses)

    async def _end_container(self) -> None:
        """It runs elsewhere: its runtime here is told."""
        if self._leaving is None or self._coordinator is None or self._coordinator.phase is not Phase.DONE:
            return
        if why := await clear(self._leaving, self._node.containers_dir):
            self._report.warn(
                "container-left",
                self.record.workload,
                f"it has moved, but its record here stays: {why}",
                f"{self._leaving['runtime']} delete {self._leaving['id']}",
            )

    def _hooks(self, addresses: Addresses, *, is_recovered: bool = False) -> Hooks:
        facts = Facts(
            migration_id=self.migration_id,
            side=Side.SOURCE,
            node_name=self._node.name,
            peer=self.record.destination_address,
            workload=self.record.workload,
            addresses=tuple(map(str, addresses.addresses)),
        )
        return Hooks(
            self._node.hooks, self._options.hooks, facts, pid=lambda: self._target.pid, is_recovered=is_recovered
        )

    async def _end_hooks(self) -> None:
        """The migration is over: what they have still to be told."""
        if self._coordinator is None:
            return
        if self._coordinator.phase is not Phase.DONE:
            return await self._coordinator.hooks.abort()
        for hook in await self._coordinator.hooks.commit_again():
            self._report.warn(
                "hook-failed",
                hook,
                "it was told of the commit several times and failed: what it does at the source is not done",
                "see phauld's log here, and do by hand what it does",
            )

    async def _migrate(self) -> None:
        async with (
            self._channel() as channel,
            GrpcRemote(self.record.destination_address, channel, self.migration_id) as remote,
            asyncio.timeout(self._options.deadline_seconds) as deadline,
        ):
            self._use(remote)
            await self._until_filled()
            plan = await self._departure.plan(remote, self._options)
            local = self._make_local(remote, deadline, plan)
            try:
                await local.fire(Event.PREFLIGHT_PASSED)
                await local.hooks.prepare()
                await self._departure.open(remote, plan)
                self._has_opened = True
                await local.fire(Event.SESSION_OPENED)
                await self._move(local, remote, plan)
            except (Exception, asyncio.CancelledError) as exc:
                await local.unwind(exc)
            finally:
                await self._end_files(local)
                self._report.on_last_step(local)
            self._moved(local)

    async def _end_files(self, local: CriuLocal) -> None:
        if local.files is not None:
            await local.files.aclose()
            del self.record.synced[:]
            self.record.synced.extend(local.files.report())

    async def _until_filled(self) -> None:
        """Wait for the pages that the move to here has still to bring."""
        while await asyncio.to_thread(waits_for_pages, self._target.pid):
            self.record.status_text = "waits for the memory that its last move, a lazy one, has still to bring here"
            await self._report.notify()
            await asyncio.sleep(FILLED_SECONDS)
        self.record.status_text = ""

    def _make_local(self, remote: GrpcRemote, deadline: asyncio.Timeout, plan: Plan) -> CriuLocal:
        def on_phase(phase: Phase) -> None:
            if phase is Phase.COMMITTED and not deadline.expired():  # else it is left in doubt, to a recovery
                deadline.reschedule(None)
            self._report.on_phase(phase)

        self._journal.note(
            pid=self._target.pid,
            process_name=self._target.process_name,
            workload=self.record.workload,
            destination=self.record.destination_address,
            destination_node_id=self.record.destination.node_id,
            options=json_format.MessageToDict(self.record.options),
            addresses=[str(each) for each in plan.here],
        )
        container = self._target.container
        if container is not None:
            log = container.podman.log_path if container.podman is not None else None
            self._baggage = Baggage(container.rootfs, self._target.pid, remote, log)
            self._leaving = leaving(container, tuple(link.outer for link in plan.container.links))
            self._journal.note(container=self._leaving)
        settings = Settings(
            dump=dataclasses.replace(dump_options(self._target.pid, plan.chosen), external=plan.externals),
            baggage=self._baggage,
            root=self._target.identity,
            carried=self._target.carried,
            freeze_budget_seconds=self._options.freeze_budget_seconds,
            doubt=self._doubt(),
        )
        local: CriuLocal
        self._lazy_uses_tls, self._lazy_packing = plan.decision.lazy_uses_tls, plan.decision.pipe.lazy_packing
        if plan.decision.mode in WITH_LAZY_PAGES:
            local = PostcopyLocal(
                self.migration_id,
                remote,
                self._journal,
                settings,
                start_relay=self._start_relay,
                on_progress=self._meter.on_progress,
                terms=self._link_terms,
                on_phase=on_phase,
                clean_up=self._clean_up,
            )
        else:
            local = CriuLocal(
                self.migration_id, remote, self._journal, settings, on_phase=on_phase, clean_up=self._clean_up
            )
        local.addresses = self._addresses(plan.here)
        local.hooks = self._hooks(local.addresses)
        if self._options.sync:
            local.files = FileSync(
                remote,
                self._options.sync,
                self._target.pid,
                in_place=not self._options.sync_overwrite,
                bandwidth_bytes_per_second=self._options.bandwidth_limit_bytes_per_second,
                after_dump=settings.dump.link_remap,
            )
        self._coordinator = local
        return local

    async def _start_relay(self) -> tuple[Relay, socket.socket]:
        node = self._node
        self._relay, sock = await Relay.serve(self._directory / "relay", node.criu.binary, node.criu_version)
        self._journal.note(lazy_tls=self._lazy_uses_tls, lazy_packing=self._lazy_packing)
        return self._relay, sock

    def _link_terms(self) -> LinkTerms:
        """For the next connection of the relays. Raises `InvalidRequest` while the policy cannot be read."""
        guard, tls = self._node.guard, None
        if guard is not None and self._lazy_uses_tls:
            tls = guard.pipe_tls_to(self.record.destination_address)
        return LinkTerms(tls=tls, packing=self._lazy_packing)

    async def _recover(self, entry: OutgoingEntry) -> None:
        self._is_recovery = True
        self._report.again()
        await undo_leftover(self._target.pid)
        self._has_opened = True
        if "relay" not in entry.detail:  # else criu may still serve pages
            await wait_or_kill(entry.detail.get("criu"))
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
            recovery = self._make_recovery(remote, entry)
            self._coordinator = recovery
            self._leaving = entry.detail.get("container")
            recovery.addresses = self._addresses([parse_address(each) for each in entry.detail.get("addresses", ())])
            recovery.hooks = self._hooks(recovery.addresses, is_recovered=True)
            if entry.phase in _WITHOUT_ADDRESSES:
                await recovery.addresses.withdraw()  # a boot brings them back
            self._report.on_phase(entry.phase)
            if await recovery.run() is Phase.DONE:
                self._moved(recovery)
            else:
                raise why_rolled_back(self.migration_id, recovery.cause)

    def _make_recovery(self, remote: GrpcRemote, entry: OutgoingEntry) -> Recovery:
        tree = recorded_tree(entry.detail)
        if "relay" not in entry.detail:
            return Recovery(
                self.migration_id,
                remote,
                self._journal,
                phase=entry.phase,
                tree=tree,
                doubt=self._doubt(entry.detail),
                on_phase=self._report.on_phase,
                clean_up=self._clean_up,
            )
        self._relay = Relay(self._directory / "relay", entry.detail["relay"])
        self._lazy_uses_tls = bool(entry.detail.get("lazy_tls"))
        self._lazy_packing = entry.detail.get("lazy_packing")
        return PostcopyRecovery(
            self.migration_id,
            remote,
            self._journal,
            phase=entry.phase,
            tree=tree,
            relay=self._relay,
            criu=entry.detail["criu"],
            doubt=self._doubt(entry.detail),
            on_progress=self._meter.on_progress,
            terms=self._link_terms,
            on_phase=self._report.on_phase,
            clean_up=self._clean_up,
        )

    def _doubt(self, detail: Mapping[str, Any] | None = None) -> Doubt:
        return Doubt(
            seconds=self._options.in_doubt_seconds,
            event=self._options.doubt_event,
            has_expired=bool(detail and detail.get("doubt_expired")),
        )

    async def _move(self, local: CriuLocal, remote: GrpcRemote, plan: Plan) -> None:
        telling = asyncio.create_task(self._tell_of_files())
        try:
            await local.carry_beforehand()
        finally:
            telling.cancel()
            self.record.status_text = ""
        self.record.status_text = f"copies files: {', '.join(self._options.sync)}" if self._options.sync else ""
        await local.copy_files()
        self.record.status_text = ""
        self._directory.mkdir(parents=True, mode=0o700)
        self._policy.policy = plan.decision.policy
        config = Config(self._target.pid, remote.page_socket.fileno(), self._directory)
        restore_mode = plan.decision.choice.restore_mode
        costs = self._costs.to(self.record.destination.node_id)
        async with self._meter.watching(remote), Freezer(self._target.pid) as freezer:
            self._client = Client(
                local,
                remote,
                config,
                criu=self._node.criu,
                policy=self._policy,
                limits=limits(self._options, restore_mode, costs, allow_throttle=plan.can_throttle),
                on_round=self._report.on_round,
                throttle=freezer.hold_back,
                external=plan.externals,
            )
            await self._client.migrate()
        if restore_mode is RestoreMode.LAZY and local.pause_seconds is not None and local.dump_stats is not None:
            node_id = self.record.destination.node_id
            self._costs.learn(node_id, local.pause_seconds, local.dump_stats, local.image_bytes)

    def _moved(self, coordinator: Coordinator) -> None:
        if self._target.workload is not None:
            try:
                self._workloads.mark_moved(self._target.workload, self.record.destination_address)
            except OSError as exc:  # it moved all the same; `phaul status` knows
                logger.error("not marked as moved migration_id=%s error=%s", self.migration_id, exc)
        self._forget_directories()
        self._report.moved(coordinator.destination_pid, coordinator.spoken_for)
        logger.info(
            "moved migration_id=%s pid=%d destination=%s pause_ms=%.1f",
            self.migration_id,
            self._target.pid,
            self.record.destination_address,
            convert.seconds_of(self.record.pause) * 1000,
        )

    def _forget_directories(self) -> None:
        """What moved along is there now; what is left here is an older copy."""
        for each in self._options.sync:
            try:
                node = self.record.destination.node_name or self.record.destination_address
                self._node.sync.put(each, State.LEFT, self.migration_id, node)
            except OSError as exc:
                logger.error("sync not on record migration_id=%s error=%s", self.migration_id, exc)


async def wait_or_kill(process: Mapping[str, Any] | None) -> None:
    """An earlier phauld's criu has lost its socket and unwinds; one that does not is killed."""
    if process is None or not is_alive(process):
        return
    try:
        async with asyncio.timeout(UNWIND_SECONDS):
            await wait_until_gone(process["pid"])
    except TimeoutError:
        with Tree.again([{**process, "stopped_by_us": False}]) as criu:
            await criu.kill()


def recorded_tree(detail: Mapping[str, Any]) -> Tree:
    """What is left of the tree of a migration in the journal; every task that phaul may have stopped is marked."""
    if "tree" in detail:
        return Tree.again(detail["tree"])
    root = detail.get("root")
    if root is None or not is_alive(root):
        return Tree(())
    before = set(detail["stopped_before"])
    return Tree.again({**identity(pid), "stopped_by_us": pid not in before} for pid in descendants(root["pid"]))
