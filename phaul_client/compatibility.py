"""Whether two phaulds of different versions fit together (pure).

Each tells in its NodeInfo what it can do (`api_features`); each refuses, before anything is reserved or frozen, another
one that lacks what it cannot do without. A change that an older phauld would misunderstand gets a feature of its own.
What can be done without is looked for where it is used, and done without.
"""

from collections.abc import Collection
from typing import Final

from phaul_client.errors import PhaulError

#: Without these of the other node nothing can move, in either direction.
NEEDED: Final = ("commit-v1", "put-images-v1")
#: Looked for where they are used.
SYNC_FEATURE: Final = "sync-v1"
LAZY_TLS_FEATURE: Final = "lazy-tls-v1"  #: the relays of post-copy speak TLS
PODMAN_FEATURE: Final = "podman-v1"
CGROUP_LIMITS_FEATURE: Final = "cgroup-limits-v1"  #: and may use no more there
SAME_PAGES_FEATURE: Final = "same-pages-v1"  #: FilePiece.pages
RESTART_FEATURE: Final = "restart-v1"  #: workloads are started again there, too


def check_peer(name: str, version: str, features: Collection[str], needed: Collection[str] = NEEDED) -> None:
    """Raises `PhaulError` PEER_INCOMPATIBLE, naming what is missing."""
    missing = [each for each in needed if each not in features]
    if missing:
        raise PhaulError(
            f"{name or 'the other node'} (phaul {version or 'of unknown version'}) does not know {', '.join(missing)}",
            reason="PEER_INCOMPATIBLE",
            remedy="upgrade the older of the two nodes; `phaul info` shows version and features",
        )
