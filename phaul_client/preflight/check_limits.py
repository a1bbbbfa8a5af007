"""Checks of the destination's limits: what criu cannot make there, and says without a remedy or not at all (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from phaul_client.preflight.destination_model import DestinationFacts
from phaul_client.preflight.problems import Problem, error, warning
from phaul_client.preflight.requirements import Requirements

_INSTANCES: Final = "fs.inotify.max_user_instances"
_WATCHES: Final = "fs.inotify.max_user_watches"
_EPOLL: Final = "fs.epoll.max_user_watches"
_NR_OPEN: Final = "fs.nr_open"


def check_limits(needs: Requirements, found: DestinationFacts) -> Iterator[Problem]:
    """A limit of 0 is not known."""
    node, limits = found.node.name, found.limits
    for wanted, code, name, what in (
        (needs.inotify_watches, "inotify-limit", _WATCHES, "inotify watches"),
        (needs.epoll_watches, "epoll-limit", _EPOLL, "descriptors watched by epolls"),
    ):
        if 0 < (limit := limits.get(name, 0)) < wanted:
            yield error(code, name, f"is {limit} on {node}, and the tree has {wanted} {what}", _raise(name, wanted))
    if found.lacks_inotify:
        limit = limits.get(_INSTANCES, 0)
        message = f"is {limit} on {node}, too few beside those in use for the {needs.inotify_instances} of the tree"
        yield error("inotify-limit", _INSTANCES, message, _raise(_INSTANCES, limit + needs.inotify_instances))
    yield from _not_restored(needs, found)


def _not_restored(needs: Requirements, found: DestinationFacts) -> Iterator[Problem]:
    """criu sets the limits of setrlimit, and goes on if it may not: those of phauld stay."""
    node = found.node.name
    files, most = dict(needs.hard_limits).get("NOFILE", 0), found.limits.get(_NR_OPEN, 0)
    if 0 < most < files:
        message = (
            f"is {most} on {node}, below the tree's hard limit of open files ({files}): it gets phaul's limit there"
        )
        yield warning("resource-limit", _NR_OPEN, message, f"{_raise(_NR_OPEN, files)}, or a lower limit for the tree")
    if found.node.sys_resource is False:
        for name, limit in found.lower_limits.items():
            message = (
                f"phaul of {node} has a hard limit of {limit}, below the tree's, and may not raise it: the tree gets it"
            )
            remedy = f"Limit{name}= (or ulimit) for phauld there, or give it CAP_SYS_RESOURCE"
            yield warning("resource-limit", f"RLIMIT_{name}", message, remedy)


def _raise(name: str, value: int) -> str:
    return f"sysctl -w {name}={value} or more there"
