"""What phaul needs to know from criu's inventory image: bytes in, values out."""

from __future__ import annotations

import struct
from typing import Final

from phaul_criu.rpc import inventory_pb2

#: The magic number and the size of one protobuf message (criu/include/magic.h).
_HEADER: Final = struct.Struct("<II")
_MAGIC: Final = 0x58313116
#: criu cuts "inet CRIU-<run id>" to a buffer of 32 bytes (criu/netfilter.c), and so must who looks for the table.
_LONGEST_NAME: Final = 31 - len("inet ")


def lock_table_name(content: bytes) -> str | None:
    """The name of the nftables table that the dump may have made; None for images of an older criu.

    Raises ValueError if the bytes are no inventory.
    """
    if len(content) < _HEADER.size or _HEADER.unpack_from(content)[0] != _MAGIC:
        raise ValueError("not an inventory image")
    entry = inventory_pb2.inventory_entry()
    try:
        entry.ParseFromString(content[_HEADER.size :])
    except Exception as exc:  # protobuf's DecodeError; named in google.protobuf, which nothing else here needs
        raise ValueError(f"inventory cannot be decoded: {exc}") from exc
    return f"CRIU-{entry.dump_criu_run_id}"[:_LONGEST_NAME] if entry.dump_criu_run_id else None
