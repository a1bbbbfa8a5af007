"""What a shim needs to start a workload on this node, or why it cannot be started here."""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import Any

from phaul_client.errors import InvalidRequest
from phauld.trees import cgroup_limits, identities
from phauld.trees.workload_spec import WorkloadSpec


def told(spec: WorkloadSpec) -> dict[str, Any]:
    """What the shim needs to start it on this node. Raises `InvalidRequest`."""
    _check_directory(spec.cwd)
    cgroup_limits.check(spec.cgroup)
    identity, limits = identities.of_user(spec.user), identities.resource_limits(spec.limits)
    init = shutil.which("tini") if spec.new_pid_namespace else None
    if spec.new_pid_namespace and init is None:
        raise InvalidRequest("tini, the init of workloads, is missing", remedy="apt-get install tini")
    search = spec.env.get("PATH", os.defpath)
    program = shutil.which(spec.argv[0], path=search) if "/" not in spec.argv[0] else spec.argv[0]
    if program is None or not _is_program(os.path.join(spec.cwd, program)):
        remedy = f"searched in {search}"
        if "/" in spec.argv[0]:
            seen_from = "" if spec.argv[0].startswith("/") else f", seen from {spec.cwd}"
            remedy = f"it must be a file that may be executed{seen_from}"
        raise InvalidRequest(f"{spec.argv[0]!r} is no program on this node", remedy=remedy)
    argv, ids = [program, *spec.argv[1:]], identity
    if init is not None:
        argv, ids = [init, "--", *identities.becoming(identity), *argv], None
    return {**dataclasses.asdict(spec), "argv": argv, "ids": ids, "rlimits": limits}


def _is_program(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def _check_directory(path: str) -> None:
    if not os.path.isdir(path):
        raise InvalidRequest(f"the working directory {path!r} is no directory on this node")
