"""Before a tree moves: both halves of the preflight, the decision, and the session that is opened for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul.v1 import migrations_pb2, remote_pb2, types_pb2
from phaul_client.addresses import Address
from phaul_client.compatibility import check_peer
from phaul_client.containers.inspect import describe
from phaul_client.containers.mounts import dump_externals
from phaul_client.containers.podman import make_archive
from phaul_client.errors import PhaulError
from phaul_client.forked_memory import ForkedMemory, forked_memory
from phaul_client.modes import NodeCapabilities, Wish
from phaul_client.pipe_choice import is_loopback
from phaul_client.preflight import ChosenOptions
from phaul_client.preflight.address_space_model import AddressSpace
from phaul_client.remote import GrpcRemote
from phauld import convert
from phauld.containers import podman_runtime
from phauld.containers.checks import container_problem
from phauld.node import Node, may_exceed_pipe_size, pipe_max_size_bytes, resident_bytes
from phauld.options import MODE_VALUES, RESTORE_MODE_VALUES, Options, decided
from phauld.preflight import SourceFindings, check_source, refuse
from phauld.source.decision import WITH_ROUNDS, Asked, Decision, Way, decide
from phauld.source.target import Target
from phauld.trees.freezer import CannotFreeze, find_cgroup

_RUNTIME: Final = Path(podman_runtime.__file__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the preflight found and decided."""

    chosen: ChosenOptions
    here: tuple[Address, ...]  #: the addresses that move along, as they are here
    there: tuple[Address, ...]  #: and as the destination is to have them
    container: types_pb2.Container  #: what the destination is told of it; empty for what is none
    decision: Decision
    can_throttle: bool

    @property
    def externals(self) -> tuple[str, ...]:
        """What criu's dumps are told of."""
        return tuple(dump_externals(self.container))


class Departure:
    """Of one migration: writes into its record what it finds."""

    def __init__(self, node: Node, target: Target, record: migrations_pb2.Migration) -> None:
        self._node = node
        self._target = target
        self._record = record
        self.tree: types_pb2.TreeFacts | None = None  #: once it was looked at

    async def plan(self, remote: GrpcRemote, options: Options) -> Plan:
        """Check here, then there, and decide. Raises `PreflightRefused`, `PeerError`, `PhaulError`."""
        record = self._record
        findings = await check_source(self._node, self._target.pid, record.options, self._target.carried)
        self.tree = findings.tree
        container = await self._look_here(findings)
        await self._ask(remote, findings, container)
        forked = await asyncio.to_thread(forked_memory, self._target.pid)
        asked = self._asked(options, container, forked, findings.address_space)
        decision = decide(asked, self._capabilities(), record.destination, self._way())
        record.page_stream = decision.pipe.text
        record.mode = MODE_VALUES[decision.mode]
        record.restore_mode = RESTORE_MODE_VALUES[decision.choice.restore_mode]
        record.mode_reason = decision.mode_reason
        record.restore_mode_reason = decision.restore_mode_reason
        return Plan(
            chosen=findings.chosen,
            here=findings.here,
            there=findings.there,
            container=container,
            decision=decision,
            can_throttle=options.throttle and decision.mode in WITH_ROUNDS and self._can_throttle(),
        )

    async def open(self, remote: GrpcRemote, plan: Plan) -> None:
        """Have room, name and ports reserved. Raises `PeerError`, `PhaulError`."""
        record, container, guard = self._record, self._target.container, self._node.guard
        self._target.leaves(record.migration_id)
        options = _with_addresses(decided(record.options, plan.chosen), plan.there)
        options.mode = MODE_VALUES[plan.decision.mode]
        options.restore_mode = RESTORE_MODE_VALUES[plan.decision.choice.restore_mode]
        if container is not None and container.podman is not None:
            plan.container.podman.archive = await make_archive(container.podman, self._node.criu.binary, _RUNTIME)
        record.bytes_total = resident_bytes(self._target.pid)
        pipe = plan.decision.pipe
        answer = await remote.open_session(
            remote_pb2.OpenSessionRequest(
                migration_id=record.migration_id,
                source=self._node.info(),
                destination_node_id=record.destination.node_id,
                workload=self._target.spec,
                restarts=self._target.restarts,
                container=plan.container if container is not None else None,
                options=options,
                expected_bytes=record.bytes_total,
                carried_files=[types_pb2.CarriedFile(path=str(path)) for path in self._target.carried],
                page_pipe=convert.page_pipe(pipe),
            ),
            tls=guard.pipe_tls_to(record.destination_address) if pipe.tls and guard is not None else None,
        )
        record.destination.CopyFrom(answer.destination)
        record.images_place = answer.images_place

    async def _look_here(self, findings: SourceFindings) -> types_pb2.Container:
        """Raises `PreflightRefused`."""
        container = types_pb2.Container()
        problems = self._target.weigh(findings.problems)
        if self._target.container is not None:
            try:
                container = await describe(self._target.container)
            except PhaulError as exc:
                problems.append(container_problem(str(self._target.container.name), exc, self._node.name))
        self._record.problems.extend(problems)
        refuse(problems)
        return container

    async def _ask(self, remote: GrpcRemote, findings: SourceFindings, container: types_pb2.Container) -> None:
        """Raises `PreflightRefused`, `PeerError`, `PhaulError` PEER_INCOMPATIBLE."""
        answer = await remote.check_tree(
            remote_pb2.CheckTreeRequest(
                migration_id=self._record.migration_id,
                source=self._node.info(),
                tree=findings.tree,
                container=container if self._target.container is not None else None,
                options=_with_addresses(self._record.options, findings.there),
            )
        )
        there = answer.destination
        self._record.destination.CopyFrom(there)
        check_peer(there.node_name, there.version, there.api_features)
        self._record.problems.extend(answer.problems)
        refuse(list(answer.problems))

    def _asked(
        self, options: Options, container: types_pb2.Container, forked: ForkedMemory, address_space: AddressSpace
    ) -> Asked:
        wish = Wish(
            mode=options.mode,
            restore_mode=options.restore_mode,
            downtime_goal_seconds=options.downtime_goal_seconds,
            memory_bytes=resident_bytes(self._target.pid),
            own_bytes=forked.own_bytes,
            forked_bytes=forked.shared_bytes,
            address_space_bytes=address_space.private_bytes,
            mapping_bytes=address_space.counted_bytes,
            allow_postcopy=options.postcopy_after_seconds is not None,
        )
        return Asked(
            wish=wish,
            checksum=options.checksum,
            compression=options.compression,
            has_sync=bool(options.sync),
            is_podmans=container.HasField("podman"),
            is_limited=self._target.is_limited,
            is_restarted=self._target.is_restarted,
        )

    def _capabilities(self) -> NodeCapabilities:
        return NodeCapabilities(
            name=self._node.name,
            criu_version=self._node.criu_version.number,
            mem_track=self._node.features.mem_track,
            lazy_pages=self._node.features.lazy_pages,
            pipe_max_size_bytes=pipe_max_size_bytes(),
            may_exceed_pipe_size=may_exceed_pipe_size(),
        )

    def _way(self) -> Way:
        guard = self._node.guard
        return Way(
            tls=guard is not None,
            kernel_tls=guard is not None and guard.kernel_tls,
            insecure=self._node.insecure,
            is_loopback=is_loopback(self._record.destination_address),
        )

    def _can_throttle(self) -> bool:
        try:
            find_cgroup(self._target.pid)
        except (CannotFreeze, FileNotFoundError, ProcessLookupError) as exc:
            self._record.problems.add(
                code="no-throttle",
                severity=types_pb2.SEVERITY_WARNING,
                subject=f"pid {self._target.pid}",
                message=f"it cannot be held back: {exc}",
                remedy="it moves without; give it a cgroup of version 2 of its own to allow it",
                node_name=self._node.name,
            )
            return False
        return True


def _with_addresses(options: types_pb2.Options, there: tuple[Address, ...]) -> types_pb2.Options:
    """What the destination needs to know of them: everything."""
    message = types_pb2.Options()
    message.CopyFrom(options)
    message.move_addresses[:] = [str(each) for each in there]
    return message
