"""How much address space a process has, which costs criu though nothing may be in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from phaul_client.preflight.address_space_model import AddressSpace
from phaul_client.preflight.proc_files import try_text
from phaul_client.preflight.proc_text import parse_fields

#: What is smaller is of no interest; a process without is spared a look at its page tables.
LARGE_BYTES: Final = 1 << 30
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ", re.MULTILINE)
_NO_RESERVE = "nr"  # MAP_NORESERVE, in VmFlags


def read_address_space(pid: int) -> AddressSpace:
    """Of a process; nothing if it is gone."""
    sizes = dict(_private(try_text(f"/proc/{pid}/maps")))
    large = {start: size for start, size in sizes.items() if size >= LARGE_BYTES}
    return AddressSpace(
        private_bytes=sum(sizes.values()),
        counted_bytes=max(_counted(try_text(f"/proc/{pid}/smaps"), large), default=0) if large else 0,
    )


def largest(spaces: Iterable[AddressSpace]) -> AddressSpace:
    """The most of each, of several processes."""
    every = tuple(spaces)
    return AddressSpace(
        private_bytes=max((each.private_bytes for each in every), default=0),
        counted_bytes=max((each.counted_bytes for each in every), default=0),
    )


def mapping_limit_bytes() -> int:
    """The largest mapping that this kernel allows; 0: any. By vm.overcommit_memory: 0 refuses what is more than all
    memory and swap, 1 nothing, 2 what is not free by its count (mm/util.c, __vm_enough_memory).
    """
    memory = {name: int(value.split()[0]) * 1024 for name, value in parse_fields(try_text("/proc/meminfo")).items()}
    match try_text("/proc/sys/vm/overcommit_memory").strip():
        case "0":
            return memory["MemTotal"] + memory.get("SwapTotal", 0)
        case "2":
            return max(1, memory["CommitLimit"] - memory["Committed_AS"])
        case _:
            return 0


def _private(maps: str) -> Iterator[tuple[int, int]]:
    """Start and size of each."""
    for start, end, permissions in _MAPPING.findall(maps):
        if permissions.endswith("p"):
            yield int(start, 16), int(end, 16) - int(start, 16)


def _counted(smaps: str, large: dict[int, int]) -> Iterator[int]:
    size = 0
    for line in smaps.splitlines():
        if line.startswith("VmFlags:"):
            if size and _NO_RESERVE not in line.split():
                yield size
        elif mapping := _MAPPING.match(line):
            size = large.get(int(mapping[1], 16), 0)
