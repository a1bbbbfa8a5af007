"""What the relays of a post-copy migration say to each other, and what they know of criu's pages (pure).

criu at the destination asks for pages, criu at the source answers, in order and one answer to a question
(criu/page-xfer.c). The relay at the destination numbers the questions and keeps each until its answer was delivered. A
question can be asked again at any time: the tree is frozen and its criu gives the same bytes. So nothing that is on its
way has to be kept: after a cut the destination asks again, for what is missing of the answer that was cut in its
middle (`skip_bytes`) and for those behind it. No byte is delivered twice, none is left out.

On the wire: a head (`HEAD_BYTES`, big-endian), then `size_bytes` of content. A question's content is criu's 32 bytes,
also where criu itself, before 4.2, has 24 (`to_criu`, `from_criu`).
An answer comes in one or more pieces, in order; the last is marked.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from dataclasses import dataclass
from typing import Final

from phaul_client.errors import RemoteProtocolError

PAGE_BYTES: Final = 4096
CRIU_MESSAGE: Final = struct.Struct("<I4xQQQ")
"""criu's struct page_server_iov: command with flags above bit 16, pages, address, image."""
CRIU_BYTES: Final = CRIU_MESSAGE.size
NARROW_MESSAGE: Final = struct.Struct("<IIQQ")
"""The same up to criu 4.1."""
MAX_ANSWER_BYTES: Final = CRIU_BYTES + (64 << 20)
_COMMAND_MASK: Final = 0xFFFF
_HEAD: Final = struct.Struct(">BBHIQIII")
HEAD_BYTES: Final = _HEAD.size
_PEER: Final = "relay"


class Command(enum.IntEnum):
    """The commands of criu's page server that matter here."""

    ADD_F = 6  #: an answer: pages follow
    GET = 7
    CLOSE = 0x1023
    FORCE_CLOSE = 0x1024
    ABORT = 0x7FFF  #: none of criu's: its dump fails and lets the tree run on


class Kind(enum.IntEnum):
    """What a frame is."""

    QUESTION = 1
    ANSWER = 2


class Flag(enum.IntFlag):
    """How the content of an answer is to be taken."""

    NONE = 0
    LAST = 1  #: the last piece of this answer


@dataclass(frozen=True, slots=True)
class CriuMessage:
    """criu's 32 bytes, taken apart."""

    command: int
    pages: int
    address: int
    image: int

    def encode(self) -> bytes:
        return CRIU_MESSAGE.pack(self.command, self.pages, self.address, self.image)


def decode_criu(data: bytes) -> CriuMessage:
    """Exactly `CRIU_BYTES` bytes. Raises `RemoteProtocolError`."""
    if len(data) != CRIU_BYTES:
        raise RemoteProtocolError(_PEER, f"a message of criu's has {CRIU_BYTES} bytes, not {len(data)}")
    command, pages, address, image = CRIU_MESSAGE.unpack(data)
    return CriuMessage(command & _COMMAND_MASK, pages, address, image)


def from_criu(data: bytes) -> bytes:
    """A message of either form as the relays have it. Raises `RemoteProtocolError`."""
    if len(data) == NARROW_MESSAGE.size:
        return CRIU_MESSAGE.pack(*NARROW_MESSAGE.unpack(data))
    decode_criu(data)
    return data


def to_criu(message: bytes, size_bytes: int) -> bytes:
    """A message for a criu whose messages have that size. Raises `RemoteProtocolError`."""
    decode_criu(message)
    if size_bytes == CRIU_BYTES:
        return message
    try:
        return NARROW_MESSAGE.pack(*CRIU_MESSAGE.unpack(message))
    except struct.error as exc:
        raise RemoteProtocolError(_PEER, "more pages than this criu can count") from exc


def answer_bytes(header: bytes) -> int:
    """The size of the answer that begins with this header, it included. Raises `RemoteProtocolError`."""
    message = decode_criu(header)
    size_bytes = CRIU_BYTES + message.pages * PAGE_BYTES
    if message.command != Command.ADD_F or size_bytes > MAX_ANSWER_BYTES:
        raise RemoteProtocolError(_PEER, f"criu answers with command {message.command} and {message.pages} pages")
    return size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question of criu's. Of its answer, `skip_bytes` have arrived before."""

    sequence: int
    message: bytes
    skip_bytes: int = 0

    def encode(self) -> bytes:
        size = len(self.message)
        return _HEAD.pack(Kind.QUESTION, 0, 0, 0, self.sequence, self.skip_bytes, size, size) + self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """The head of a piece of an answer; `size_bytes` of content follow, which are `length_bytes` of the answer."""

    sequence: int
    offset_bytes: int
    length_bytes: int
    size_bytes: int
    flags: Flag = Flag.NONE

    def encode(self) -> bytes:
        return _HEAD.pack(
            Kind.ANSWER,
            self.flags,
            0,
            0,
            self.sequence,
            self.offset_bytes,
            self.length_bytes,
            self.size_bytes,
        )


Event = Question | AnswerHead


class FrameReader:
    """Bytes in, heads out. What follows the head of an answer is not for it: the caller takes those bytes away."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def missing_bytes(self) -> int:
        """How many bytes may be read next without reading into an answer's content; 0: an event is ready."""
        have = len(self._buffer)
        if have < HEAD_BYTES:
            return HEAD_BYTES - have
        return max(0, self._wanted() - have)

    def receive_data(self, data: bytes) -> None:
        """Take bytes; `b""` is the end of the stream. Raises `RemoteProtocolError` if that is inside a frame."""
        if not data and self._buffer:
            raise RemoteProtocolError(_PEER, "the stream ended inside a frame")
        self._buffer += data

    def next_event(self) -> Event | None:
        """The next frame's head, `None` if more bytes are needed. Raises `RemoteProtocolError`."""
        if len(self._buffer) < HEAD_BYTES:
            return None
        wanted = self._wanted()
        if len(self._buffer) < wanted:
            return None
        kind, flags, _, _, sequence, offset, length, size = _HEAD.unpack_from(self._buffer)
        content = bytes(self._buffer[HEAD_BYTES:wanted])
        del self._buffer[:wanted]
        if kind == Kind.QUESTION:
            return Question(sequence=sequence, message=content, skip_bytes=offset)
        return AnswerHead(
            sequence=sequence,
            offset_bytes=offset,
            length_bytes=length,
            size_bytes=size,
            flags=Flag(flags),
        )

    def _wanted(self) -> int:
        kind, flags, zero, _, _, offset, length, size = _HEAD.unpack_from(self._buffer)
        if zero or flags > sum(Flag) or kind not in Kind._value2member_map_:
            raise RemoteProtocolError(_PEER, "these bytes are not a frame")
        if kind == Kind.QUESTION:
            if size != CRIU_BYTES:
                raise RemoteProtocolError(_PEER, f"a question of {size} bytes")
            return HEAD_BYTES + CRIU_BYTES
        if max(size, offset + length) > MAX_ANSWER_BYTES or not length:
            raise RemoteProtocolError(_PEER, f"a piece of {length} bytes at {offset}")
        return HEAD_BYTES


class Questions:
    """The destination's memory: what was asked, and how much of the first answer was delivered."""

    def __init__(self) -> None:
        self._open: deque[tuple[int, bytes]] = deque()
        self._next = 1
        self.delivered_bytes = 0  #: of the first open answer

    @property
    def open(self) -> int:
        """Questions whose answer is not complete."""
        return len(self._open)

    def ask(self, message: bytes) -> Question:
        """criu asks. The question is to be sent if there is a link, else `again` will."""
        self._open.append((self._next, message))
        self._next += 1
        return Question(sequence=self._open[-1][0], message=message)

    def again(self) -> list[Question]:
        """What to ask on a new link."""
        skips = [self.delivered_bytes, *[0] * len(self._open)]
        return [
            Question(sequence=sequence, message=message, skip_bytes=skip)
            for (sequence, message), skip in zip(self._open, skips, strict=False)
        ]

    def expect(self, head: AnswerHead) -> None:
        """Raises `RemoteProtocolError` unless this is the piece that is to be delivered next."""
        if not self._open or (head.sequence, head.offset_bytes) != (self._open[0][0], self.delivered_bytes):
            raise RemoteProtocolError(_PEER, f"answer {head.sequence} at {head.offset_bytes} was not asked for")

    def delivered(self, size_bytes: int) -> None:
        """So many further bytes of the first answer have been given to criu."""
        self.delivered_bytes += size_bytes

    def completed(self) -> None:
        """The last piece of the first answer was delivered."""
        self._open.popleft()
        self.delivered_bytes = 0
