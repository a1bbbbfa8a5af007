"""Both halves of the preflight, as this node does them: facts read in a thread, checks that are pure."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul.v1 import types_pb2
from phaul_client import preflight
from phaul_client.errors import PreflightRefused
from phaul_client.preflight import ChosenOptions
from phaul_client.preflight.convert import (
    node_facts_of,
    problem_messages,
    requirements_of,
    tree_message,
    wishes_of,
)
from phaul_client.preflight.model import NodeFacts
from phauld.node import Node

_REASONS: Final = {
    "no-such-process": "PID_NOT_FOUND",
    "kernel-thread": "KERNEL_THREAD",
    "zombie": "PROCESS_ENDED",
    "criu-too-old": "CRIU_TOO_OLD",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFindings:
    """What the source knows about a tree before it asks the destination."""

    problems: tuple[types_pb2.Problem, ...]
    tree: types_pb2.TreeFacts
    chosen: ChosenOptions


async def check_source(node: Node, pid: int, options: types_pb2.Options, carried: tuple[Path, ...]) -> SourceFindings:
    """Read the tree below `pid` and check what can be told here."""
    facts = await asyncio.to_thread(preflight.read_tree, pid)
    here = await _facts(node)
    wishes = wishes_of(options)
    needs = preflight.carried(preflight.requirements(facts, here), {str(path) for path in carried})
    return SourceFindings(
        problems=tuple(problem_messages(preflight.check_source(facts, here, wishes), node.name)),
        tree=tree_message(needs),
        chosen=preflight.choose_options(facts, wishes),
    )


async def check_destination(
    node: Node, tree: types_pb2.TreeFacts, source: types_pb2.NodeInfo, options: types_pb2.Options
) -> list[types_pb2.Problem]:
    """Look up what the tree needs and check it."""
    if source.node_id == node.node_id:
        return [
            types_pb2.Problem(
                code="same-node",
                severity=types_pb2.SEVERITY_ERROR,
                subject=node.name,
                message="is the node that the tree runs on",
                remedy="name another node",
                node_name=node.name,
            )
        ]
    needs = requirements_of(tree)
    found = await asyncio.to_thread(preflight.look_up, needs, await _facts(node))
    problems = preflight.check_destination(needs, node_facts_of(source), found, wishes_of(options))
    return problem_messages(problems, node.name)


def refuse(problems: list[types_pb2.Problem]) -> None:
    """Raises `PreflightRefused` if one of them is an error."""
    errors = [each for each in problems if each.severity == types_pb2.SEVERITY_ERROR]
    if errors:
        raise PreflightRefused(
            tuple(f"{each.subject}: {each.message}" for each in errors),
            reason=_REASONS.get(errors[0].code, ""),
            remedy=errors[0].remedy,
        )


async def _facts(node: Node) -> NodeFacts:
    return await asyncio.to_thread(
        preflight.read_node,
        str(node.images_dir),
        name=node.name,
        criu_version=node.criu_version.number,
        lazy_pages=node.features.lazy_pages,
    )
