"""The relay process where its disk, its commands or its node fail it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phaul_client import commit
from phaul_client.case import Case
from phaul_client.commit import Phase
from phaul_client.coordinator import Coordinator
from phaul_client.relay_frames import (
    NARROW_MESSAGE,
    PAGE_BYTES,
    AnswerHead,
    Command,
    CriuMessage,
    Flag,
    FrameReader,
    Question,
)
from phaul_client.serving import RelayGone, RelaySilent
from phaul_client.tree import identity
from phauld.lazy_pages import relay, relays
from phauld.lazy_pages.relay_end import RelayEnd
from phauld.lazy_pages.relay_fetch import Fetch
from phauld.lazy_pages.relay_links import PlainConnection, receive_exactly
from phauld.lazy_pages.relay_serve import Serve
from tests.fakes.remote import ScriptedRemote

#: A connection that is given up is closed by its last reference.
GIVEN_UP = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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
    made = RelayEnd(str(tmp_path))
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


@pytest.fixture
def closing() -> Iterator[Callable[[Iterable[socket.socket]], None]]:
    """Closes sockets in the end, in this order."""
    known: list[socket.socket] = []
    yield known.extend
    for each in known:
        each.close()


@GIVEN_UP
def test_criu_4_1_and_its_shorter_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closing: Callable[[Iterable[socket.socket]], None]
) -> None:
    """Both relays beside such a criu: it asks and is answered in its own form, whatever is between them."""
    monkeypatch.setattr(RelayEnd, "start_criu", lambda *_: None)
    there = Serve(str(tmp_path), NARROW_MESSAGE.size, os.open(os.devnull, os.O_RDONLY), "criu")
    here = Fetch(str(tmp_path), NARROW_MESSAGE.size)
    for work in (here.take_questions, here.give_answers):
        here.thread(work)
    link = socket.socketpair()
    closing([*link, here.theirs, there.theirs, here.ours, there.ours])
    for end, made in zip(link, (there, here), strict=True):
        made.link.replace(PlainConnection(end))
    asking, answering = here.theirs, there.theirs
    for number in (1, 2):
        question = NARROW_MESSAGE.pack(Command.GET, 2, number << 12, 0x101)
        asking.sendall(question)
        assert receive_exactly(answering, NARROW_MESSAGE.size) == question
        answer = NARROW_MESSAGE.pack(Command.ADD_F | 4 << 16, number, number << 12, 0x101)
        answer += bytes([number]) * PAGE_BYTES * number
        answering.sendall(answer)
        assert receive_exactly(asking, len(answer)) == answer
    there.end(Command.ABORT)
    assert NARROW_MESSAGE.unpack(receive_exactly(answering, NARROW_MESSAGE.size))[0] == Command.ABORT


@GIVEN_UP
def test_an_answer_cut_in_its_first_message_is_asked_for_again_from_its_beginning(
    tmp_path: Path, closing: Callable[[Iterable[socket.socket]], None]
) -> None:
    made = Fetch(str(tmp_path), NARROW_MESSAGE.size)
    closing([made.theirs, made.ours])
    for work in (made.take_questions, made.give_answers):
        made.thread(work)
    made.theirs.sendall(NARROW_MESSAGE.pack(Command.GET, 1, 1 << 16, 0x101))
    content = CriuMessage(Command.ADD_F, 1, 1 << 16, 0x101).encode() + bytes(PAGE_BYTES)
    size = len(content)
    for sent_bytes in (10, 40, size):
        ours, its = socket.socketpair()
        closing([its])
        with ours:
            made.link.replace(PlainConnection(its))
            reader = FrameReader()
            while (question := reader.next_event()) is None:
                reader.receive_data(receive_exactly(ours, reader.missing_bytes))
            assert isinstance(question, Question)
            skip = question.skip_bytes
            assert skip == {10: 0, 40: 0, size: 40}[sent_bytes]
            head = AnswerHead(
                sequence=1, offset_bytes=skip, length_bytes=size - skip, size_bytes=size - skip, flags=Flag.LAST
            )
            ours.sendall(head.encode() + content[skip:sent_bytes])
            if sent_bytes == size:
                got = receive_exactly(made.theirs, NARROW_MESSAGE.size + PAGE_BYTES)
                assert got == NARROW_MESSAGE.pack(Command.ADD_F, 1, 1 << 16, 0x101) + bytes(PAGE_BYTES)


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
        coordinator = Coordinator(Case(migration_id="m", remote=remote, journal=journal), Phase.FILLING)
        coordinator._transitions = commit.POSTCOPY_TRANSITIONS
        await coordinator.fire(commit.Event.PAGES_FILLED)
    finally:
        remote.close()
    assert Phase.CONFIRMED in journal.phases
