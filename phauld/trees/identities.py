"""Who a workload runs as and what it may use, by the names that its caller gives."""

from __future__ import annotations

import grp
import os
import pwd
import resource
import shutil
from collections.abc import Mapping
from typing import Final

from phaul_client.errors import InvalidRequest

UNLIMITED: Final = 2**64 - 1
#: Limits by their names: "nofile", "nproc", "core" …
LIMITS: Final = {
    name.removeprefix("RLIMIT_").lower(): getattr(resource, name)
    for name in dir(resource)
    if name.startswith("RLIMIT_")
}
_MOST: Final = 2**63 - 1  # of what Python gives to setrlimit


def of_user(user: str) -> tuple[int, int, list[int]] | None:
    """User, group and further groups of "user", "user:group", or numbers of them; `None`: phauld's own.

    Raises `InvalidRequest` if this node does not know them. A number that has no name needs its group.
    """
    if not user:
        return None
    name, colon, group = user.partition(":")
    try:
        found = pwd.getpwuid(int(name)) if name.isascii() and name.isdigit() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        found = None
    if found is None and not (name.isascii() and name.isdigit() and group):
        raise InvalidRequest(f"{name!r} is no user of this node", remedy="a name, or a number with a group: 1000:1000")
    uid = found.pw_uid if found is not None else int(name)
    if colon:
        gid = _group(group)
    elif found is not None:
        gid = found.pw_gid
    if not 0 <= uid < 2**32 - 1 or not 0 <= gid < 2**32 - 1:
        raise InvalidRequest(f"{user!r} is no user")
    return uid, gid, os.getgrouplist(found.pw_name, gid) if found is not None else [gid]


def becoming(identity: tuple[int, int, list[int]] | None) -> list[str]:
    """What an init that is root's starts a program by, so that it becomes that user.

    The init itself stays root's: criu lets it mount /proc, in a PID namespace that has none. Raises `InvalidRequest`.
    """
    if identity is None:
        return []
    if (program := shutil.which("setpriv")) is None:
        raise InvalidRequest("setpriv, which starts programs as another user, is missing", remedy="install util-linux")
    user, group, groups = identity
    further = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return [program, f"--reuid={user}", f"--regid={group}", further, "--"]


def resource_limits(limits: Mapping[str, int]) -> list[tuple[int, int]]:
    """Number and value of each. Raises `InvalidRequest` for a name that there is not, and what phauld may not give."""
    found = []
    for name, value in sorted(limits.items()):
        if name not in LIMITS:
            raise InvalidRequest(f"{name!r} is no resource limit", remedy=f"one of {', '.join(sorted(LIMITS))}")
        wanted = resource.RLIM_INFINITY if value == UNLIMITED else value
        if wanted > _MOST:
            raise InvalidRequest(f"the limit {name} is too high: {value}")
        found.append((LIMITS[name], wanted))
    return found


def _group(group: str) -> int:
    if group.isascii() and group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise InvalidRequest(f"{group!r} is no group of this node") from None
