"""Does a page pipe stand in the way of the pages, and what does it do there? (pure)

Where it is not needed it is not in the path: criu's own bytes go into the network then.
"""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass
from typing import Final

from phaul.v1 import types_pb2
from phaul_client.errors import PhaulError
from phaul_client.modes import Mode

#: The ability of a node to be either end of a pipe; see NodeInfo.api_features.
API_FEATURE: Final = "page-pipe-v1"


class Compression(enum.StrEnum):
    """What was asked for."""

    OFF = "off"
    LZ4 = "lz4"
    ZSTD = "zstd"
    AUTO = "auto"  #: whatever gets the most pages across, measured again and again


COMPRESSIONS: Final = {
    types_pb2.COMPRESSION_UNSPECIFIED: Compression.OFF,
    types_pb2.COMPRESSION_OFF: Compression.OFF,
    types_pb2.COMPRESSION_LZ4: Compression.LZ4,
    types_pb2.COMPRESSION_ZSTD: Compression.ZSTD,
    types_pb2.COMPRESSION_AUTO: Compression.AUTO,
}
COMPRESSION_VALUES: Final = {compression: value for value, compression in COMPRESSIONS.items() if value}
#: Whether pages that leave the machine are checked unless somebody says no. See docs/performance.md for its cost.
CHECKSUMS_BY_DEFAULT: Final = False
CLEAR: Final = "as criu sends them"


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeChoice:
    """How pages travel."""

    uses_pipe: bool
    compression: Compression = Compression.OFF
    tls: bool = False
    text: str  #: in a few words, for people


def choose_pipe(
    *,
    mode: Mode,
    checksum: bool | None,
    compression: Compression | None,
    tls: bool,
    clear_is_allowed: bool,
    is_loopback: bool,
    peer_features: frozenset[str],
) -> PipeChoice:
    """`None`: not said. Raises `PhaulError` UNSUPPORTED, PEER_INCOMPATIBLE: the other node cannot do what must be.

    The pages of post-copy go by relays, which have TLS but nothing else of this; the text says so.
    """
    asked = bool(checksum) or compression not in (None, Compression.OFF)
    wants = tls or asked or (CHECKSUMS_BY_DEFAULT and checksum is None and not is_loopback)
    lazy = f"; lazy pages {'under TLS' if tls else CLEAR}" if mode in (Mode.POST_COPY, Mode.HYBRID) else ""
    if API_FEATURE in peer_features:
        if not wants or (mode is Mode.POST_COPY and not tls):
            return PipeChoice(uses_pipe=False, text=f"{CLEAR}{lazy}" if mode is not Mode.POST_COPY else lazy[2:])
        chosen = compression or Compression.OFF
        parts = ["checksums", *(["TLS"] if tls else []), *([chosen] if chosen is not Compression.OFF else [])]
        return PipeChoice(uses_pipe=True, compression=chosen, tls=tls, text=", ".join(parts) + lazy)
    remedy = "a newer phauld there"
    if asked:
        raise PhaulError(
            "the destination's phauld can neither check nor compress pages", reason="UNSUPPORTED", remedy=remedy
        )
    if tls and not clear_is_allowed:
        raise PhaulError(
            "the destination's phauld cannot receive pages under TLS",
            reason="PEER_INCOMPATIBLE",
            remedy=f"{remedy}, or --insecure on both nodes until then",
        )
    return PipeChoice(uses_pipe=False, text=f"{CLEAR}, the destination's phauld is older")


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is this machine for certain."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
