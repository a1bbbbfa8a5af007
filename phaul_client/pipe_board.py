"""What a page pipe tells phauld: counters and the first failure, in memory that both of them see.

No system call and no wait on either side. The invariant: a failure is written once, its text before its length.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from dataclasses import dataclass
from typing import Final, Self

from phaul_client.page_frames import MAX_FAIL_BYTES, Codec, decode_failure, encode_failure

_COUNTERS: Final = struct.Struct("=QQQQ")
_CODEC: Final = struct.Struct("=Q")
_LENGTH: Final = struct.Struct("=Q")
_CODEC_OFFSET: Final = _COUNTERS.size
_LENGTH_OFFSET: Final = _CODEC_OFFSET + _CODEC.size
_TEXT_OFFSET: Final = _LENGTH_OFFSET + _LENGTH.size
BOARD_BYTES: Final = _TEXT_OFFSET + MAX_FAIL_BYTES


@dataclass(frozen=True, slots=True)
class Counters:
    """Bytes so far: `raw` as criu gave or takes them, `wire` as they travel, heads included."""

    raw_sent: int = 0
    wire_sent: int = 0
    raw_received: int = 0
    wire_received: int = 0


class Board:
    """The memory, mapped. Close it when nobody looks any more."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, BOARD_BYTES)
        self._lock = threading.Lock()

    @classmethod
    def make(cls) -> tuple[Self, int]:
        """A new one, and the descriptor by which another process may map it."""
        descriptor = os.memfd_create("page-pipe", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, BOARD_BYTES)
        return cls(descriptor), descriptor

    @property
    def counters(self) -> Counters:
        return Counters(*_COUNTERS.unpack_from(self._memory))

    def sent(self, raw: int, wire: int) -> None:
        """A frame went out. One thread calls this."""
        self._add(0, raw, wire)

    def received(self, raw: int, wire: int) -> None:
        """A frame came in. One thread calls this."""
        self._add(16, raw, wire)

    def _add(self, offset: int, raw: int, wire: int) -> None:
        before = struct.unpack_from("=QQ", self._memory, offset)
        struct.pack_into("=QQ", self._memory, offset, before[0] + raw, before[1] + wire)

    @property
    def codec(self) -> Codec:
        """What the last frame was compressed with."""
        return Codec(_CODEC.unpack_from(self._memory, _CODEC_OFFSET)[0])

    @codec.setter
    def codec(self, codec: Codec) -> None:
        _CODEC.pack_into(self._memory, _CODEC_OFFSET, codec)

    @property
    def failure(self) -> tuple[str, str] | None:
        """Reason and message of the first failure."""
        (length,) = _LENGTH.unpack_from(self._memory, _LENGTH_OFFSET)
        if not length:
            return None
        return decode_failure(self._memory[_TEXT_OFFSET : _TEXT_OFFSET + min(length, MAX_FAIL_BYTES)])

    def fail(self, reason: str, message: str) -> bool:
        """Something went wrong; `False` if something else had before."""
        with self._lock:
            if self.failure is not None:
                return False
            text = encode_failure(reason, message)
            self._memory[_TEXT_OFFSET : _TEXT_OFFSET + len(text)] = text
            _LENGTH.pack_into(self._memory, _LENGTH_OFFSET, len(text))
            return True

    def close(self) -> None:
        self._memory.close()
