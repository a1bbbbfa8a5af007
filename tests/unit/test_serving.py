"""When the filling of a tree has ended, and how; and a criu that must go."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from phaul.v1 import remote_pb2, types_pb2
from phaul_client import serving
from phaul_client.case import Case
from phaul_client.commit import Event
from phaul_client.doubt import Doubt
from phaul_client.errors import PeerUnavailable
from phaul_client.serving import Progress, RelayGone, RelaySilent, RelayStatus, Serving, criu_gone, end_serving
from phaul_client.tree import identity

Answer = remote_pb2.Session | BaseException
SILENT = PeerUnavailable("b:1", "no answer")
FILLED = remote_pb2.Session(filling=False)
LOST = remote_pb2.Session(filling=True, error=types_pb2.Failure(message="criu has ended"))


def filling(pages_missing: int) -> remote_pb2.Session:
    return remote_pb2.Session(filling=True, pages_missing=pages_missing)


class Script:
    """Both ends: what the destination answers, and what the relay is up to, one after the other; the last stays."""

    def __init__(self, sessions: Sequence[Answer], relay: Sequence[BaseException | None] = (None,)) -> None:
        self._sessions = list(sessions)
        self._relay = list(relay)

    async def get_session(self) -> remote_pb2.Session:
        answer = self._sessions.pop(0) if len(self._sessions) > 1 else self._sessions[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def status(self) -> RelayStatus:
        error = self._relay.pop(0) if len(self._relay) > 1 else self._relay[0]
        if error is not None:
            raise error
        return RelayStatus(criu_pid=1, page_fd=3, is_linked=True, page_bytes=8192, wire_bytes=9000, pages=2)


async def fill(script: Script, doubt_seconds: float = 60.0) -> tuple[Event, list[int]]:
    """How it ended, and how many pages were missing at each look."""
    told: list[Progress] = []
    ends: Any = cast(Any, script)
    case = Case(migration_id="m1", remote=ends, journal=ends, doubt=Doubt(seconds=doubt_seconds))
    return await Serving(case, ends, told.append).fill(), [each.pages_missing for each in told]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "POLL_SECONDS", 0.0)


async def test_it_ends_with_the_last_page() -> None:
    script = Script([filling(7), SILENT, filling(3), FILLED])
    assert await fill(script) == (Event.PAGES_FILLED, [7, 3, 0])


async def test_a_relay_that_ended_with_the_last_page_was_in_time() -> None:
    assert await fill(Script([FILLED], [RelayGone("it has ended")])) == (Event.PAGES_FILLED, [])


async def test_a_relay_that_is_silent_lives() -> None:
    script = Script([filling(7), filling(6), FILLED], [RelaySilent("busy"), None])
    assert await fill(script) == (Event.PAGES_FILLED, [6, 0])


@pytest.mark.parametrize("script", [Script([filling(7)], [RelayGone("killed")]), Script([LOST])])
async def test_pages_that_are_lost_are_lost(script: Script) -> None:
    assert await fill(script) == (Event.CRIU_LOST, [])


async def test_silence_becomes_a_doubt() -> None:
    assert await fill(Script([filling(7), SILENT]), doubt_seconds=0.01) == (Event.DOUBT_EXPIRED, [7])


@pytest.fixture
def criu() -> Iterator[subprocess.Popen[bytes]]:
    """A stand-in: any process."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


async def test_a_criu_without_a_relay_is_killed(criu: subprocess.Popen[bytes]) -> None:
    async def no_relay() -> None:
        raise RelayGone("it has ended")

    await end_serving(identity(criu.pid), no_relay())
    assert criu.wait() == -signal.SIGKILL
    await criu_gone({**identity(1), "pid": criu.pid})  # another one with its PID, by now
    await criu_gone({})
