"""What may be changed while a migration is under way: its goal, its bandwidth, and whether it goes on as post-copy."""

from __future__ import annotations

import dataclasses
from typing import Final

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client.client import Client
from phaul_client.commit import Phase
from phaul_client.errors import InvalidRequest, PhaseError, PhaulError
from phaul_client.policy import StopCopyPolicy, Switchable
from phaul_client.remote import GrpcRemote
from phauld import convert
from phauld.options import parse_options
from phauld.source.source_relay import SourceRelay

_ROUNDS: Final = (Phase.PREFLIGHT, Phase.OPENING, Phase.ITERATING)
_UNDECIDED: Final = (types_pb2.MODE_UNSPECIFIED, types_pb2.MODE_AUTO)
_MAY_SWITCH: Final = (types_pb2.MODE_HYBRID, types_pb2.MODE_POST_COPY)


class Controls:
    """Of one migration: its options as they are now, and all that go by them."""

    def __init__(self, record: migrations_pb2.Migration, relay: SourceRelay) -> None:
        self._record = record
        self._relay = relay
        self._remote: GrpcRemote | None = None
        self._client: Client | None = None
        self.options = parse_options(record.options)
        self.policy = Switchable(StopCopyPolicy())  #: of the mode, once that is chosen

    def reach(self, remote: GrpcRemote) -> None:
        """Its connection is this one from now on."""
        self._remote = remote
        remote.limit(self.options.bandwidth_limit_bytes_per_second)

    def steer(self, client: Client) -> None:
        """Its rounds begin."""
        self._client = client

    async def update(self, wish: migrations_pb2.UpdateMigrationRequest, phase: Phase) -> None:
        """Raises `PhaseError`, `InvalidRequest`, and `PhaulError` UNSUPPORTED; then nothing is changed."""
        check_update(wish, phase, self._record)
        options = self._record.options
        if wish.switch_to_post_copy:
            self.policy.is_asked = True
        if convert.seconds_of(wish.downtime_goal):
            options.downtime_goal.CopyFrom(wish.downtime_goal)
        if wish.HasField("bandwidth_limit_bytes_per_second"):
            options.bandwidth_limit_bytes_per_second = wish.bandwidth_limit_bytes_per_second
        self.options = parse_options(options)
        await self._apply()

    async def _apply(self) -> None:
        limit = self.options.bandwidth_limit_bytes_per_second
        if self._remote is not None:
            self._remote.limit(limit)
        await self._relay.limit(limit)
        if self._client is not None:
            self._client.limits = dataclasses.replace(
                self._client.limits,
                downtime_goal_seconds=self.options.downtime_goal_seconds,
                bandwidth_limit_bytes_per_second=limit or None,
            )


def check_update(wish: migrations_pb2.UpdateMigrationRequest, phase: Phase, record: migrations_pb2.Migration) -> None:
    """Raises what `Controls.update` does: it is over, or in a phase in which that changes nothing any more."""
    goal_seconds = convert.seconds_of(wish.downtime_goal)
    is_over = record.HasField("finished_at")
    if is_over or (phase not in _ROUNDS and (wish.switch_to_post_copy or goal_seconds)):
        raise PhaseError(phase, "UPDATE_MIGRATION")
    if goal_seconds < 0:
        raise InvalidRequest("downtime_goal is negative")
    if wish.switch_to_post_copy and not record.mode and record.options.mode in _UNDECIDED:
        raise PhaulError("its mode is not chosen yet", reason="WRONG_PHASE", remedy="ask again in a moment")
    if wish.switch_to_post_copy and (record.mode or record.options.mode) not in _MAY_SWITCH:
        raise PhaulError(
            "it was not prepared for post-copy", reason="UNSUPPORTED", remedy="start it with --mode hybrid"
        )
