"""What the user asked for, as far as it matters to preflight (pure)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

#: Largest deleted file that travels inside the images unless the user allows more.
GHOST_CEILING_BYTES: Final = 64 << 20


class TcpPolicy(enum.Enum):
    """What happens to established TCP connections."""

    REFUSE = "refuse"
    KEEP = "keep"
    CLOSE = "close"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """None: phaul decides by what it finds."""

    tcp: TcpPolicy = TcpPolicy.REFUSE
    shell_job: bool | None = None
    ext_unix_sk: bool | None = None
    file_locks: bool | None = None
    ghost_limit_bytes: int | None = None
    #: The migration may use post-copy, which needs large pipes.
    post_copy: bool = False
