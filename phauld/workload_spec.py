"""How a workload is started: what travels with its tree. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from phaul_client.errors import InvalidRequest
from phauld.restart_policy import NEVER, Restart

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


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
    new_ipc_namespace: bool = False  #: what it has of System V IPC is its own, and moves along
    new_time_namespace: bool = False  #: its monotonic and boot-time clocks go on where they were on the next node
    restart: Restart = NEVER  #: whether it is started again when it has ended

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"{self.name!r} is not a name",
                remedy="letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 63",
            )
