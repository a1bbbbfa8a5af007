"""The runtimes whose containers phaul knows by name, as a table (pure).

A container moves as any tree does: criu takes its init, phaul keeps the commit protocol. The runtime at the destination
makes the container's cgroups and its own record, by `create`, before anything is frozen; the init that it makes is
killed at once and never runs a program. Once the tree is built and held, the record is made to name it. So each runtime
needs little here: where its records are, and which of their fields name the init.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

from phaul_client.errors import InvalidRequest, PhaulError

Record: TypeAlias = dict[str, Any]

_ID: Final = re.compile(r"[A-Za-z0-9_+.-]{1,128}")


class ContainerName(NamedTuple):
    """RUNTIME:ID."""

    runtime: str
    id: str

    def __str__(self) -> str:
        return f"{self.runtime}:{self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Init:
    """The first process of a container, as a record names it."""

    pid: int
    start_ticks: int
    bundle: str
    rootfs: str
    created: str
    cgroup_manager: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One runtime."""

    name: str
    state_root: str = ""  #: where its records are; each in a directory of the container's name
    record: str = ""  #: the name of the file
    init: Callable[[Record], Init] | None = None  #: reads a record
    with_init: Callable[[Record, int, int], Record] | None = None  #: makes it name another init: PID, clock ticks
    manager: Callable[[str], tuple[str, ...]] = lambda _: ()  #: the flags that make cgroups so


def _runc_init(record: Record) -> Init:
    labels = dict(label.partition("=")[::2] for label in record["config"].get("labels") or ())
    cgroups = record["config"].get("cgroups") or {}
    return Init(
        pid=record["init_process_pid"],
        start_ticks=record["init_process_start"],
        bundle=labels.get("bundle", ""),
        rootfs=record["config"]["rootfs"],
        created=record["created"],
        cgroup_manager="systemd" if cgroups.get("systemd") else "cgroupfs",
    )


def _runc_with_init(record: Record, pid: int, start_ticks: int) -> Record:
    before = f"/proc/{record['init_process_pid']}/"
    paths = {
        kind: path.replace(before, f"/proc/{pid}/", 1) if path.startswith(before) else path
        for kind, path in (record.get("namespace_paths") or {}).items()
    }
    return {**record, "init_process_pid": pid, "init_process_start": start_ticks, "namespace_paths": paths}


def _crun_init(record: Record) -> Init:
    return Init(
        pid=record["pid"],
        start_ticks=record["process-start-time"],
        bundle=record["bundle"],
        rootfs=record["rootfs"],
        created=record["created"],
        cgroup_manager="systemd" if record.get("systemd-cgroup") else _crun_manager(record),
    )


def _crun_manager(record: Record) -> str:
    return "cgroupfs" if record.get("cgroup-path") else "disabled"


def _crun_with_init(record: Record, pid: int, start_ticks: int) -> Record:
    return {**record, "pid": pid, "process-start-time": start_ticks}


RUNTIMES: Final[Mapping[str, Runtime]] = MappingProxyType(
    {
        each.name: each
        for each in (
            Runtime(
                name="runc",
                state_root="/run/runc",
                record="state.json",
                init=_runc_init,
                with_init=_runc_with_init,
                manager=lambda manager: ("--systemd-cgroup",) if manager == "systemd" else (),
            ),
            Runtime(
                name="crun",
                state_root="/run/crun",
                record="status",
                init=_crun_init,
                with_init=_crun_with_init,
                manager=lambda manager: (f"--cgroup-manager={manager}",),
            ),
            Runtime(
                name="podman",  # has one of the others do it, see podman.py: no record is its own
            ),
        )
    }
)


def parse_container(text: str) -> ContainerName | None:
    """RUNTIME:ID; `None` for what is no name of a container. Raises `InvalidRequest`."""
    runtime, colon, name = text.partition(":")
    if not colon:
        return None
    if runtime not in RUNTIMES:
        known = ", ".join(sorted(RUNTIMES))
        raise InvalidRequest(f"{runtime!r} is no runtime of containers that phaul knows", remedy=f"known: {known}")
    if not _ID.fullmatch(name) or name in (".", ".."):
        raise InvalidRequest(f"{name!r} is no name of a container")
    return ContainerName(runtime, name)


def runtime_of(name: ContainerName) -> Runtime:
    """Raises `PhaulError` UNSUPPORTED for one that has others do it."""
    runtime = RUNTIMES[name.runtime]
    if runtime.init is None:
        raise PhaulError(f"{name}: {runtime.name} keeps no records of its own", reason="UNSUPPORTED")
    return runtime
