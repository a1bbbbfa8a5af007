"""Limits of a whole workload, on two kernels that have them: enforced, also where it moves to, and gone with it."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from tests.vm.guest import Guest
from tests.vm.lab import Lab
from tests.vm.scenarios import Answer, Moved, move, ready, take

LIMITS: Final = {"memory_bytes": 64 << 20, "cpu_millis": 500, "pids": 20}
HELD: Final = {"memory.max": str(64 << 20), "cpu.max": "50000 100000", "pids.max": "28"}
HUNGRY: Final = ["tail", "/dev/zero"]  # looks for the end of a line, and keeps all that it has read
FORKS: Final = ["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do sleep 100 & done; wait"]
READ: Final = "cd /sys/fs/cgroup/phaul-$0@* && grep . memory.max cpu.max pids.max"
ENDED: Final = "until cat /var/lib/phaul/workloads/$0@*/exit.json 2>/dev/null; do sleep 0.2; done"
GONE: Final = "while ls -d /sys/fs/cgroup/phaul-$0@*; do sleep 0.2; done"


@pytest.fixture(autouse=True)
def _is_asked_for(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--all"):
        pytest.skip("a minute of emulation: only with --all")


def run(name: str, argv: list[str], on: str, **limits: int) -> Answer:
    return {"run": name, "argv": argv, "on": on, "spec": {"cgroup_limits": limits}}


async def exit_code(guest: Guest, name: str) -> Any:
    return json.loads((await guest.run(["sh", "-c", ENDED, name])).stdout)["exit_code"]


async def test_limits_are_enforced_and_move_along_and_go_with_the_tree(lab: Lab) -> None:
    await ready(lab, bytes_per_second=None)
    answers = await take(
        lab,
        [
            run("hungry", HUNGRY, "a", memory_bytes=48 << 20),
            run("many", FORKS, "a", pids=3),
            run("limited", ["sleep", "1000"], "a", **LIMITS),
            move("limited", "a", "b", "STOP_COPY"),
        ],
    )
    assert Moved(answers[3]).done, answers[3]
    lines = (await lab.b.run(["sh", "-c", READ, "limited"])).stdout.splitlines()
    assert dict(line.split(":", 1) for line in lines) == HELD
    assert await exit_code(lab.a, "hungry") == 128 + 9
    assert await exit_code(lab.a, "many") == 2  # "Cannot fork"
    await lab.b.run(["pkill", "-KILL", "-f", "tini -- .*[s]leep 1000"])
    for guest in lab.guests:
        for name in ("limited", "hungry", "many"):
            await guest.run(["sh", "-c", GONE, name])
