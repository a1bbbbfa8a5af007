"""The frames between two relays: byte by byte, cut anywhere, nothing twice and nothing lost."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul_client import relay_frames as frames
from phaul_client.errors import RemoteProtocolError
from phaul_client.relay_frames import (
    AnswerHead,
    Command,
    CriuMessage,
    Event,
    Flag,
    FrameReader,
    Question,
    Questions,
)

QUESTION = Question(sequence=7, message=CriuMessage(Command.GET, 3, 0x1000, 0x101).encode(), skip_bytes=5)
ANSWER = AnswerHead(sequence=7, offset_bytes=5, length_bytes=4096, size_bytes=4000, flags=Flag.LAST)


def read(data: bytes, chunk_bytes: int) -> list[Event]:
    reader, events = FrameReader(), []
    for start in range(0, len(data), chunk_bytes):
        reader.receive_data(data[start : start + chunk_bytes])
        while (event := reader.next_event()) is not None:
            events.append(event)
    reader.receive_data(b"")
    return events


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1000])
def test_frames_arrive_whatever_the_pieces(chunk_bytes: int) -> None:
    assert read(QUESTION.encode() + ANSWER.encode() + QUESTION.encode(), chunk_bytes) == [QUESTION, ANSWER, QUESTION]


@given(st.lists(st.sampled_from([QUESTION, ANSWER]), max_size=5))
def test_who_reads_no_more_than_is_missing_never_reads_into_an_answers_content(sent: list[Event]) -> None:
    stream = b"".join(each.encode() + (b"content" if isinstance(each, AnswerHead) else b"") for each in sent)
    reader, got = FrameReader(), []
    while stream:
        missing = reader.missing_bytes
        reader.receive_data(stream[:missing])
        stream = stream[missing:]
        while (event := reader.next_event()) is not None:
            got.append(event)
            if isinstance(event, AnswerHead):
                assert stream.startswith(b"content")
                stream = stream[len("content") :]
    assert got == sent


@pytest.mark.parametrize("cut", range(1, frames.HEAD_BYTES + frames.CRIU_BYTES))
def test_an_end_inside_a_frame_is_an_error(cut: int) -> None:
    reader = FrameReader()
    reader.receive_data(QUESTION.encode()[:cut])
    assert reader.next_event() is None
    with pytest.raises(RemoteProtocolError):
        reader.receive_data(b"")


@given(st.binary(min_size=frames.HEAD_BYTES, max_size=200))
def test_noise_is_an_event_or_an_error_and_nothing_else(noise: bytes) -> None:
    reader = FrameReader()
    try:
        reader.receive_data(noise)
        while reader.next_event() is not None:
            pass
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize("command", [Command.GET, Command.CLOSE, Command.ABORT])
def test_only_pages_are_an_answer(command: Command) -> None:
    with pytest.raises(RemoteProtocolError):
        frames.answer_bytes(CriuMessage(command, 1, 0, 0).encode())


def test_criu_s_flags_are_no_part_of_the_command() -> None:
    header = frames.CRIU_MESSAGE.pack(4 << 16 | Command.ADD_F, 2, 0x5000, 0x201)
    assert frames.decode_criu(header) == CriuMessage(Command.ADD_F, 2, 0x5000, 0x201)
    assert frames.answer_bytes(header) == frames.CRIU_BYTES + 2 * frames.PAGE_BYTES


def test_an_answer_that_was_not_asked_for_is_an_error() -> None:
    questions = Questions()
    with pytest.raises(RemoteProtocolError):
        questions.expect(ANSWER)
    questions.ask(QUESTION.message)
    with pytest.raises(RemoteProtocolError):
        questions.expect(ANSWER)


def answer_to(question: Question) -> bytes:
    """What criu says: always the same to the same question."""
    message = frames.decode_criu(question.message)
    pages = b"".join(
        (message.address + page).to_bytes(8, "little") * (frames.PAGE_BYTES // 8) for page in range(message.pages)
    )
    return CriuMessage(Command.ADD_F, message.pages, message.address, message.image).encode() + pages


class Link:
    """A model of both relays and the link between them."""

    def __init__(self, asked: list[Question]) -> None:
        self.questions = Questions()
        self.to_ask = deque(asked)
        self.under_way: deque[Question] = deque()
        self.delivered = b""

    def ask(self) -> None:
        if self.to_ask:
            self.under_way.append(self.questions.ask(self.to_ask.popleft().message))

    def cut(self) -> None:
        self.under_way = deque(self.questions.again())

    def answer(self, permille: int) -> None:
        """Deliver so much of the next answer; if it is not all, the link was cut in its middle."""
        if not self.under_way:
            return
        question = self.under_way.popleft()
        content = answer_to(question)[question.skip_bytes :]
        sizes = {"length_bytes": len(content), "size_bytes": len(content)}
        head = AnswerHead(sequence=question.sequence, offset_bytes=question.skip_bytes, flags=Flag.LAST, **sizes)
        self.questions.expect(head)
        arrives = len(content) * permille // 1000
        self.delivered += content[:arrives]
        self.questions.delivered(arrives)
        if permille == 1000:
            self.questions.completed()
        else:
            self.cut()


@given(
    st.lists(st.integers(1, 3), max_size=6),
    st.lists(st.one_of(st.just("ask"), st.just("cut"), st.integers(0, 1000)), max_size=40),
)
def test_cut_anywhere_nothing_is_lost_and_nothing_comes_twice(pages: list[int], steps: list[str | int]) -> None:
    asked = [
        Question(sequence=number + 1, message=CriuMessage(Command.GET, count, number * 100, 1).encode())
        for number, count in enumerate(pages)
    ]
    link = Link(asked)
    for step in steps:
        match step:
            case "ask":
                link.ask()
            case "cut":
                link.cut()
            case int():
                link.answer(step)
    while link.to_ask or link.questions.open:
        link.ask()
        link.answer(1000)
    assert link.delivered == b"".join(answer_to(question) for question in asked)
