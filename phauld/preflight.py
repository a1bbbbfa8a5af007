"""Both halves of the preflight, as this node does them: facts read in a thread, checks that are pure."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul.v1 import types_pb2
from phaul_client import preflight
from phaul_client.addresses import Address, parse_address
from phaul_client.errors import PhaulError, PreflightRefused
from phaul_client.movers import links
from phaul_client.preflight import ChosenOptions
from phaul_client.preflight.address_space import largest
from phaul_client.preflight.address_space_model import AddressSpace
from phaul_client.preflight.convert import (
    node_facts_of,
    problem_messages,
    requirements_of,
    tree_message,
    wishes_of,
)
from phaul_client.preflight.model import NodeFacts
from phaul_client.rsync import is_below, parse_directories
from phauld.node import Node
from phauld.sync_records import mounts_below

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
    address_space: AddressSpace  #: the most of any process
    here: tuple[Address, ...]  #: the addresses that move along, as they are here
    there: tuple[Address, ...]  #: and as the destination is to have them


async def check_source(node: Node, pid: int, options: types_pb2.Options, carried: tuple[Path, ...]) -> SourceFindings:
    """Read the tree below `pid` and check what can be told here."""
    facts = await asyncio.to_thread(preflight.read_tree, pid)
    here = await _facts(node)
    wishes = wishes_of(options)
    needs = preflight.carried(preflight.requirements(facts, here), {str(path) for path in carried})
    addresses, missing = await _find_addresses(node, options)
    sync = parse_directories(options.sync_directories)
    needs = preflight.synced(needs, sync, mounts_below(sync))
    kept = node.sync.check_source(sync, overwrite=options.sync_overwrite)
    told = await asyncio.to_thread(lambda: problem_messages(kept, node.name))
    told += [
        _problem(node, "sync-lease", file.path, "has a lease of the tree, which ends when --sync reads it", "no --sync")
        for file in needs.files
        if any(each.startswith("LEASE") for each in file.locks) and any(is_below(file.path, each) for each in sync)
    ]
    return SourceFindings(
        problems=(*missing, *told, *problem_messages(preflight.check_source(facts, here, wishes), node.name)),
        here=tuple(ours for ours, _ in addresses),
        there=tuple(theirs for _, theirs in addresses),
        tree=tree_message(needs),
        chosen=preflight.choose_options(facts, wishes),
        address_space=largest(each.address_space for each in facts.processes),
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
    moved = tuple(map(parse_address, options.move_addresses))
    coming = {each.ip for each in moved}
    problems = tuple(each for each in problems if each.code != "address-missing" or each.subject not in coming)
    sync = parse_directories(options.sync_directories)
    kept = node.sync.check_destination(sync, overwrite=options.sync_overwrite)
    told = await asyncio.to_thread(lambda: problem_messages(kept, node.name))
    return [*await _check_addresses(node, moved), *told, *problem_messages(problems, node.name)]


async def _find_addresses(
    node: Node, options: types_pb2.Options
) -> tuple[list[tuple[Address, Address]], list[types_pb2.Problem]]:
    """Each address that is to move, as it is here and as it is to be there."""
    found: list[tuple[Address, Address]] = []
    problems: list[types_pb2.Problem] = []
    if not options.move_addresses:
        return found, problems
    try:
        ours = {has.ip: has for link in await links() for has in link.addresses}
    except PhaulError as exc:
        return found, [_problem(node, "address-not-movable", "--move-address", exc.message, exc.remedy)]
    for wanted in map(parse_address, options.move_addresses):
        if (has := ours.get(wanted.ip)) is None:
            remedy = "name an address that `ip address` shows here"
            problems.append(_problem(node, "address-not-here", wanted.ip, f"is no address of {node.name}", remedy))
            continue
        prefix = wanted.prefix if wanted.prefix is not None else has.prefix
        found.append((has, Address(wanted.ip, prefix, wanted.interface or has.interface)))
    return found, problems


async def _check_addresses(node: Node, moved: tuple[Address, ...]) -> list[types_pb2.Problem]:
    if not moved:
        return []
    try:
        here = await links()
    except PhaulError as exc:
        return [_problem(node, "address-not-movable", "--move-address", exc.message, exc.remedy)]
    names = {link.name for link in here}
    taken = {has.ip for link in here for has in link.addresses}
    problems = []
    for each in moved:
        if each.ip in taken:
            message = f"is to move to {node.name}, which has it already"
            problems.append(_problem(node, "address-taken", each.ip, message, "take it away there, or do not move it"))
        elif each.interface not in names:
            message = f"{node.name} has no interface {each.interface or '(none was named)'}"
            problems.append(_problem(node, "interface-missing", each.ip, message, "--move-address ADDR@IFACE"))
    return problems


def _problem(node: Node, code: str, subject: str, message: str, remedy: str) -> types_pb2.Problem:
    return types_pb2.Problem(
        code=code,
        severity=types_pb2.SEVERITY_ERROR,
        subject=subject,
        message=message,
        remedy=remedy,
        node_name=node.name,
    )


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
