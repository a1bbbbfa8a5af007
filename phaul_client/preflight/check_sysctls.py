"""Checks of the limits of a node (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from phaul_client.preflight.model import NodeFacts
from phaul_client.preflight.problems import Problem, error
from phaul_client.preflight.wishes import Wishes

#: criu serves lazy pages through pipes of this size.
POST_COPY_PIPE_BYTES: Final = 4 << 20


def check_source_node(node: NodeFacts, wishes: Wishes) -> Iterator[Problem]:
    """What post-copy needs of the source."""
    short = 0 < node.pipe_max_bytes < POST_COPY_PIPE_BYTES and node.sys_resource is False
    if wishes.post_copy and short:
        message = f"is {node.pipe_max_bytes} bytes, and post-copy needs {POST_COPY_PIPE_BYTES}"
        yield error("pipe-size", "fs.pipe-max-size", message, f"sysctl -w fs.pipe-max-size={POST_COPY_PIPE_BYTES}")
