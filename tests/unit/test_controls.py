"""What may be changed under way, when, and whom it reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf import duration_pb2

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client.client import Client
from phaul_client.commit import Phase
from phaul_client.config import Config
from phaul_client.errors import InvalidRequest, PhaseError, PhaulError
from phaul_client.policy import Iterate, Limits, SwitchToPostcopy
from phaul_criu.criu import Criu
from phauld.source.controls import Controls, check_update
from phauld.source.source_relay import SourceRelay

Update = migrations_pb2.UpdateMigrationRequest
GOAL = Update(downtime_goal=duration_pb2.Duration(seconds=2))
SWITCH = Update(switch_to_post_copy=True)
SLOWER = Update(bandwidth_limit_bytes_per_second=1000)
NOTHING: Any = None


def record(mode: types_pb2.Mode.ValueType = types_pb2.MODE_HYBRID) -> migrations_pb2.Migration:
    return migrations_pb2.Migration(migration_id="m1", mode=mode)


def controls(of: migrations_pb2.Migration) -> Controls:
    return Controls(of, SourceRelay(NOTHING, "b:1", Path("/nowhere"), NOTHING))


class Limited:
    """A connection that is told of a limit."""

    def __init__(self) -> None:
        self.limits: list[int] = []

    def limit(self, bytes_per_second: int) -> None:
        self.limits.append(bytes_per_second)


@pytest.mark.parametrize("phase", Phase)
def test_goal_and_switch_are_for_the_rounds_a_limit_is_for_ever(phase: Phase) -> None:
    check_update(SLOWER, phase, record())
    for wish in (GOAL, SWITCH):
        if phase in (Phase.PREFLIGHT, Phase.OPENING, Phase.ITERATING):
            check_update(wish, phase, record())
        else:
            with pytest.raises(PhaseError):
                check_update(wish, phase, record())


@pytest.mark.parametrize(
    ("asked_for", "reason"),
    [
        (types_pb2.MODE_HYBRID, ""),
        (types_pb2.MODE_POST_COPY, ""),
        (types_pb2.MODE_PRE_COPY, "UNSUPPORTED"),
        (types_pb2.MODE_AUTO, "WRONG_PHASE"),
        (types_pb2.MODE_UNSPECIFIED, "WRONG_PHASE"),
    ],
)
def test_a_switch_before_the_mode_is_chosen_goes_by_the_one_asked_for(
    asked_for: types_pb2.Mode.ValueType, reason: str
) -> None:
    of = record(types_pb2.MODE_UNSPECIFIED)
    of.options.mode = asked_for
    if not reason:
        check_update(SWITCH, Phase.PREFLIGHT, of)
        return
    with pytest.raises(PhaulError) as refused:
        check_update(SWITCH, Phase.PREFLIGHT, of)
    assert refused.value.reason == reason


def test_what_is_over_is_over() -> None:
    over = record()
    over.finished_at.GetCurrentTime()
    with pytest.raises(PhaseError):
        check_update(SLOWER, Phase.PREFLIGHT, over)


async def test_what_is_refused_changes_nothing() -> None:
    of = record(types_pb2.MODE_PRE_COPY)
    kept = controls(of)
    before = (kept.options, of.SerializeToString(deterministic=True))
    unprepared = Update(switch_to_post_copy=True, bandwidth_limit_bytes_per_second=1000)
    negative = Update(downtime_goal=duration_pb2.Duration(seconds=-1), bandwidth_limit_bytes_per_second=1000)
    for wish, error in ((unprepared, PhaulError), (negative, InvalidRequest)):
        with pytest.raises(error):
            await kept.update(wish, Phase.ITERATING)
        assert (kept.options, of.SerializeToString(deterministic=True)) == before
    assert not kept.policy.is_asked


async def test_a_switch_before_the_mode_is_chosen_holds_afterwards() -> None:
    kept = controls(record())
    await kept.update(SWITCH, Phase.PREFLIGHT)
    assert isinstance(kept.policy.decide((), Limits()), SwitchToPostcopy)
    assert not isinstance(kept.policy.decide((), Limits()), Iterate)


async def test_a_change_reaches_all_that_go_by_it() -> None:
    kept, remote = controls(record()), Limited()
    kept.reach(cast(Any, remote))
    client = Client(NOTHING, NOTHING, Config(1, 0, Path("/nowhere")), criu=Criu("/nonexistent"))
    kept.steer(client)
    await kept.update(SLOWER, Phase.ITERATING)
    await kept.update(GOAL, Phase.ITERATING)
    await kept.update(Update(bandwidth_limit_bytes_per_second=0), Phase.FILLING)
    assert remote.limits == [0, 1000, 1000, 0]
    assert (client.limits.downtime_goal_seconds, client.limits.bandwidth_limit_bytes_per_second) == (2.0, None)
    assert kept.options.downtime_goal_seconds == 2.0
