"""Reading /proc: small files, quickly."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator

from phaul_client.preflight.proc_text import (
    Stat,
    build_id_in_notes,
    note_segments,
    parse_stat,
)

#: What a process that ends while it is read, or a file that may not be read, raises.
GONE = (FileNotFoundError, ProcessLookupError, PermissionError, NotADirectoryError)

_CHUNK_BYTES = 1 << 16
_TAIL_BYTES = 1 << 12


def read_text(path: str) -> str:
    """The whole file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, _CHUNK_BYTES)
        if data:
            while more := os.read(descriptor, _CHUNK_BYTES):
                data += more
    finally:
        os.close(descriptor)
    return data.decode(errors="surrogateescape")


def try_text(path: str) -> str:
    """The whole file; empty if it cannot be read."""
    try:
        return read_text(path)
    except OSError:
        return ""


def try_link(path: str) -> str:
    """Where a symbolic link points; empty if it cannot be read."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def try_stat(path: str) -> os.stat_result | None:
    """The file's status; None if there is none."""
    try:
        return os.stat(path)
    except OSError:
        return None


def read_stat(pid: int) -> Stat | None:
    """/proc/PID/stat; None if the process is gone."""
    try:
        return parse_stat(read_text(f"/proc/{pid}/stat"))
    except (*GONE, ValueError, IndexError):
        return None


def all_pids() -> Iterator[int]:
    """Every process, the youngest first: what is looked for is likely to be younger than the system's services."""
    return iter(sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True))


def holders(targets: Iterable[str], outside_of: frozenset[int], first: Iterable[int], seconds: float) -> dict[str, int]:
    """What /proc/PID/fd shows → a process outside the tree that has it open.

    The processes in `first` are looked at before all others; after `seconds` what was not found is left out.
    """
    wanted, found = set(targets), dict[str, int]()
    deadline = time.monotonic() + seconds
    likely = tuple(first)
    for pid in (*likely, *all_pids()):
        if not wanted or time.monotonic() > deadline:
            break
        if pid in outside_of:
            continue
        for target in _open_targets(pid) & wanted:
            found[target] = pid
            wanted.discard(target)
    return found


def build_id(path: str) -> bytes | None:
    """The GNU build-id of an ELF file; None if it has none or cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            header = file.read(4096)
            for offset, size in note_segments(header):
                file.seek(offset)
                if (found := build_id_in_notes(file.read(min(size, _CHUNK_BYTES)))) is not None:
                    return found
    except (OSError, ValueError):
        pass
    return None


def tail_digest(path: str, size_bytes: int) -> bytes | None:
    """SHA-256 of the last bytes before `size_bytes`; None if they cannot be read. What is only appended to keeps it."""
    start = max(0, size_bytes - _TAIL_BYTES)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        data = os.pread(descriptor, size_bytes - start, start)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return hashlib.sha256(data).digest() if len(data) == size_bytes - start else None


def _open_targets(pid: int) -> set[str]:
    targets = set()
    with contextlib.suppress(*GONE):
        for name in os.listdir(f"/proc/{pid}/fd"):
            targets.add(try_link(f"/proc/{pid}/fd/{name}"))
    return targets
