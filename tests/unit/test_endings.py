"""How an attempt at a migration has ended: what its record says, and whether another attempt follows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from phaul.v1 import types_pb2
from phaul_client import commit
from phaul_client.commit import Phase
from phaul_client.errors import MigrationCancelled, PhaulError
from phaul_client.status import reason_of
from phaul_criu.errors import CriuError
from phauld.source.endings import Attempt, ending, why_rolled_back

LOST = PhaulError("the other node has gone", reason="PEER_UNREACHABLE")
CUT = PhaulError("a page came to harm", reason="PAGE_SERVER_FAILED")


def attempt(phase: Phase | None, **changed: Any) -> Attempt:
    values: dict[str, Any] = {
        "migration_id": "m1",
        "is_recovery": False,
        "is_cancelled": False,
        "has_opened": True,
        "pipe_failure": None,
        "deadline_seconds": 90.0,
    }
    return Attempt(phase=phase, **{**values, **changed})


def told(error: BaseException, phase: Phase | None, **changed: Any) -> tuple[str, str]:
    """The phase and the reason in the record."""
    end = ending(attempt(phase, **changed), error)
    assert end is not None
    return types_pb2.MigrationPhase.Name(end.phase).removeprefix("MIGRATION_PHASE_"), reason_of(end.error)


@pytest.mark.parametrize("phase", Phase)
def test_another_attempt_follows_where_the_tree_may_not_be_left_as_it_is(phase: Phase) -> None:
    is_left = attempt(phase).is_left
    assert is_left == (phase in {*commit.IN_DOUBT, Phase.FILLING, Phase.CONFIRMED, Phase.ROLLING_BACK})
    assert not (is_left and phase in commit.FINAL)
    nothing_to_tell = ending(attempt(phase), LOST) is None
    assert nothing_to_tell == (is_left and phase not in commit.IN_DOUBT)


def test_a_recovery_without_a_connection_has_not_begun() -> None:
    assert attempt(None, is_recovery=True).is_left
    assert ending(attempt(None, is_recovery=True), LOST) is None
    assert not attempt(None).is_left


@pytest.mark.parametrize("phase", sorted(commit.IN_DOUBT))
@pytest.mark.parametrize("error", [LOST, TimeoutError(), asyncio.CancelledError(), MigrationCancelled("m1")])
def test_in_doubt_nothing_else_counts(phase: Phase, error: BaseException) -> None:
    assert told(error, phase, is_cancelled=True, pipe_failure=CUT) == ("HELD", "OUTCOME_UNKNOWN")


def test_before_the_destination_made_room_it_is_refused() -> None:
    assert told(LOST, Phase.PREFLIGHT, has_opened=False) == ("REFUSED", "PEER_UNREACHABLE")
    assert told(LOST, None, has_opened=False) == ("REFUSED", "PEER_UNREACHABLE")
    assert told(LOST, Phase.ROLLED_BACK) == ("ROLLED_BACK", "PEER_UNREACHABLE")


def test_a_cancel_is_one_whatever_it_ended_as() -> None:
    assert told(LOST, Phase.ROLLED_BACK, is_cancelled=True) == ("CANCELLED", "CANCELLED")
    assert told(MigrationCancelled("m1"), Phase.ROLLED_BACK, has_opened=False) == ("CANCELLED", "CANCELLED")
    assert told(asyncio.CancelledError(), Phase.ROLLED_BACK) == ("ROLLED_BACK", "CANCELLED")  # nobody asked for it


def test_the_pipe_knows_better_than_criu_why_pages_did_not_come_through() -> None:
    dump = CriuError("dump", "cannot send")
    assert told(dump, Phase.ROLLED_BACK) == ("ROLLED_BACK", "DUMP_FAILED")
    assert told(dump, Phase.ROLLED_BACK, pipe_failure=CUT) == ("ROLLED_BACK", "PAGE_SERVER_FAILED")
    assert told(LOST, Phase.ROLLED_BACK, pipe_failure=CUT) == ("ROLLED_BACK", "PEER_UNREACHABLE")


def test_the_deadline_is_named() -> None:
    end = ending(attempt(Phase.ROLLED_BACK), TimeoutError())
    assert end is not None
    assert (str(end.error), reason_of(end.error)) == ("not done after 90 s", "DEADLINE_EXCEEDED")


def test_a_recovery_gives_the_reason_that_it_got() -> None:
    assert reason_of(why_rolled_back("m1", LOST)) == "PEER_UNREACHABLE"
    assert reason_of(why_rolled_back("m1", None)) == "DAEMON_RESTARTED"
