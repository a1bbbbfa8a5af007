"""A node that has a directory and nothing else: no criu, no features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phaul_criu.criu import Criu, Features
from phaul_criu.version import Version
from phauld.node import Node


def idle_node(directory: Path, **others: Any) -> Node:
    """`others` are further arguments of `Node`."""
    return Node(
        node_id="a",
        name="a",
        criu=Criu("/nonexistent"),
        criu_version=Version(4, 1, 1),
        features=Features(mem_track=False, lazy_pages=False, pidfd_store=False),
        images_dir=directory,
        insecure=True,
        incoming_limit=1,
        outgoing_limit=1,
        **others,
    )
