"""The relay process where its disk, its commands or its node fail it."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from phaul_client import commit
from phaul_client.commit import Phase
from phaul_client.coordinator import Coordinator
from phaul_client.doubt import Doubt
from phaul_client.postcopy import RelayGone, RelaySilent
from phaul_client.tree import identity
from phauld import relay, relays
from tests.fakes.remote import ScriptedRemote


def test_a_full_disk_does_not_end_the_relay_without_an_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tmp_path / "late"
    late.symlink_to(tmp_path / "loop-a")
    (tmp_path / "loop-a").symlink_to(late)  # an OSError that is no FileNotFoundError, until it is mended

    def mend(_: float) -> None:
        late.unlink()
        late.mkdir()

    monkeypatch.setattr(time, "sleep", mend)
    relay.insist_exit(str(late), 0)
    assert json.loads((late / "exit.json").read_text()) == {"status": 0}


def test_a_directory_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    relay.insist_exit(str(tmp_path / "gone"), 0)


def test_a_link_without_its_descriptor_is_answered(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = relay.Relay(str(tmp_path))
    with ours, theirs, made.ours, made.theirs:
        ours.send(json.dumps({"do": "link"}).encode())
        relay.answer(made, theirs)
        assert "error" in json.loads(ours.recv(1 << 16))


async def test_a_relay_that_lives_and_does_not_answer_is_not_gone(tmp_path: Path) -> None:
    child: dict[str, Any] = identity(1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "relay.sock"))
        listener.listen()
        with pytest.raises(RelaySilent):
            await relays.Relay(tmp_path, child)._command({"do": "status"}, timeout_seconds=0.05)
        with pytest.raises(RelayGone) as gone:
            await relays.Relay(tmp_path, {**child, "start_ticks": 1 << 60})._command({"do": "status"}, (), 0.05)
    assert not isinstance(gone.value, RelaySilent)


class _FullDisk:
    """A journal whose disk is full for the first two writes."""

    def __init__(self) -> None:
        self.failures = 2
        self.phases: list[Phase] = []

    def note(self, **detail: object) -> None:
        pass

    async def record(self, phase: Phase) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(28, "No space left on device")
        self.phases.append(phase)


async def test_the_end_of_a_filling_waits_for_the_disk() -> None:
    journal, remote = _FullDisk(), ScriptedRemote()
    try:
        coordinator = Coordinator("m", remote, journal, phase=Phase.FILLING, doubt=Doubt())
        coordinator._transitions = commit.POSTCOPY_TRANSITIONS
        await coordinator.fire(commit.Event.PAGES_FILLED)
    finally:
        remote.close()
    assert Phase.CONFIRMED in journal.phases
