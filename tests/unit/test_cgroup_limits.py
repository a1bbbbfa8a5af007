"""What limits are to the kernel and to systemd; whether what is there is what was asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from phaul_client.errors import InvalidRequest
from phauld.trees import cgroup_limits
from phauld.trees.workload_spec import UNLIMITED, CgroupLimits

ALL = CgroupLimits(memory_bytes=(64 << 20) + 5, cpu_millis=1500, pids=20)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hierarchy with all controllers, of plain files; we are in its topmost cgroup."""
    (tmp_path / "cgroup.procs").touch()
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory pids\n")
    monkeypatch.setattr(cgroup_limits, "own_cgroup", lambda pid=None: tmp_path)
    return tmp_path


def test_what_the_kernel_and_systemd_are_told() -> None:
    assert cgroup_limits.controls(ALL) == {
        "memory.max": str(64 << 20),
        "cpu.max": "150000 100000",
        "pids.max": "28",
    }
    assert cgroup_limits.scope_properties(ALL) == (f"MemoryMax={64 << 20}", "CPUQuota=150%", "TasksMax=28")
    assert (cgroup_limits.controls(UNLIMITED), cgroup_limits.scope_properties(UNLIMITED)) == ({}, ())


def test_a_controller_that_is_not_there_is_named(tree: Path) -> None:
    cgroup_limits.check(ALL)
    (tree / "cgroup.controllers").write_text("hugetlb cpu\n")
    with pytest.raises(InvalidRequest, match="cannot limit memory and pids: cgroup version 2 has only hugetlb, cpu"):
        cgroup_limits.check(ALL)
    cgroup_limits.check(CgroupLimits(cpu_millis=100))
    cgroup_limits.check(UNLIMITED)


def test_a_cgroup_is_made_with_the_limits_and_goes_with_its_record(tree: Path, tmp_path: Path) -> None:
    record = tmp_path / "web@1"
    record.mkdir()
    cgroup_limits.make(UNLIMITED, record)
    assert not (record / "cgroup.json").exists()
    cgroup_limits.make(CgroupLimits(pids=3), record)
    made = tree / "phaul-web@1"
    assert json.loads((record / "cgroup.json").read_text()) == {"path": str(made)}
    assert (made / "pids.max").read_text() == "11"
    os.unlink(made / "pids.max")  # the kernel's go with the directory
    cgroup_limits.drop(record)
    assert not made.exists()
    cgroup_limits.drop(record)


def test_a_scope_without_the_limits_is_refused(tree: Path) -> None:
    (tree / "memory.max").write_text(f"{64 << 20}\n")
    (tree / "cpu.max").write_text("max 100000\n")
    with pytest.raises(InvalidRequest, match="cannot limit cpu and pids: systemd does not enforce it"):
        cgroup_limits.verify(ALL, 1)
    cgroup_limits.verify(CgroupLimits(memory_bytes=64 << 20), 1)
