"""What is left of a tree that the journal knows."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from phaul_client.tree import identity
from phauld.source.coordinators import recorded_tree


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_tree_that_was_written_down_is_that_one(child: subprocess.Popen[bytes]) -> None:
    task = {**identity(child.pid), "stopped_by_us": True}
    with recorded_tree({"tree": [task], "root": identity(os.getpid()), "stopped_before": []}) as tree:
        assert tree.identities() == [task]


def test_before_that_every_task_below_its_root_may_have_been_stopped(child: subprocess.Popen[bytes]) -> None:
    for stopped_before in ([], [child.pid]):
        with recorded_tree({"root": identity(child.pid), "stopped_before": stopped_before}) as tree:
            assert tree.identities() == [{**identity(child.pid), "stopped_by_us": not stopped_before}]


def test_another_process_with_its_pid_is_not_it(child: subprocess.Popen[bytes]) -> None:
    other = {**identity(child.pid), "start_ticks": 1}
    details: list[dict[str, Any]] = [{"root": None}, {"root": other}, {"tree": []}, {}]
    for detail in details:
        with recorded_tree(detail) as tree:
            assert tree.identities() == []
