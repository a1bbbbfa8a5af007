"""Makes who sees a migration through at its source: from its plan, or from what an earlier attempt has journaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from phaul.v1 import migrations_pb2
from phaul_client.case import Case
from phaul_client.commit import Phase
from phaul_client.doubt import Doubt
from phaul_client.last_step import Settings
from phaul_client.local import CriuLocal
from phaul_client.postcopy import PostcopyLocal
from phaul_client.recovery import PostcopyRecovery, Recovery
from phaul_client.remote import GrpcRemote
from phaul_client.serving import Serving
from phaul_client.tree import Tree, descendants, identity, is_alive
from phauld.guarding.dump_hold import DumpGuard
from phauld.journal import OutgoingEntry, OutgoingRecord
from phauld.options import Options, dump_options
from phauld.source.belongings import Belongings
from phauld.source.decision import WITH_LAZY_PAGES
from phauld.source.departure import Plan
from phauld.source.meter import Meter
from phauld.source.source_relay import SourceRelay
from phauld.source.target import Target

OnPhase = Callable[[Phase], None]


class Coordinators:
    """Of one migration."""

    def __init__(
        self,
        record: migrations_pb2.Migration,
        target: Target,
        journal: OutgoingRecord,
        *,
        relay: SourceRelay,
        belongings: Belongings,
        meter: Meter,
        processors: Path,
        clean_up: Callable[[], Awaitable[None]],
    ) -> None:
        """`processors` is the record of `one_processor.py`."""
        self._record = record
        self._target = target
        self._journal = journal
        self._relay = relay
        self._belongings = belongings
        self._meter = meter
        self._processors = processors
        self._clean_up = clean_up

    def local(self, remote: GrpcRemote, plan: Plan, options: Options, on_phase: OnPhase) -> CriuLocal:
        """For a tree that runs here; what a recovery would need of it goes into the journal with the first phase."""
        settings = Settings(
            dump=dataclasses.replace(dump_options(self._target.pid, plan.chosen), external=plan.externals),
            cargo=self._belongings.pack(remote, plan, options),
            root=self._target.identity,
            freeze_budget_seconds=options.freeze_budget_seconds,
            guard=DumpGuard(self._processors),
        )
        self._journal.note(
            pid=self._target.pid,
            process_name=self._target.process_name,
            workload=self._record.workload,
            destination=self._record.destination_address,
            destination_node_id=self._record.destination.node_id,
            options=json_format.MessageToDict(self._record.options),
            addresses=[str(each) for each in plan.here],
            **self._belongings.for_journal,
        )
        local = self._mover(self._case(remote, _doubt(options), on_phase), plan, settings)
        self._belongings.give(local, plan, options)
        return local

    def _case(self, remote: GrpcRemote, doubt: Doubt, on_phase: OnPhase) -> Case:
        return Case(
            migration_id=self._record.migration_id,
            remote=remote,
            journal=self._journal,
            doubt=doubt,
            on_phase=on_phase,
            clean_up=self._clean_up,
        )

    def _mover(self, case: Case, plan: Plan, settings: Settings) -> CriuLocal:
        if plan.decision.mode not in WITH_LAZY_PAGES:
            return CriuLocal(case, settings)
        self._relay.agree(uses_tls=plan.decision.lazy_uses_tls, packing=plan.decision.pipe.lazy_packing)
        return PostcopyLocal(
            case,
            settings,
            start_relay=self._relay.start,
            on_progress=self._meter.on_progress,
            terms=self._relay.terms,
        )

    def recovery(self, remote: GrpcRemote, entry: OutgoingEntry, options: Options, on_phase: OnPhase) -> Recovery:
        """For a tree of which an earlier attempt may have left anything."""
        case = self._case(remote, _doubt(options, entry.detail), on_phase)
        recovery = self._recovery(case, entry.phase, entry.detail)
        self._belongings.find(recovery, entry.detail, options)
        return recovery

    def _recovery(self, case: Case, phase: Phase, detail: Mapping[str, Any]) -> Recovery:
        tree = recorded_tree(detail)
        if "relay" not in detail:
            return Recovery(case, phase, tree)
        pages = Serving(case, self._relay.find(detail), self._meter.on_progress, self._relay.terms)
        return PostcopyRecovery(case, phase, tree, pages=pages, criu=detail["criu"])


def recorded_tree(detail: Mapping[str, Any]) -> Tree:
    """What is left of the tree of a migration in the journal; every task that phaul may have stopped is marked."""
    if "tree" in detail:
        return Tree.again(detail["tree"])
    root = detail.get("root")
    if root is None or not is_alive(root):
        return Tree(())
    before = set(detail["stopped_before"])
    return Tree.again({**identity(pid), "stopped_by_us": pid not in before} for pid in descendants(root["pid"]))


def _doubt(options: Options, detail: Mapping[str, Any] | None = None) -> Doubt:
    return Doubt(
        seconds=options.in_doubt_seconds,
        event=options.doubt_event,
        has_expired=bool(detail and detail.get("doubt_expired")),
    )
