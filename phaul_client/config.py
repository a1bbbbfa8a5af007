"""What both halves of a migration are told: which process, which descriptor for its memory, which directory."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Config:
    """The seed's configuration, passed to both the `Client` and the `Server`.

    `pid` is the root of the tree that moves. `memfd` is the descriptor of a connected stream socket over which criu
    sends memory pages (this end of it). `wdir` is an existing directory for images; rounds become its children 0, 1, …
    """

    pid: int
    memfd: int
    wdir: Path
