"""What works in a freeze goes first; the tree that moved, and both daemons, do not once it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from phaul_client.tree import descendants
from phaul_criu.urgency import hurry
from tests.nodes import Nodes, until
from tests.victims.heartbeat import read_beats

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

HEARTBEAT: Final = [sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "victims/heartbeat.py")]


async def test_a_tree_keeps_its_own_priority(daemons: Nodes, tmp_path: Path) -> None:
    """One that is nicer than others, and stays so; criu and phauld had the highest in between."""
    beats = tmp_path / "beats"
    argv = ["nice", "-n", "7", *HEARTBEAT, str(beats), "--mib", "16"]
    started = await daemons.a.phaul("run", "--name", "victim", "--", *argv)
    assert started.returncode == 0, started.stderr
    await until(lambda: read_beats(beats).count > 20, 30)
    moved = await daemons.a.phaul("migrate", "victim", "--to", daemons.b.address, "--restore", "lazy")
    assert moved.returncode == 0, moved.stdout + moved.stderr
    for node in (daemons.a, daemons.b):
        assert node.daemon.process is not None
        phauld = node.daemon.process.pid
        await _calm(phauld)
    [tini] = [pid for pid in descendants(phauld) if "tini" in _argv(pid)[0]]
    assert [_policies(pid) for pid in descendants(tini)] == [[(os.SCHED_OTHER, 0)], [(os.SCHED_OTHER, 7)]]
    await daemons.b.phaul("stop", "victim", "--grace", "0")


def test_who_holds_a_tree_is_the_last_to_go_for_want_of_memory() -> None:
    with subprocess.Popen(["sleep", "60"]) as held:
        score = Path(f"/proc/{held.pid}/oom_score_adj")
        try:
            score.write_text("-1")
            hurry(held.pid)
            assert score.read_text().strip() == "-1000"
        except PermissionError:
            pytest.skip("needs CAP_SYS_RESOURCE, which root does not have here")
        finally:
            held.kill()


async def _calm(pid: int) -> None:
    await until(lambda: set(_policies(pid)) == {(os.SCHED_OTHER, 0)})


def _policies(pid: int) -> list[tuple[int, int]]:
    tasks = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    return [(os.sched_getscheduler(task), os.getpriority(os.PRIO_PROCESS, task)) for task in tasks]


def _argv(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
