"""Two nodes, without daemons."""

from tests.node.conftest import nodes

__all__ = ["nodes"]
