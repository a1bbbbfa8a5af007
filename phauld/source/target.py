"""What moves: a process by its PID, and the workload or container that it is, if it is one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phaul.v1 import migrations_pb2, node_pb2, remote_pb2, types_pb2
from phaul_client.containers.inspect import Found, container_of, find_container, is_to_its_monitor, with_log
from phaul_client.containers.runtimes import parse_container
from phaul_client.errors import InvalidRequest, PhaulError
from phaul_client.tree import identity
from phauld import convert
from phauld.trees import custody
from phauld.trees.restart_policy import NEVER
from phauld.trees.workload_records import Workload
from phauld.trees.workload_spec import UNLIMITED
from phauld.trees.workloads import Workloads

#: Problems of a process that are none of a container's: phaul sees to them.
DONE_FOR_CONTAINERS: Final = ("mount-namespace",)
#: Warnings that are errors for a container, which would not live long after its output has nobody to read it.
FATAL_FOR_CONTAINERS: Final = ("pipe-outside",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A tree, by its root."""

    pid: int
    identity: Mapping[str, Any] | None  #: whom the PID named when it was chosen; `None` once it need not be looked at
    process_name: str
    workload: Workload | None
    container: Found | None = None

    @property
    def name(self) -> str:
        """Of the container or the workload; empty for another process."""
        if self.container is not None:
            return str(self.container.name)
        return self.workload.name if self.workload is not None else ""

    @property
    def carried(self) -> tuple[Path, ...]:
        """Files that travel with it: its log."""
        if self.container is not None:
            return (self.container.log.path,) if self.container.log is not None else ()
        if self.workload is not None and self.workload.spec.log_path:
            return (Path(self.workload.spec.log_path),)
        return ()

    @property
    def spec(self) -> types_pb2.WorkloadSpec | None:
        """How it was started, as far as phaul knows."""
        if self.workload is not None:
            return convert.workload_message(custody.carried(self.workload)[0])
        if self.container is None:
            return None
        found = self.container
        return types_pb2.WorkloadSpec(
            name=re.sub(r"[^A-Za-z0-9_.-]", "_", f"{found.name.runtime}-{found.name.id}")[:63],
            argv=found.config["process"]["args"],
            log_path=str(found.log.path) if found.log is not None else "",
            own_pid_namespace=True,
        )

    @property
    def restarts(self) -> remote_pb2.RestartCount | None:
        """How often it was started again."""
        return convert.restart_count(custody.carried(self.workload)[1]) if self.workload is not None else None

    @property
    def is_restarted(self) -> bool:
        """Whether it is a workload that is started again when it has ended."""
        return self.workload is not None and self.workload.spec.restart != NEVER

    @property
    def is_limited(self) -> bool:
        """Whether it is a workload with limits of its cgroup."""
        return self.workload is not None and self.workload.spec.cgroup != UNLIMITED

    def leaves(self, migration_id: str) -> None:
        """From now on nobody else may start it here. Raises `PhaulError` if it has ended, `OSError`."""
        if self.workload is not None:
            custody.leaves(self.workload, migration_id)

    def weigh(self, problems: Iterable[types_pb2.Problem]) -> list[types_pb2.Problem]:
        """What of the problems of its processes is one for it, too. A container's are fewer, and some weigh more."""
        if self.container is None:
            return list(problems)
        left = [each for each in problems if not self._is_seen_to(each, self.container)]
        for each in left:
            if each.code in FATAL_FOR_CONTAINERS:
                each.severity = types_pb2.SEVERITY_ERROR
        return left

    def _is_seen_to(self, problem: types_pb2.Problem, container: Found) -> bool:
        match problem.code:
            case "mount-outside":
                return problem.subject in map(str, self.carried)
            case "pipe-outside":
                return is_to_its_monitor(container, problem.subject)
            case code:
                return code in DONE_FOR_CONTAINERS


async def find_target(
    request: migrations_pb2.StartMigrationRequest | node_pb2.PreflightRequest, workloads: Workloads
) -> Target:
    """What is to move. Raises `InvalidRequest`, `WorkloadNotFound`, `PhaulError` PID_NOT_FOUND."""
    workload = None
    match request.WhichOneof("target"):
        case "workload":
            if (name := parse_container(request.workload)) is not None:
                return _container_target(await find_container(name), workloads)
            workload = workloads.get(request.workload)
            if workload.is_arriving:
                message = f"{workload.name} is arriving here with the migration {workload.brought_by}"
                raise PhaulError(message, reason="WRONG_PHASE", remedy="phaul ps shows when it runs")
            if workload.pid is None:
                raise InvalidRequest(
                    f"{workload.name} does not run here: it is {workload.state}", remedy="phaul ps --all"
                )
            pid = workload.pid
        case "pid":
            pid = request.pid
            workload = workloads.by_pid(pid)
        case _:
            raise InvalidRequest("neither a pid nor a workload was named")
    if (container := await container_of(pid)) is not None:
        return _container_target(container, workloads)
    return _target(pid, workload)


def _container_target(container: Found, workloads: Workloads) -> Target:
    pid = container.init.pid
    container = with_log(container, workloads.log_dir)
    return dataclasses.replace(_target(pid, workloads.by_pid(pid)), container=container)


def _target(pid: int, workload: Workload | None) -> Target:
    try:
        known = identity(pid)
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        raise PhaulError(f"there is no process {pid}", reason="PID_NOT_FOUND", remedy="ps shows what runs") from None
    return Target(pid=pid, identity=known, process_name=name, workload=workload)
