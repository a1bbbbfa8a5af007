"""Everything that can be told on the source alone (pure)."""

from __future__ import annotations

from phaul_client.preflight.check_devices import check_devices
from phaul_client.preflight.check_files import check_files
from phaul_client.preflight.check_namespaces import check_namespaces
from phaul_client.preflight.check_processes import check_existence, check_processes
from phaul_client.preflight.check_sockets import check_sockets
from phaul_client.preflight.check_sysctls import check_source_node
from phaul_client.preflight.check_terminals import check_terminals
from phaul_client.preflight.model import NodeFacts, TreeFacts
from phaul_client.preflight.options import choose_options
from phaul_client.preflight.problems import Problem, worst_first
from phaul_client.preflight.wishes import Wishes


def check_source(tree: TreeFacts, node: NodeFacts, wishes: Wishes) -> tuple[Problem, ...]:
    """The problems, worst first. If there is no process that could move, only that."""
    if gone := tuple(check_existence(tree)):
        return gone
    chosen = choose_options(tree, wishes)
    return worst_first(
        [
            *check_processes(tree, node, wishes),
            *check_terminals(tree),
            *check_sockets(tree, chosen, wishes),
            *check_devices(tree),
            *check_files(tree, chosen),
            *check_namespaces(tree),
            *check_source_node(node, wishes),
        ]
    )
