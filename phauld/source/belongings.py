"""What goes with a tree, and what is left of it here: addresses, hooks, a container's files and record, directories."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from phaul_client.addresses import Address, parse_address
from phaul_client.cargo import Cargo
from phaul_client.commit import Phase
from phaul_client.containers.baggage import Baggage
from phaul_client.containers.leaving import clear, leaving
from phaul_client.containers.links import Links
from phaul_client.coordinator import Coordinator
from phaul_client.hook_calls import Hooks
from phaul_client.hooks import Facts, Hook, Side
from phaul_client.movers import Addresses
from phaul_client.remote import GrpcRemote
from phaul_client.syncing import FileSync
from phauld.node import Node
from phauld.options import Options
from phauld.source.departure import Plan
from phauld.source.meter import PROGRESS_SECONDS
from phauld.source.report import Report
from phauld.source.target import Target
from phauld.sync_records import State
from phauld.trees import custody

logger = logging.getLogger(__name__)


class Belongings:
    """Of one migration, at its source."""

    def __init__(self, target: Target, node: Node, report: Report) -> None:
        self._target = target
        self._node = node
        self._report = report
        self._baggage: Baggage | None = None
        self._leaving: Mapping[str, Any] | None = None

    def pack(self, remote: GrpcRemote, plan: Plan, options: Options) -> Cargo:
        """Its files: a log, a container's, directories."""
        found, sync = self._target.container, None
        if found is not None:
            self._leaving = leaving(found, tuple(link.outer for link in plan.container.links))
            log = found.podman.log_path if found.podman is not None else None
            self._baggage = Baggage(found.rootfs, self._target.pid, remote, log)
        if options.sync:
            sync = FileSync(
                remote,
                options.sync,
                self._target.pid,
                in_place=not options.sync_overwrite,
                bandwidth_bytes_per_second=options.bandwidth_limit_bytes_per_second,
                after_dump=plan.chosen.link_remap,
            )
        return Cargo(remote, self._target.carried, baggage=self._baggage, sync=sync)

    @property
    def for_journal(self) -> dict[str, Any]:
        """What `find` needs after a restart."""
        return {"container": self._leaving} if self._leaving is not None else {}

    def give(self, local: Coordinator, plan: Plan, options: Options) -> None:
        """Everything else that goes along, to the one who moves the tree."""
        self._give(local, plan.here, options.hooks, is_recovered=False)

    def find(self, recovery: Coordinator, detail: Mapping[str, Any], options: Options) -> None:
        """The same after a restart, from the journal."""
        self._leaving = detail.get("container")
        addresses = [parse_address(each) for each in detail.get("addresses", ())]
        self._give(recovery, addresses, options.hooks, is_recovered=True)

    @contextlib.asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Keep the record true while files are sent."""
        task = asyncio.create_task(self._tell())
        try:
            yield
        finally:
            task.cancel()
            self._report.record.status_text = ""

    async def unpack(self, cargo: Cargo) -> None:
        """Nothing more is sent; what was is on record."""
        await cargo.aclose()
        del self._report.record.synced[:]
        self._report.record.synced.extend(cargo.report())

    async def part(self, coordinator: Coordinator) -> None:
        """The tree runs, here or there, for good: whoever has still to be told is."""
        if coordinator.phase is not Phase.DONE:
            return await coordinator.hooks.abort()
        await self._end_container()
        for hook in await coordinator.hooks.commit_again():
            self._report.warn(
                "hook-failed",
                hook,
                "it was told of the commit several times and failed: what it does at the source is not done",
                "see phauld's log here, and do by hand what it does",
            )

    def stay(self) -> None:
        """The journal says that it runs on here, for good: whoever restarts it may do so again."""
        if self._target.workload is not None:
            try:
                custody.stays(self._target.workload, self._report.record.migration_id)
            except OSError as exc:  # a look at the journal does it later
                logger.error("not given back migration_id=%s error=%s", self._report.record.migration_id, exc)

    def forget(self, sync: Sequence[str]) -> None:
        """It runs there: its workload here, and the directories that moved along, are what it has left behind."""
        record = self._report.record
        if self._target.workload is not None:
            try:
                custody.mark_moved(self._target.workload, record.destination_address, record.migration_id)
            except OSError as exc:  # it moved all the same; `phaul status` knows
                logger.error("not marked as moved migration_id=%s error=%s", record.migration_id, exc)
        for each in sync:
            try:
                node = record.destination.node_name or record.destination_address
                self._node.sync.put(each, State.LEFT, record.migration_id, node)
            except OSError as exc:
                logger.error("sync not on record migration_id=%s error=%s", record.migration_id, exc)

    async def _tell(self) -> None:
        while self._baggage is not None:
            self._report.record.status_text = f"sends the root file system: {self._baggage.bytes >> 20} MiB"
            await self._report.notify()
            await asyncio.sleep(PROGRESS_SECONDS)

    def _give(
        self, coordinator: Coordinator, addresses: Sequence[Address], hooks: Sequence[Hook], *, is_recovered: bool
    ) -> None:
        links = self._leaving["links"] if self._leaving is not None else None
        coordinator.addresses = Links(addresses, links) if links is not None else Addresses(addresses)
        record = self._report.record
        facts = Facts(
            migration_id=record.migration_id,
            side=Side.SOURCE,
            node_name=self._node.name,
            peer=record.destination_address,
            workload=record.workload,
            addresses=tuple(map(str, addresses)),
        )
        coordinator.hooks = Hooks(
            self._node.hooks, hooks, facts, pid=lambda: self._target.pid, is_recovered=is_recovered
        )

    async def _end_container(self) -> None:
        """It runs elsewhere: its runtime here is told."""
        if self._leaving is None:
            return
        if why := await clear(self._leaving, self._node.containers_dir):
            self._report.warn(
                "container-left",
                self._report.record.workload,
                f"it has moved, but its record here stays: {why}",
                f"{self._leaving['runtime']} delete {self._leaving['id']}",
            )
