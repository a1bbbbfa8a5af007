"""What `phaul run` was told of a program moves along with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.node.test_daemons import migrate
from tests.nodes import Nodes

pytestmark = pytest.mark.criu


async def test_limits_move_along(daemons: Nodes) -> None:
    a, b, _ = daemons
    await a.phaul("run", "--name", "web", "--limit", "nofile=77", "--limit", "core=0", "--", "sleep", "100", check=True)
    status, report = await migrate(a, "web", b)
    assert status == 0, report
    (moved,) = (await b.phaul("ps", "--json", check=True)).json()["workloads"]
    assert {name: int(value) for name, value in moved["spec"]["limits"].items()} == {"nofile": 77, "core": 0}
    limits = (await b.run(["cat", Path(f"/proc/{moved['pid']}/limits")])).stdout
    found = {line[:25].strip(): line[25:].split()[:2] for line in limits.splitlines()}
    assert found["Max open files"] == ["77", "77"]
    assert found["Max core file size"] == ["0", "0"]
    await b.phaul("stop", "web", check=True)


async def test_a_program_of_another_user_moves_or_is_refused_before_anything_freezes(daemons: Nodes) -> None:
    """criu may read the limits of another user's process only with CAP_SYS_RESOURCE."""
    a, b, _ = daemons
    await a.phaul("run", "--name", "web", "--user", "4242:4243", "--", "sleep", "100", check=True)
    status, report = await migrate(a, "web", b)
    codes = {each["code"] for each in report["problems"] if each["severity"] == "error"}
    assert (status == 0) == (codes == set()), report
    assert codes <= {"other-user"}
    node = b if status == 0 else a
    (found,) = (await node.phaul("ps", "--json", check=True)).json()["workloads"]
    program = (await node.run(["cat", f"/proc/{found['pid']}/task/{found['pid']}/children"])).stdout.strip()
    status_lines = (await node.run(["cat", f"/proc/{program}/status"])).stdout.splitlines()  # the init is root's
    assert "Uid:\t4242\t4242\t4242\t4242" in status_lines
    assert "Gid:\t4243\t4243\t4243\t4243" in status_lines
    await node.phaul("stop", "web", check=True)


@pytest.mark.parametrize(
    ("option", "value", "controller", "file", "holds"),
    [
        ("--memory", "64M", "memory", "memory.max", str(64 << 20)),
        ("--cpus", "0.5", "cpu", "cpu.max", "50000 100000"),
        ("--pids", "20", "pids", "pids.max", "28"),
    ],
)
async def test_a_limit_of_all_of_it_is_enforced_or_refused(
    nodes: Nodes, option: str, value: str, controller: str, file: str, holds: str
) -> None:
    """Which of them depends on the machine; tests/vm/test_limits.py has one that can."""
    a = nodes.a
    await a.start_phauld()
    done = await a.phaul("run", "--name", "web", option, value, "--", "sleep", "100")
    if done.returncode == 0:
        (shown,) = (await a.phaul("ps", "--json", check=True)).json()["workloads"]
        cgroup = Path(f"/proc/{shown['pid']}/cgroup")
        path = (await a.run(["sed", "-n", "s/^0:://p", cgroup])).stdout.strip()
        mount = (await a.run(["findmnt", "-n", "-o", "TARGET", "-t", "cgroup2"])).stdout.split()[0]
        assert (await a.run(["cat", f"{mount}{path}/{file}"])).stdout.strip() == holds
        await a.phaul("stop", "web", check=True)
    else:
        assert done.stderr.startswith(f"phaul: error: this node cannot limit {controller}: "), done.stderr
        assert "remedy: " in done.stderr
        assert (await a.phaul("ps", "--all", "--json", check=True)).json() == {"workloads": []}
        assert list((a.root / "run/phaul/state/workloads").iterdir()) == []
