"""The move itself: files beforehand, rounds while the tree runs, and the last step; all while a freeze is short."""

from __future__ import annotations

from pathlib import Path

from phaul_client.client import Client
from phaul_client.config import Config
from phaul_client.guarding import guarding
from phaul_client.local import CriuLocal
from phaul_client.modes import RestoreMode
from phaul_client.remote import GrpcRemote
from phauld.costs import CostBook
from phauld.node import Node
from phauld.options import limits
from phauld.source.belongings import Belongings
from phauld.source.controls import Controls
from phauld.source.departure import Plan
from phauld.source.meter import Meter
from phauld.source.report import Report
from phauld.trees.freezer import Freezer


class Movement:
    """Of one migration; its images are in `directory`."""

    def __init__(
        self,
        node: Node,
        pid: int,
        directory: Path,
        report: Report,
        *,
        controls: Controls,
        belongings: Belongings,
        meter: Meter,
        costs: CostBook,
    ) -> None:
        self._node = node
        self._pid = pid
        self._directory = directory
        self._report = report
        self._controls = controls
        self._belongings = belongings
        self._meter = meter
        self._costs = costs

    async def run(self, local: CriuLocal, remote: GrpcRemote, plan: Plan) -> None:
        """Raises what `Client.migrate` does."""
        await self._send_files(local)
        self._directory.mkdir(parents=True, mode=0o700)
        async with guarding(local.guard):
            await self._send_tree(local, remote, plan)
        is_lazy = plan.decision.choice.restore_mode is RestoreMode.LAZY
        if is_lazy and local.pause_seconds is not None and local.dump_stats is not None:
            node_id = self._report.record.destination.node_id
            self._costs.learn(node_id, local.pause_seconds, local.dump_stats, local.image_bytes)

    async def _send_files(self, local: CriuLocal) -> None:
        async with self._belongings.telling():
            await local.cargo.send()
        record, sync = self._report.record, self._controls.options.sync
        record.status_text = f"copies files: {', '.join(sync)}" if sync else ""
        await local.cargo.copy()
        record.status_text = ""

    async def _send_tree(self, local: CriuLocal, remote: GrpcRemote, plan: Plan) -> None:
        controls = self._controls
        controls.policy.policy = plan.decision.policy
        restore_mode = plan.decision.choice.restore_mode
        costs = self._costs.to(self._report.record.destination.node_id)
        async with self._meter.watching(remote), Freezer(self._pid) as freezer:
            client = Client(
                local,
                remote,
                Config(self._pid, remote.page_socket.fileno(), self._directory),
                criu=self._node.criu,
                policy=controls.policy,
                limits=limits(controls.options, restore_mode, costs, allow_throttle=plan.can_throttle),
                on_round=self._report.on_round,
                throttle=freezer.hold_back,
                external=plan.externals,
                guard=local.guard,
            )
            controls.steer(client)
            await client.migrate()
