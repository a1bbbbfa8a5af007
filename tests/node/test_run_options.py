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
    status_lines = (await node.run(["cat", f"/proc/{found['pid']}/status"])).stdout.splitlines()
    assert "Uid:\t4242\t4242\t4242\t4242" in status_lines
    assert "Gid:\t4243\t4243\t4243\t4243" in status_lines
    await node.phaul("stop", "web", check=True)
