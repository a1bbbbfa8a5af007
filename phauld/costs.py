"""What a move between two nodes costs beside memory, as earlier ones have shown: for the forecast (pure).

Kept in memory only: after a restart of phauld the first migration's own rounds stand for it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Final

from phaul_client.rounds import usable
from phaul_criu.stats import DumpStats

#: Images of one process without much to tell, beside its memory.
PRIOR_IMAGE_BYTES: Final = 64 << 10
KEPT: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """As `Limits` wants them."""

    switch_seconds: float | None = None
    """State dump, restore of an empty tree and commit; None: not known yet."""
    image_bytes: int = PRIOR_IMAGE_BYTES


@dataclass(slots=True)
class CostBook:
    """The costs of the latest migrations to each node; one that met a busy moment is no measure of the next."""

    _of_node: dict[str, list[Costs]] = field(default_factory=dict)

    def to(self, node_id: str) -> Costs:
        """What to expect of a migration to that node."""
        known = self._of_node.get(node_id)
        if not known:
            return Costs()
        return Costs(
            switch_seconds=median(each.switch_seconds or 0.0 for each in known), image_bytes=known[-1].image_bytes
        )

    def learn(self, node_id: str, pause_seconds: float, dump: DumpStats, image_bytes: int) -> None:
        """A migration with lazy restore to that node has ended well, with this pause and last dump."""
        known = self._of_node.setdefault(node_id, [])
        known.append(Costs(switch_seconds=switch_seconds(pause_seconds, dump), image_bytes=image_bytes))
        del known[:-KEPT]


def switch_seconds(pause_seconds: float, dump: DumpStats) -> float:
    """What of a pause is neither the stop nor the collecting and sending of memory.

    The images are small enough to be counted here.
    """
    memory_seconds = max(dump.memdump_microseconds, dump.memwrite_microseconds) / 1e6
    return usable(pause_seconds - dump.freezing_microseconds / 1e6 - memory_seconds)
