"""What moves: its name, its log, how it was started, and what of the problems of its processes is one for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client.containers.inspect import Found, LogFile
from phaul_client.containers.podman import PodmanFacts
from phaul_client.containers.runtimes import RUNTIMES, ContainerName, Init
from phaul_client.errors import InvalidRequest, PhaulError
from phauld.source.target import Target, find_target
from phauld.trees.workload_records import Workload
from phauld.trees.workload_spec import WorkloadSpec
from phauld.trees.workloads import Workloads

PODMAN = PodmanFacts(
    id="4711",
    name="web",
    runtime="crun",
    image="",
    static_dir="",
    run_dir="",
    log_path=None,
    networks=(),
    has_network=False,
    why_not=None,
)


@pytest.fixture
def piped() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE) as child:
        yield child
        child.kill()


def container(pid: int = 42, *, log: str = "", podman: PodmanFacts | None = None) -> Target:
    found = Found(
        name=ContainerName("crun", "we:b"),
        runtime=RUNTIMES["crun"],
        init=Init(pid=pid, start_ticks=7, bundle="/srv", rootfs="rootfs", created="", cgroup_manager=""),
        config={"process": {"args": ["serve", "--all"]}},
        log=LogFile(Path(log), "log") if log else None,
        podman=podman,
    )
    return Target(pid=pid, identity=None, process_name="serve", workload=None, container=found)


def workload(log: str = "") -> Target:
    spec = WorkloadSpec(name="counter", argv=("count",), log_path=log, user="nobody")
    record = Workload(directory=Path("/nowhere"), spec=spec, state="running", pid=42, created_at=0.0)
    return Target(pid=42, identity=None, process_name="count", workload=record)


def warnings(*named: tuple[str, str]) -> list[types_pb2.Problem]:
    return [
        types_pb2.Problem(code=code, subject=subject, severity=types_pb2.SEVERITY_WARNING) for code, subject in named
    ]


def test_a_process_that_nobody_knows_has_a_pid_and_no_more() -> None:
    process = Target(pid=42, identity=None, process_name="sleep", workload=None)
    assert (process.name, process.carried, process.spec) == ("", (), None)


def test_a_workload_takes_its_log_along() -> None:
    moved = workload("/var/log/counter.log")
    assert (moved.name, moved.carried) == ("counter", (Path("/var/log/counter.log"),))
    assert workload().carried == ()
    assert moved.spec is not None
    assert (moved.spec.name, list(moved.spec.argv), moved.spec.user) == ("counter", ["count"], "nobody")


def test_a_container_is_a_workload_where_it_comes_to() -> None:
    moved = container(log="/var/log/web.log")
    assert (moved.name, moved.carried) == ("crun:we:b", (Path("/var/log/web.log"),))
    assert moved.spec is not None
    assert (moved.spec.name, list(moved.spec.argv)) == ("crun-we_b", ["serve", "--all"])
    assert (moved.spec.log_path, moved.spec.own_pid_namespace) == ("/var/log/web.log", True)


def test_problems_of_a_process_are_its_own() -> None:
    problems = warnings(("mount-namespace", "pid 42"), ("pipe-outside", "pipe:[7]"))
    assert workload("/var/log/counter.log").weigh(problems) == problems


def test_a_container_has_others() -> None:
    problems = warnings(
        ("mount-namespace", "pid 42"),
        ("mount-outside", "/var/log/web.log"),
        ("mount-outside", "/data"),
        ("pipe-outside", "pipe:[7]"),
    )
    left = container(log="/var/log/web.log").weigh(problems)
    assert [(each.code, each.subject, each.severity) for each in left] == [
        ("mount-outside", "/data", types_pb2.SEVERITY_WARNING),
        ("pipe-outside", "pipe:[7]", types_pb2.SEVERITY_ERROR),
    ]


def test_podmans_monitor_is_there_as_well(piped: subprocess.Popen[bytes]) -> None:
    problems = warnings(("pipe-outside", os.readlink(f"/proc/{piped.pid}/fd/1")))
    assert container(piped.pid, podman=PODMAN).weigh(problems) == []
    assert container(piped.pid).weigh(problems) == problems


async def test_it_is_found_by_what_was_asked_for(tmp_path: Path) -> None:
    workloads = Workloads(tmp_path / "workloads", tmp_path / "logs")
    found = await find_target(migrations_pb2.StartMigrationRequest(pid=os.getpid()), workloads)
    assert (found.pid, found.name, found.container) == (os.getpid(), "", None)
    assert found.identity is not None
    with pytest.raises(InvalidRequest):
        await find_target(migrations_pb2.StartMigrationRequest(), workloads)
    with pytest.raises(PhaulError) as refused:
        await find_target(migrations_pb2.StartMigrationRequest(pid=2**22), workloads)
    assert refused.value.reason == "PID_NOT_FOUND"
