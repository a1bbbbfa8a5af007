"""The preamble of a page stream, the only bytes on it that are phaul's own (pure).

A source connects to the destination's data port and sends 48 bytes: magic (8), version (2), stream kind (2), zero (4),
one-time token (32), big-endian. The destination answers one byte, a `Verdict`. Then both ends hand the socket to criu.
"""

import enum
import struct
from dataclasses import dataclass
from typing import Final

from phaul_client.errors import RemoteProtocolError

MAGIC: Final = b"PHAULPG\x01"
VERSION: Final = 1
TOKEN_BYTES: Final = 32
_LAYOUT: Final = struct.Struct(">8sHHI32s")
PREAMBLE_BYTES: Final = _LAYOUT.size
_PEER: Final = "page stream"


class StreamKind(enum.IntEnum):
    """What flows on a data connection."""

    PAGES = 1  #: criu's page-server protocol, pushed by the source
    LAZY_PAGES = 2  #: post-copy: what two relays say to each other (relay_frames.py)


class Verdict(enum.IntEnum):
    """The destination's answer to a preamble."""

    ACCEPTED = 0
    REFUSED = 1


@dataclass(frozen=True, slots=True)
class Preamble:
    kind: StreamKind
    token: bytes

    def __post_init__(self) -> None:
        if len(self.token) != TOKEN_BYTES:
            raise ValueError(f"a token has {TOKEN_BYTES} bytes, not {len(self.token)}")

    def encode(self) -> bytes:
        return _LAYOUT.pack(MAGIC, VERSION, self.kind, 0, self.token)


def decode_preamble(data: bytes) -> Preamble:
    """Decode exactly `PREAMBLE_BYTES` bytes. Raises `RemoteProtocolError` for anything that is not a preamble."""
    if len(data) != PREAMBLE_BYTES:
        raise RemoteProtocolError(_PEER, f"a preamble has {PREAMBLE_BYTES} bytes, not {len(data)}")
    magic, version, kind, zero, token = _LAYOUT.unpack(data)
    if magic != MAGIC or zero:
        raise RemoteProtocolError(_PEER, "these bytes are not a phaul page stream")
    if version != VERSION:
        raise RemoteProtocolError(_PEER, f"page stream version {version} is not spoken here, only {VERSION}")
    try:
        return Preamble(StreamKind(kind), token)
    except ValueError:
        raise RemoteProtocolError(_PEER, f"stream kind {kind} is unknown") from None
