"""The journal: what is written is there, in order."""

import asyncio
import time
from pathlib import Path

import pytest

from phaul_client.commit import Phase
from phauld import session
from phauld.errors import MigrationNotFound, PhaulError
from phauld.journal import INLINE_SECONDS, Journal


async def test_an_outgoing_migration_from_its_first_phase_to_its_report(journal: Journal) -> None:
    record = journal.outgoing("m1")
    record.note(pid=42, options={"mode": "auto", "old": 1})
    await record.record(Phase.OPENING)
    record.note(options={"mode": "pre-copy"})
    record.note(path="/\udc80")
    await record.record(Phase.COMMITTED, tasks=[[42, 1000]])
    await record.report({"pause_seconds": 0.25})
    entry = await journal.get_outgoing("m1")
    assert entry is not None
    assert entry.phase is Phase.COMMITTED
    assert entry.detail == {"pid": 42, "options": {"mode": "pre-copy"}, "path": "/\udc80", "tasks": [[42, 1000]]}
    assert entry.report == {"pause_seconds": 0.25}
    assert entry.created_at < entry.updated_at <= time.time()


async def test_an_incoming_session_from_its_first_phase_to_its_end(journal: Journal) -> None:
    record = journal.incoming("m1", "node-a")
    record.note(request="AAEC")
    await record.record(session.Phase.OPEN)
    record.note_failure({"reason": "LEASE_EXPIRED"})
    await record.record(session.Phase.ABORTED)
    await journal.incoming("m1", "node-b").record(session.Phase.ABORTED)
    entry = await journal.get_incoming("m1")
    assert entry is not None
    assert (entry.phase, entry.source_node_id, entry.cleaned) == (session.Phase.ABORTED, "node-a", False)
    assert (entry.detail, entry.failure) == ({"request": "AAEC"}, {"reason": "LEASE_EXPIRED"})


async def test_a_note_alone_writes_nothing(journal: Journal) -> None:
    record = journal.outgoing("m1")
    record.note(pid=42)
    assert await journal.get_outgoing("m1") is None


async def test_notes_of_a_restarted_phauld_add_to_those_on_record(path: Path) -> None:
    journal = await Journal.open(path)
    await journal.outgoing("m1").record(Phase.COMMITTED, pid=42, tries=1)
    await journal.aclose()
    journal = await Journal.open(path)
    await journal.outgoing("m1").record(Phase.HELD, tries=2)
    entry = await journal.get_outgoing("m1")
    await journal.aclose()
    assert entry is not None
    assert (entry.phase, entry.detail) == (Phase.HELD, {"pid": 42, "tries": 2})


async def test_an_id_that_was_never_seen(journal: Journal) -> None:
    assert await journal.get_outgoing("m1") is None
    assert await journal.get_incoming("m1") is None
    with pytest.raises(MigrationNotFound):
        await journal.outgoing("m1").report({})
    with pytest.raises(MigrationNotFound):
        await journal.incoming("m1", "a").cleaned()


async def test_the_newest_first_and_the_finished_left_out(journal: Journal) -> None:
    for phase in (Phase.DONE, Phase.HELD, Phase.ROLLED_BACK, Phase.OPENING):
        await journal.outgoing(phase).record(phase)
    assert [each.migration_id for each in await journal.list_outgoing()] == ["OPENING", "ROLLED_BACK", "HELD", "DONE"]
    assert [each.migration_id for each in await journal.list_outgoing(limit=1)] == ["OPENING"]
    assert [each.migration_id for each in await journal.unfinished_outgoing()] == ["OPENING", "HELD"]


async def test_a_session_is_unfinished_until_it_is_final_and_cleaned(journal: Journal) -> None:
    """ABORTED is recorded before the kill: a crash between the two must be seen to."""
    for phase in (session.Phase.ABORTED, session.Phase.PREPARED, session.Phase.RUNNING):
        await journal.incoming(phase, "a").record(phase)
    await journal.incoming("RUNNING", "a").cleaned()
    await journal.incoming("PREPARED", "a").cleaned()
    assert [each.migration_id for each in await journal.unfinished_incoming()] == ["PREPARED", "ABORTED"]


@pytest.mark.parametrize("value", [object(), float("nan"), b"bytes"])
async def test_what_is_not_json_is_refused_before_the_freeze(journal: Journal, value: object) -> None:
    record = journal.outgoing("m1")
    with pytest.raises((TypeError, ValueError)):
        record.note(pid=value)
    await record.record(Phase.OPENING)


@pytest.mark.parametrize("inline_seconds", [0, INLINE_SECONDS])
async def test_a_cancelled_caller_neither_loses_nor_reorders_its_write(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, inline_seconds: float
) -> None:
    monkeypatch.setattr("phauld.journal.INLINE_SECONDS", inline_seconds)
    record = journal.outgoing("m1")
    cancelled = 0
    for number in range(200):
        task = asyncio.create_task(record.record(Phase.COMMITTED if number % 2 else Phase.HELD, number=number))
        await asyncio.sleep(0)
        cancelled += task.cancel()
    assert cancelled > 100 or inline_seconds
    entry = await journal.get_outgoing("m1")
    assert entry is not None
    assert (entry.phase, entry.detail) == (Phase.COMMITTED, {"number": 199})


async def test_close_waits_for_writes_and_can_be_repeated(path: Path) -> None:
    journal = await Journal.open(path)
    writes = [asyncio.create_task(journal.outgoing(f"m{number}").record(Phase.OPENING)) for number in range(50)]
    await asyncio.sleep(0)
    await journal.aclose()
    await journal.aclose()
    await asyncio.gather(*writes)
    with pytest.raises(PhaulError, match="closed"):
        await journal.get_outgoing("m1")
    assert [each.name for each in path.parent.iterdir()] == [path.name]
