"""Periodic timers that criu would let die (pure).

A timerfd that has expired and was not read yet has no time left when it is dumped, and criu restores it with
timerfd_settime and that time: zero, which disarms it for ever (criu/timerfd.c; seen with criu 4.2). A dump takes long
enough for nearly every short period to expire in it.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.message import DecodeError

from phaul_criu.chains import MAGICS_BYTES, framed, messages
from phaul_criu.rpc import fdinfo_pb2

_TIMERFD: Final = fdinfo_pb2.fd_types.Value("TIMERFD")


def rearm(files: bytes) -> bytes | None:
    """`files.img` in which such timers expire at once, and so go on with their period; `None` if there are none.

    Raises ValueError if the bytes are no such image.
    """
    made, changed = [files[:MAGICS_BYTES]], False
    for content in messages(files):
        try:
            entry = fdinfo_pb2.file_entry.FromString(content)
        except DecodeError as exc:
            raise ValueError("files.img is damaged") from exc
        if entry.type == _TIMERFD and _is_expired(entry.tfd):
            entry.tfd.vnsec, changed = 1, True
            content = entry.SerializeToString()
        made.append(framed(content))
    return b"".join(made) if changed else None


def _is_expired(timer: Any) -> bool:
    return bool(timer.isec or timer.insec) and not (timer.vsec or timer.vnsec)
