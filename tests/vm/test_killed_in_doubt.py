"""Points of the matrix of faults with a whole guest killed: kernel, daemon, criu and trees at once, and only silence.

Several migrations are brought to their points one after the other, each held by a gate in a criu; then one guest dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.conftest import Report
from tests.faults.victim import SLOT, SLOTS
from tests.started import Completed
from tests.vm.guest import Guest
from tests.vm.lab import Lab
from tests.vm.scenarios import IN_GUEST, Answer, take

GATES: Final = "/run/gates"
GATE_PORT: Final = 7200
LEASE_SECONDS: Final = 5
CLEAN_SECONDS: Final = 60.0
VICTIM: Final = "/phaul/tests/faults/victim.py"
END_PHAULD: Final = "while pkill -KILL -f '[p]hauld --listen'; do sleep 0.1; done"
#: what a migration may leave behind, as text; the shims are those of trees
LEFT: Final = """
find /dev/shm/phaul /var/lib/phaul/images -mindepth 1 -maxdepth 1 2>/dev/null
pgrep -a criu
pgrep -af '[s]him.py restore'
nft list tables 2>/dev/null | grep -i criu
true
"""


@pytest.fixture(autouse=True)
def _is_asked_for(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--all"):
        pytest.skip("two minutes of emulation: only with --all")


@pytest_asyncio.fixture(loop_scope="session")
async def gated(_is_asked_for: None, lab: Lab) -> AsyncIterator[Lab]:
    """Both guests with a phauld whose criu is behind a gate; what is left of it ends with the test."""
    await asyncio.gather(*map(_start, lab.guests))
    yield lab
    for guest in lab.guests:
        if guest.running:
            await guest.run(["sh", "-c", f"{END_PHAULD}; pkill -f '[v]ictim.py'; pkill -f '[g]ate.py'; true"])


async def _start(guest: Guest) -> None:
    await guest.run(["sh", "-c", END_PHAULD])
    await guest.start(["python3", "-I", IN_GUEST / "gate.py", GATES, str(GATE_PORT)])
    await guest.run(["sh", "-c", f"until test -e {GATES}/criu; do sleep 0.1; done"])
    await guest.start_phauld("--criu", f"{GATES}/criu", "--lease-seconds", str(LEASE_SECONDS))


async def _hold(guest: Guest, *steps: str) -> None:
    for step in steps:
        await guest.put(f"{GATES}/hold/{step}", b"")


def _begin(name: str, gate: str, step: str, **options: Any) -> list[Answer]:
    """Run a victim on `a` and send it to `b`, until a criu on `gate` is held at the step.

    Its name is the migration's id as well: no two tests may use the same, or the second is told how the first ended.
    """
    argv = ["python3", "-I", "-S", VICTIM, _beats(name), "--mib", "1"]
    asked = {"mode": "MODE_STOP_COPY", "restore_mode": "RESTORE_MODE_EAGER", "in_doubt_timeout": "0.5s", **options}
    return [
        {"run": name, "argv": argv, "on": "a"},
        {"start": name, "id": name, "from": "a", "to": "b", "options": asked},
        {"gate": gate, "port": GATE_PORT, "holds": step},
    ]


def _beats(name: str) -> str:
    return f"/run/{name}.beats"


async def _make_files(lab: Lab, *names: str) -> None:
    for guest in lab.guests:
        for name in names:
            await guest.put(_beats(name), bytes(SLOT.size * SLOTS))


async def _read(guest: Guest, name: str) -> tuple[int, int]:
    """How often it has beaten there, and how often its memory was not as it was."""
    count, _, _, failures = SLOT.unpack_from(await guest.get(_beats(name)))
    return count, failures


async def _is_beating(guest: Guest, name: str, seconds: float = 1.5) -> bool:
    before, _ = await _read(guest, name)
    for _ in range(5):
        await asyncio.sleep(seconds / 5)
        count, failures = await _read(guest, name)
        assert not failures
        if count > before:
            return True
    return False


async def _starts_to_beat(guest: Guest, name: str) -> None:
    async with asyncio.timeout(CLEAN_SECONDS):
        while not await _is_beating(guest, name):
            pass


async def _left(guest: Guest) -> list[str]:
    done: Completed = await guest.run(["sh", "-c", LEFT])
    return done.stdout.splitlines()


async def _until_left(guest: Guest, shims: Sequence[str] = ()) -> list[str]:
    """Nothing but the shims of those trees; what else there was when patience ended."""
    try:
        async with asyncio.timeout(CLEAN_SECONDS):
            while len(left := await _left(guest)) != len(shims):  # noqa: ASYNC110
                await asyncio.sleep(0.3)
    except TimeoutError:
        pass
    return [line for line in left if "shim restore " not in line or not shims]


def _row(point: str, fault: str, outcome: str, alive: int, leftovers: Sequence[str]) -> Answer:
    """As a row of the matrix."""
    return {
        "point": point,
        "fault": fault,
        "outcome": outcome,
        "alive": alive,
        "data_intact": True,
        "leftovers": list(leftovers),
    }


async def test_the_destination_is_killed(gated: Lab, json_report: Report) -> None:
    """Before the commit, after it, and while the tree runs there already: resumed, and held until a person decides."""
    a, b = gated.guests
    await _make_files(gated, "ran", "told", "built")
    await _hold(b, "restore:post-resume:notify#1", "restore:post-restore:answer#2", "restore:post-restore:notify#3")
    await take(
        gated,
        [
            *_begin("ran", "b", "restore:post-resume:notify#1"),
            *_begin("told", "b", "restore:post-restore:answer#2"),
            *_begin("built", "b", "restore:post-restore:notify#3"),
        ],
    )
    assert await _is_beating(b, "ran")
    assert not any([await _is_beating(b, name, 0.5) for name in ("told", "built")])
    assert not any([await _is_beating(a, name, 0.5) for name in ("ran", "told", "built")])
    await b.kill()
    ended, ran, told = await take(
        gated,
        [
            {"until": "built", "from": "a", "phases": ["ROLLED_BACK"]},
            {"until": "ran", "from": "a", "phases": ["HELD"]},
            {"until": "told", "from": "a", "phases": ["HELD"]},
        ],
    )
    assert ended["error"]["reason"] == "ERROR_REASON_PEER_UNREACHABLE", ended
    assert await _is_beating(a, "built")
    assert ran["in_doubt"]
    assert told["in_doubt"]
    assert not any([await _is_beating(a, name, 0.5) for name in ("ran", "told")])
    resumed, killed = await take(
        gated,
        [
            {"resolve": "told", "from": "a", "resolution": "RESUME", "reason": "its node is gone"},
            {"resolve": "ran", "from": "a", "resolution": "KILL", "reason": "it died with its node"},
        ],
    )
    assert resumed["phase"] == "MIGRATION_PHASE_ROLLED_BACK", resumed
    assert killed["phase"] == "MIGRATION_PHASE_DONE", killed
    assert await _is_beating(a, "told")
    assert not await _is_beating(a, "ran", 0.5)
    left = await _until_left(a)
    json_report["guests_killed"] = [
        *json_report.get("guests_killed", []),
        _row("b:restore:post-restore:notify", "kill-destination-guest", "resumed", 1, left),
        _row("b:restore:post-restore:answer", "kill-destination-guest, then resolve resume", "resumed", 1, left),
        _row("b:restore:post-resume:notify", "kill-destination-guest, then resolve kill", "held", 0, left),
    ]
    assert left == []


async def test_the_source_is_killed(gated: Lab, json_report: Report) -> None:
    """After the commit it runs on, once; before it, there is nothing to be had and nothing may be left."""
    a, b = gated.guests
    await _make_files(gated, "decided", "prepared", "round")
    await _hold(b, "restore:post-restore:answer#1", "restore:post-restore:notify#2")
    await _hold(a, "pre-dump:response#1")
    await take(
        gated,
        [
            *_begin("decided", "b", "restore:post-restore:answer#1"),
            *_begin("round", "a", "pre-dump:response#1", mode="MODE_PRE_COPY"),
            *_begin("prepared", "b", "restore:post-restore:notify#2"),
        ],
    )
    assert not any([await _is_beating(b, name, 0.5) for name in ("decided", "prepared", "round")])
    assert await _is_beating(a, "round")
    await a.kill()
    await b.run(["rm", f"{GATES}/held/restore:post-restore:answer#1", f"{GATES}/held/restore:post-restore:notify#2"])
    await _starts_to_beat(b, "decided")
    left = await _until_left(b, shims=["decided"])
    assert not any([await _is_beating(b, name, 0.5) for name in ("prepared", "round")])
    assert (await _read(b, "prepared"))[0] == 0
    assert await _is_beating(b, "decided")
    json_report["guests_killed"] = [
        *json_report.get("guests_killed", []),
        _row("b:restore:post-restore:answer", "kill-source-guest", "moved", 1, left),
        _row("b:restore:post-restore:notify", "kill-source-guest", "gone with its node", 0, left),
        _row("a:pre-dump:response", "kill-source-guest", "gone with its node", 0, left),
    ]
    assert left == []
