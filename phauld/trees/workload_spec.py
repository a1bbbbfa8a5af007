"""How a workload is started: what travels with its tree. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from phaul_client.errors import InvalidRequest
from phauld.trees.restart_policy import NEVER, Restart, When

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """What all of a workload together may use; 0: no limit."""

    memory_bytes: int = 0
    cpu_millis: int = 0  #: thousandths of a processor
    pids: int = 0  #: processes and threads


UNLIMITED: Final = CgroupLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """How a workload is started; it travels with the tree."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    log_path: str = ""  #: where its output goes, the same path on every node; empty for trees that phaul did not start
    new_pid_namespace: bool = True
    user: str = ""  #: who it runs as, with ":group" if wanted; empty: as phauld
    limits: Mapping[str, int] = field(default_factory=dict)  #: soft and hard, see `identities.py`
    cgroup: CgroupLimits = UNLIMITED  #: of all of it together, see `cgroup_limits.py`
    new_ipc_namespace: bool = False  #: what it has of System V IPC is its own, and moves along
    new_time_namespace: bool = False  #: its monotonic and boot-time clocks go on where they were on the next node
    restart: Restart = NEVER  #: whether it is started again when it has ended

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"{self.name!r} is not a name",
                remedy="letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 63",
            )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Of a record, perhaps of an older phauld."""
        restart = content.get("restart", {})
        told = Restart(when=When(restart.get("when", When.NO)), most=restart.get("most", 0))
        limits = CgroupLimits(**content.get("cgroup", {}))
        return cls(**{**content, "argv": tuple(content["argv"]), "restart": told, "cgroup": limits})
