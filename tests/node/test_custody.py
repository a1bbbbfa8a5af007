"""A migration ended and phauld was killed before the record of the workload said so: the journal does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phaul_client import commit
from phaul_client.errors import PhaulError
from phauld import session
from phauld.journal import Journal
from phauld.trees import custody
from phauld.trees import restarts as restarts_module
from phauld.trees.restart_policy import NEVER, Attempts, Restart, When
from phauld.trees.restarts import Restarts
from phauld.trees.workload_records import Workload
from phauld.trees.workload_spec import WorkloadSpec
from phauld.trees.workloads import Workloads
from tests.nodes import until

pytestmark = pytest.mark.criu


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts_module, "UNSETTLED_POLL_SECONDS", 0.05)


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    made = await Journal.open(tmp_path / "journal.sqlite")
    yield made
    await made.aclose()


@pytest.fixture
async def workloads(tmp_path: Path) -> AsyncIterator[Workloads]:
    made = Workloads(tmp_path / "records", tmp_path / "log")
    yield made
    for each in made.list():
        if each.pid is not None:
            os.kill(each.pid, signal.SIGKILL)
    await until(lambda: not made._shims._reapers)
    await made.close()


async def ended(workloads: Workloads, mark: str, when: When = When.ALWAYS) -> Workload:
    """Killed in the midst of a migration, as its record says."""
    spec = WorkloadSpec(
        name="web",
        argv=("sleep", "100"),
        log_path=workloads.log_path("web"),
        env={"PATH": os.defpath},
        restart=Restart(when=when),
    )
    started = await workloads.run(spec)
    (started.directory / mark).write_text(json.dumps({"migration_id": "move"}))
    workloads.send_signal("web", signal.SIGKILL)
    await until(lambda: workloads.get("web").state == "ending")
    return workloads.get("web")


async def restarted(workloads: Workloads, journal: Journal, seconds: float = 0.4) -> Workload:
    """As it stands when a new phauld has looked at it."""
    restarts = Restarts(workloads, journal)
    await restarts.start()
    await asyncio.sleep(seconds)
    await restarts.close()
    return workloads.get("web")


LEFT = [
    (commit.Phase.DONE, When.ALWAYS, "moved"),
    (commit.Phase.DONE, When.NO, "moved"),
    (commit.Phase.CONFIRMED, When.ALWAYS, "moved"),  # its end waits for no disk, and may never be on record
    (commit.Phase.ROLLED_BACK, When.ALWAYS, "running"),
    (commit.Phase.ROLLED_BACK, When.NO, "exited"),
    *((phase, When.ALWAYS, "ending") for phase in (commit.Phase.COMMITTED, commit.Phase.HELD, commit.Phase.FREEZING)),
    (None, When.ALWAYS, "ending"),  # not on record: nobody knows
]


@pytest.mark.parametrize(("phase", "when", "state"), LEFT)
async def test_what_may_have_left(
    workloads: Workloads, journal: Journal, phase: commit.Phase | None, when: When, state: str
) -> None:
    await ended(workloads, "leaving.json", when)
    if phase is not None:
        await journal.outgoing("move").record(phase, destination="b:1")
    found = await restarted(workloads, journal)
    assert found.state == state
    assert found.moved_to == ("b:1" if state == "moved" else None)
    assert found.attempts.restarts == (state == "running")


@pytest.mark.parametrize(
    ("phase", "cleaned", "state"),
    [
        (session.Phase.RUNNING, True, "running"),
        (session.Phase.RUNNING, False, "ending"),  # pages may be missing, and the source's copy be needed
        (session.Phase.COMMITTING, False, "ending"),
        (session.Phase.ABORTED, True, "ending"),
        (None, False, "ending"),
    ],
)
async def test_what_may_have_arrived(
    workloads: Workloads, journal: Journal, phase: session.Phase | None, cleaned: bool, state: str
) -> None:
    await ended(workloads, "arriving.json")
    if phase is not None:
        record = journal.incoming("move", "a")
        await record.record(phase)
        if cleaned:
            await record.cleaned()
    found = await restarted(workloads, journal)
    assert (found.state, found.attempts.restarts) == (state, int(state == "running"))


async def test_doubt_that_ends_later(workloads: Workloads, journal: Journal) -> None:
    await ended(workloads, "leaving.json")
    record = journal.outgoing("move")
    await record.record(commit.Phase.HELD, destination="b:1")
    restarts = Restarts(workloads, journal)
    await restarts.start()
    await asyncio.sleep(0.4)
    assert workloads.get("web").state == "ending"
    await record.record(commit.Phase.ROLLED_BACK)
    async with asyncio.timeout(30):
        while workloads.get("web").state != "running":  # noqa: ASYNC110 - it is in another process
            await asyncio.sleep(0.02)
    await restarts.close()
    assert workloads.get("web").attempts == Attempts(restarts=1, in_a_row=1)


async def test_what_has_ended_cannot_leave(workloads: Workloads) -> None:
    gone = await ended(workloads, "leaving.json")
    with pytest.raises(PhaulError, match="has ended"):
        custody.leaves(gone, "another")


async def test_a_word_to_stop_it_is_heard_where_it_arrives(workloads: Workloads, tmp_path: Path) -> None:
    """SIGTERM was sent, the tree took its time, and moved meanwhile."""
    spec = WorkloadSpec(
        name="web",
        argv=("sleep", "100"),
        log_path=workloads.log_path("web"),
        env={"PATH": os.defpath},
        restart=Restart(when=When.ALWAYS),
    )
    started = await workloads.run(spec)
    assert custody.carried(started)[0] == spec
    stopping = asyncio.create_task(workloads.stop("web", signal.SIGCONT, 30))
    await until(lambda: (started.directory / "stopped.json").exists())
    assert custody.carried(started)[0].restart == NEVER
    workloads.send_signal("web", signal.SIGKILL)
    assert (await stopping).state == "exited"


@pytest.mark.parametrize("when", [When.ALWAYS, When.NO])
async def test_a_migration_that_nobody_knows_does_not_keep_it_from_being_stopped(
    workloads: Workloads, when: When
) -> None:
    """The journal was lost, for instance."""
    await ended(workloads, "leaving.json", when)
    if when is When.ALWAYS:
        with pytest.raises(PhaulError, match="on the move"):
            await workloads.stop("web", signal.SIGTERM, 0)
    workloads.is_open = lambda _: False
    assert (await workloads.stop("web", signal.SIGTERM, 0)).state == "exited"
    workloads.remove("web")


@pytest.mark.parametrize(("when", "state"), [(When.ALWAYS, "running"), (When.ON_FAILURE, "lost"), (When.NO, "lost")])
async def test_after_a_boot(workloads: Workloads, journal: Journal, when: When, state: str) -> None:
    """Nobody saw how it ended, and its shim is gone, too; what is on record is of another boot."""
    spec = WorkloadSpec(
        name="web",
        argv=("sleep", "100"),
        log_path=workloads.log_path("web"),
        env={"PATH": os.defpath},
        new_pid_namespace=False,
        restart=Restart(when=when),
    )
    started = await workloads.run(spec)
    assert started.pid is not None
    files = [started.directory / "shim.json", started.directory / "tree.json"]
    os.kill(json.loads(files[0].read_text())["pid"], signal.SIGKILL)
    os.kill(started.pid, signal.SIGKILL)
    await until(lambda: workloads.get("web").state == "lost")  # in this boot, without an init: who knows what is left?
    for file in files:
        file.write_text(json.dumps({**json.loads(file.read_text()), "boot_id": "another"}))
    found = await restarted(workloads, journal)
    assert (found.state, found.attempts.restarts) == (state, int(state == "running"))
