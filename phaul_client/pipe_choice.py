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
#: The ability of a node to be an end of a page stream under its kernel's TLS (`kernel_tls.py`).
KERNEL_TLS_FEATURE: Final = "kernel-tls-v1"
#: The ability of the relays of a post-copy to talk in frames, with checksums and compressed.
LAZY_PIPE_FEATURE: Final = "lazy-pipe-v1"


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
    kernel_tls: bool = False  #: by the kernels of both nodes: the pipe only greets, and is in the path no longer
    lazy_packing: Compression | None = None  #: of the relays of a post-copy: frames with checksums, compressed so
    text: str  #: in a few words, for people


def choose_pipe(
    *,
    mode: Mode,
    checksum: bool | None,
    compression: Compression | None,
    tls: bool,
    clear_is_allowed: bool,
    is_loopback: bool,
    kernel_tls: bool,
    peer_features: frozenset[str],
) -> PipeChoice:
    """`None`: not said. `kernel_tls`: this node's kernel can do TLS.

    Raises `PhaulError` UNSUPPORTED, PEER_INCOMPATIBLE: the other node cannot do what must be.

    The pages of post-copy go by relays, which do the same by themselves.
    """
    asked = bool(checksum) or compression not in (None, Compression.OFF)
    wants = tls or asked or (CHECKSUMS_BY_DEFAULT and checksum is None and not is_loopback)
    packing, lazy = None, ""
    if mode in (Mode.POST_COPY, Mode.HYBRID):
        if asked and LAZY_PIPE_FEATURE in peer_features:
            packing = compression or Compression.OFF
        lazy = f"; lazy pages {_lazy_text(tls=tls, packing=packing)}"
    if API_FEATURE in peer_features:
        if not wants or (mode is Mode.POST_COPY and not tls):
            text = f"{CLEAR}{lazy}" if mode is not Mode.POST_COPY else lazy[2:]
            return PipeChoice(uses_pipe=False, lazy_packing=packing, text=text)
        if tls and not asked and kernel_tls and KERNEL_TLS_FEATURE in peer_features:
            return PipeChoice(uses_pipe=True, tls=True, kernel_tls=True, text=f"TLS by the kernels{lazy}")
        chosen = compression or Compression.OFF
        parts = ["checksums", *(["TLS"] if tls else []), *([chosen] if chosen is not Compression.OFF else [])]
        text = ", ".join(parts) + lazy
        return PipeChoice(uses_pipe=True, compression=chosen, tls=tls, lazy_packing=packing, text=text)
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


def _lazy_text(*, tls: bool, packing: Compression | None) -> str:
    if packing is None:
        return "under TLS" if tls else CLEAR
    parts = ["checksums", *(["TLS"] if tls else []), *([packing] if packing is not Compression.OFF else [])]
    return f"with {', '.join(parts)}"


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is this machine for certain."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
