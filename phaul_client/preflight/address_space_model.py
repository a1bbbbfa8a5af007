"""How much address space a process has, as values (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressSpace:
    """The private mappings of a process, with or without pages."""

    private_bytes: int = 0
    #: The largest one whose size the kernel holds against the memory it has when criu maps it (writable, as criu does);
    #: 0 if it is below 1 GiB.
    counted_bytes: int = 0


NO_SPACE: Final = AddressSpace()
