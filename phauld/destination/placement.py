"""Where the images of an incoming tree go, and whether there is room for them and for the tree (pure).

In memory when the node has room for the images and the tree beside them: pages that are read back from tmpfs cost no
disk. On disk otherwise. What other sessions were promised is not free.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul_client.errors import NoRoom

#: Left free beside what is promised, for the system and for images' small files.
MARGIN_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a session that is under way was granted."""

    bytes: int  #: of the tree's memory, and as many of images
    in_memory: bool  #: the images are in memory, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What the node has now."""

    memory_available_bytes: int  #: MemAvailable
    memory_dir: Path | None  #: a directory on tmpfs; `None`: never in memory
    memory_dir_free_bytes: int
    disk_dir: Path
    disk_dir_free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the images go, and why."""

    directory: Path
    in_memory: bool
    reason: str


def place(expected_bytes: int, room: Room, promises: Iterable[Promise]) -> Place:
    """Choose. Raises `NoRoom` when the tree or its images do not fit."""
    granted = tuple(promises)
    memory = room.memory_available_bytes - sum(each.bytes * (2 if each.in_memory else 1) for each in granted)
    disk = room.disk_dir_free_bytes - sum(each.bytes for each in granted if not each.in_memory)
    in_memory_dir = room.memory_dir_free_bytes - sum(each.bytes for each in granted if each.in_memory)
    if memory < expected_bytes:
        raise NoRoom(
            f"{_mib(expected_bytes)} of memory are needed, {_mib(memory)} are free and not promised",
            reason="NO_MEMORY",
            remedy="free memory on the destination, or choose another node",
        )
    if (
        room.memory_dir is not None
        and memory - MARGIN_BYTES >= 2 * expected_bytes
        and in_memory_dir - MARGIN_BYTES >= expected_bytes
    ):
        return Place(directory=room.memory_dir, in_memory=True, reason="in memory: there is room for it twice")
    if disk - MARGIN_BYTES < expected_bytes:
        raise NoRoom(
            f"{_mib(expected_bytes)} of disk are needed in {room.disk_dir}, {_mib(disk)} are free and not promised",
            reason="NO_SPACE",
            remedy="free disk space there, or give images_dir another place",
        )
    return Place(directory=room.disk_dir, in_memory=False, reason="on disk: memory has no room for it twice")


def _mib(size_bytes: int) -> str:
    return f"{max(size_bytes, 0) >> 20} MiB"
