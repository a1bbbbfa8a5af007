"""What can stand in a migration's way, found before anything freezes.

    tree = read_tree(pid)                                   source, I/O
    chosen = choose_options(tree, wishes)                   pure: what phaul sets by itself, and why
    problems = check_source(tree, source_node, wishes)      pure
    needs = requirements(tree, source_node)                 pure: what travels to the destination (phaul.v1.TreeFacts)
    found = look_up(needs, destination_node)                destination, I/O
    problems += check_destination(needs, found, wishes)     pure

Nothing here freezes, traces or changes a process. Every check has a stable code; docs/preflight.md explains each.
"""

from phaul_client.preflight.checks_destination import check_destination
from phaul_client.preflight.checks_source import check_source
from phaul_client.preflight.destination_facts import look_up
from phaul_client.preflight.facts import read_tree
from phaul_client.preflight.node_facts import read_node
from phaul_client.preflight.options import ChosenOptions, choose_options
from phaul_client.preflight.problems import Problem, Severity, blocks, worst_first
from phaul_client.preflight.requirements import Requirements, carried, requirements, synced
from phaul_client.preflight.wishes import TcpPolicy, Wishes

__all__ = [
    "ChosenOptions",
    "Problem",
    "Requirements",
    "Severity",
    "TcpPolicy",
    "Wishes",
    "blocks",
    "carried",
    "check_destination",
    "check_source",
    "choose_options",
    "look_up",
    "read_node",
    "read_tree",
    "requirements",
    "synced",
    "worst_first",
]
