"""The commit of `CriuLocal`, whose answer may be lost: the tree is held until it is known where it runs."""

from __future__ import annotations

import asyncio

import pytest

from phaul.v1 import types_pb2
from phaul_client.commit import Event, Phase
from phaul_client.doubt import LAST_WORD_SECONDS, Doubt
from phaul_client.errors import RolledBack
from phauld.session import Phase as SessionPhase
from tests.contract.local_move import (
    Move,
    doing,
    for_ever,
)
from tests.fakes.remote import Act, refused, unavailable


async def test_the_answer_to_the_commit_is_lost_and_the_copy_runs(move: Move) -> None:
    move.script(commit=[Act(after=unavailable())])
    await move.run()
    move.assert_moved()
    assert move.remote.calls[-2:] == ["commit", "get_session"]


async def test_the_commit_itself_is_lost_and_comes_again(move: Move) -> None:
    move.script(commit=[Act(before=unavailable()), Act(before=unavailable()), Act()])
    await move.run()
    move.assert_moved()
    assert move.remote.calls.count("commit") == 3


async def test_the_destination_is_still_about_it(move: Move) -> None:
    def committing() -> None:
        move.remote.phase = SessionPhase.COMMITTING

    def running() -> None:
        move.remote.phase = SessionPhase.RUNNING

    move.script(
        commit=[Act(before=doing(committing), after=unavailable())],
        get_session=[Act(), Act(), Act(before=doing(running))],
    )
    move.remote._run = lambda: None  # type: ignore[method-assign]
    await move.run()
    move.assert_moved()
    assert move.remote.calls.count("commit") == 1


@pytest.mark.parametrize("answer", [refused("WRONG_PHASE"), unavailable()])
async def test_the_destination_aborted_instead(move: Move, answer: Exception) -> None:
    """The lease ended, or its criu died: the tree goes on here, and the error says why."""
    move.remote.error = types_pb2.Failure(
        reason=types_pb2.ERROR_REASON_LEASE_EXPIRED, message="the lease ended", remedy="a longer lease"
    )

    async def abort() -> None:
        move.remote.lose()
        raise answer

    move.script(commit=[Act(before=abort)])
    with pytest.raises(RolledBack, match="the lease ended") as ended:
        await move.run()
    move.assert_rolled_back()
    assert (ended.value.reason, ended.value.remedy) == ("LEASE_EXPIRED", "a longer lease")


async def test_no_answer_holds_the_tree_until_there_is_one(move: Move) -> None:
    move.doubt = Doubt(seconds=0.2)
    silent = [True]

    async def sometimes() -> None:
        if silent[0]:
            raise unavailable()

    move.script(commit=[Act(after=unavailable())], get_session=[Act(before=sometimes)])
    task = move.start()
    await move.until(lambda: Phase.HELD in move.phases)
    assert move.tree.is_silent
    asked = move.remote.calls.count("get_session")
    await move.until(lambda: move.remote.calls.count("get_session") > asked)  # it goes on asking
    assert not task.done()
    silent[0] = False
    await task
    move.assert_moved()
    assert Phase.HELD in move.journal.phases


@pytest.mark.parametrize("reason", ["MIGRATION_NOT_FOUND", "NODE_MISMATCH"])
async def test_an_answer_of_another_journal_is_none(move: Move, reason: str) -> None:
    move.script(commit=[Act(before=unavailable())], get_session=[Act(before=refused(reason))])
    task = move.start()
    await move.until(lambda: Phase.HELD in move.phases)
    await asyncio.sleep(0.2)
    assert move.tree.is_silent
    assert move.local.resolve(Event.RESOLVED_RESUME)
    with pytest.raises(RolledBack):
        await task
    move.assert_rolled_back()


@pytest.mark.parametrize("criu_dies", [False, True])
@pytest.mark.parametrize("event", [Event.RESOLVED_RESUME, Event.RESOLVED_KILL])
async def test_an_operator_decides(move: Move, event: Event, criu_dies: bool) -> None:
    move.doubt = Doubt(seconds=0.1)
    move.script(**{name: [Act(before=unavailable())] for name in ("commit", "get_session", "abort")})
    task = move.start()
    await move.until(lambda: Phase.HELD in move.phases)
    if criu_dies:
        move.criu.die()
        await asyncio.sleep(0.05)
        assert move.tree.is_stopped
    assert not move.local.cancel()
    assert move.local.resolve(event)
    assert not move.local.resolve(event)
    if event is Event.RESOLVED_RESUME:
        with pytest.raises(RolledBack, match="operator"):
            await task
        move.assert_rolled_back()
    else:
        await task
        assert move.tree.is_gone
        assert move.local.phase is Phase.DONE


@pytest.mark.parametrize("name", ["first commit", "commit", "get_session"])
@pytest.mark.parametrize("event", [Event.RESOLVED_RESUME, Event.RESOLVED_KILL])
async def test_an_operator_need_not_wait_for_a_node_that_is_silent(move: Move, event: Event, name: str) -> None:
    silence = asyncio.Event()

    async def silent() -> None:
        silence.set()
        await for_ever()

    if name == "first commit":
        move.script(commit=[Act(before=silent)])
    elif name == "commit":  # the answer is lost, then it says that it is prepared, then nothing any more
        move.script(commit=[Act(before=unavailable()), Act(before=silent)], get_session=[Act()])
    else:
        move.script(commit=[Act(before=unavailable())], get_session=[Act(before=silent)])
    move.script(abort=[Act(before=unavailable())])
    task = move.start()
    async with asyncio.timeout(5):
        await silence.wait()
    assert move.tree.is_silent
    assert move.local.resolve(event) is not None
    async with asyncio.timeout(2 * LAST_WORD_SECONDS):
        if event is Event.RESOLVED_RESUME:
            with pytest.raises(RolledBack, match="operator"):
                await task
            move.assert_rolled_back()
        else:
            await task
            assert move.tree.is_gone


async def test_a_destination_that_answers_after_all_overrules_an_operator(move: Move) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        asked.set()
        await go.wait()

    move.script(commit=[Act(after=unavailable())], get_session=[Act(before=slow)])
    task = move.start()
    await asked.wait()
    overruled = move.local.resolve(Event.RESOLVED_RESUME)
    await asyncio.sleep(0.2)
    go.set()
    await task
    move.assert_moved()
    assert overruled is not None
    assert overruled.result() is Event.DESTINATION_RUNNING
    assert not move.local.spoken_for


async def test_the_policy_is_asked_again_when_a_destination_has_answered_and_is_silent_again(move: Move) -> None:
    move.doubt = Doubt(seconds=0.3, event=Event.RESOLVED_RESUME)
    answers: list[str] = []

    async def once() -> None:
        if Phase.HELD not in move.phases or answers:
            raise unavailable()
        answers.append("committing")
        move.remote.phase = SessionPhase.COMMITTING

    lost = [Act(before=unavailable())]
    move.script(commit=lost, get_session=[Act(before=once)], abort=lost)
    with pytest.raises(RolledBack, match="policy"):
        await move.run()
    assert answers
    move.assert_rolled_back()


@pytest.mark.parametrize("event", [Event.RESOLVED_RESUME, Event.RESOLVED_KILL])
async def test_the_policy_decides_when_nobody_answers(move: Move, event: Event) -> None:
    move.doubt = Doubt(seconds=0.1, event=event)
    move.script(**{name: [Act(before=unavailable())] for name in ("commit", "get_session", "abort")})
    if event is Event.RESOLVED_RESUME:
        with pytest.raises(RolledBack):
            await move.run()
        move.assert_rolled_back()
    else:
        await move.run()
        assert move.tree.is_gone
    assert Phase.HELD in move.journal.phases
    assert move.journal.noted["doubt_expired"]  # for a phauld that is started before it is acted on


@pytest.mark.parametrize("runs_there", [True, False])
async def test_criu_dies_while_it_is_in_doubt(move: Move, runs_there: bool) -> None:
    """SIGSTOP holds the tree then."""
    move.script(commit=[Act(after=unavailable()) if runs_there else Act(before=unavailable())])
    died: list[bool] = []

    async def die_once() -> None:
        if not died:
            move.criu.die()
            await asyncio.sleep(0.05)
            died.append(move.tree.is_stopped)
            if not runs_there:
                move.remote.lose()

    move.script(get_session=[Act(before=die_once)])
    if runs_there:
        await move.run()
        move.assert_moved()
    else:
        with pytest.raises(RolledBack):
            await move.run()
        move.assert_rolled_back()
    assert died == [True]


async def test_criu_cannot_kill_the_tree_and_phaul_does(move: Move) -> None:
    move.criu.fails_at = "end"
    await move.run()
    move.assert_moved()
