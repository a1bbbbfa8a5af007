"""A move of `CriuLocal` that is cancelled, is too late, loses its phauld or its journal."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from phaul_client.client import Client
from phaul_client.commit import Event, Phase
from phaul_client.config import Config
from phaul_client.doubt import Doubt
from phaul_client.errors import MigrationCancelled, PhaulError, RolledBack
from phaul_client.local import LetsGo
from phaul_client.policy import PostCopyPolicy, StopCopyPolicy
from phaul_client.recovery import Recovery
from phaul_client.tree import Tree as ProcessTree
from phauld.session import Phase as SessionPhase
from tests.contract.local_move import (
    Move,
    doing,
    for_ever,
)
from tests.fakes.remote import Act, unavailable

# Cancel, deadline, the end of phauld


CANCEL_AT = ["put_images", "restore"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", CANCEL_AT)
async def test_a_cancel_before_the_commit(move: Move, method: str, late: bool) -> None:
    """`late`: the step ends by itself in the same moment."""
    cancelled: list[bool] = []
    cancel = doing(lambda: cancelled.append(move.local.cancel()))

    async def cancel_and_wait() -> None:
        await cancel()
        await for_ever()

    move.script(**{method: [Act(before=cancel if late else cancel_and_wait)]})
    with pytest.raises(MigrationCancelled):
        await move.run()
    assert cancelled == [True]
    move.assert_rolled_back()
    assert "commit" not in move.remote.calls


async def test_a_cancel_while_the_commit_is_being_written_down(move: Move) -> None:
    """COMMITTED may be in the journal by then; but Commit was not sent, and ROLLING_BACK follows it."""
    cancelled: list[bool] = []

    def cancel(phase: Phase) -> None:
        if phase is Phase.COMMITTED:
            cancelled.append(move.local.cancel())

    move.journal.meanwhile = cancel
    with pytest.raises(MigrationCancelled):
        await move.run()
    assert cancelled == [True]
    move.assert_rolled_back()
    assert "commit" not in move.remote.calls


async def test_a_cancel_after_the_commit_is_too_late(move: Move) -> None:
    cancelled: list[bool] = []
    move.script(commit=[Act(before=doing(lambda: cancelled.append(move.local.cancel())))])
    await move.run()
    assert cancelled == [False]
    move.assert_moved()


@pytest.mark.parametrize("method", CANCEL_AT)
async def test_the_freeze_budget_ends_a_pause_that_is_too_long(move: Move, method: str) -> None:
    move.freeze_budget_seconds = 0.3
    move.script(**{method: [Act(before=for_ever)]})
    with pytest.raises(RolledBack, match=r"more than 0\.3 s") as ended:
        await move.run()
    assert ended.value.reason == "DEADLINE_EXCEEDED"
    move.assert_rolled_back()


async def test_the_freeze_budget_does_not_touch_a_committed_migration(move: Move) -> None:
    move.freeze_budget_seconds = 2.0  # a busy machine comes to the commit within it

    async def slow() -> None:
        await asyncio.sleep(2.1)

    move.script(commit=[Act(before=slow)])
    await move.run()
    move.assert_moved()


@pytest.mark.parametrize("method", [*CANCEL_AT, "commit", "get_session"])
async def test_phauld_stops_in_the_middle(move: Move, method: str) -> None:
    reached = asyncio.Event()

    async def reach() -> None:
        reached.set()
        await for_ever()

    move.script(commit=[Act(after=unavailable())])
    move.script(**{method: [Act(before=reach)]})
    task = move.start()
    async with asyncio.timeout(10):
        await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if method in CANCEL_AT:
        move.assert_rolled_back()
    else:  # nobody knows yet; the next phauld will ask
        assert move.tree.is_stopped
        assert move.journal.phases[-1] is Phase.COMMITTED
        assert "abort" not in move.remote.calls
        assert move.cleaned == 0
        assert [each["pid"] for each in move.journal.noted["tree"]] == list(move.tree.pids)  # type: ignore[attr-defined]


# The journal


@pytest.mark.parametrize("phase", [Phase.FREEZING, Phase.COMMITTED])
async def test_a_journal_that_cannot_be_written_before_the_commit(move: Move, phase: Phase) -> None:
    """Whatever can be said of it: the tree runs on here, and nothing was committed."""
    move.journal.fails_at = phase
    with pytest.raises((OSError, PhaulError), match="No space left"):
        await move.run()
    assert move.tree.runs
    assert "commit" not in move.remote.calls
    assert "abort" in move.remote.calls


@pytest.mark.parametrize("found", ["failed", "cancelled"])
async def test_a_tree_that_may_be_committed_waits_for_its_roll_back_to_be_written_down(move: Move, found: str) -> None:
    """A restarted phauld that finds COMMITTED would commit: so no SIGCONT while the destination may still say yes."""

    def meanwhile(phase: Phase) -> None:
        if phase is Phase.COMMITTED and found == "cancelled":
            assert move.local.cancel()

    move.journal.meanwhile = meanwhile
    move.journal.fails_at = Phase.COMMITTED if found == "failed" else Phase.ROLLING_BACK
    move.script(abort=[Act(before=unavailable())], get_session=[Act(before=unavailable())])
    task = move.start()
    await move.until(lambda: move.journal.failures > 3)
    assert move.tree.is_stopped
    move.journal.fails_at, move.journal.is_full = None, False
    with pytest.raises(PhaulError):
        await task
    assert move.tree.runs
    assert move.journal.phases[-2:] == [Phase.ROLLING_BACK, Phase.ROLLED_BACK]


async def test_a_recovery_does_not_commit_a_tree_that_runs(move: Move) -> None:
    move.remote.phase = SessionPhase.PREPARED
    recovery = Recovery(move.case, Phase.COMMITTED, ProcessTree.below(move.tree.root))
    async with asyncio.timeout(10):
        assert await recovery.run() is Phase.ROLLED_BACK
    assert "commit" not in move.remote.calls
    assert not move.remote.ever_ran
    assert move.tree.runs


async def test_a_recovery_commits_a_tree_that_is_stopped(move: Move) -> None:
    move.remote.phase = SessionPhase.PREPARED
    held = ProcessTree.below(move.tree.root)
    held.stop(frozenset())
    recovery = Recovery(move.case, Phase.COMMITTED, held)
    async with asyncio.timeout(10):
        assert await recovery.run() is Phase.DONE
    assert move.remote.ever_ran
    assert move.tree.is_gone


@pytest.mark.parametrize("has_expired", [True, False])
async def test_a_policy_that_was_not_acted_on_is_asked_again_by_the_next_phauld(move: Move, has_expired: bool) -> None:
    """But a tree that is held for another cause, such as a destination that lost its journal, is an operator's."""
    held = ProcessTree.below(move.tree.root)
    held.stop(frozenset())
    move.script(get_session=[Act(before=unavailable())], abort=[Act(before=unavailable())])
    move.doubt = Doubt(seconds=0.1, event=Event.RESOLVED_RESUME, has_expired=has_expired)
    recovery = Recovery(move.case, Phase.HELD, held)
    run = asyncio.create_task(recovery.run())
    if not has_expired:
        await move.until(lambda: move.remote.calls.count("get_session") > 3)
        assert move.tree.is_stopped
        assert recovery.resolve(Event.RESOLVED_RESUME)
    async with asyncio.timeout(10):
        assert await run is Phase.ROLLED_BACK
    assert recovery.spoken_for == ("the policy" if has_expired else "an operator")
    assert move.tree.runs


async def test_a_journal_that_cannot_be_written_after_the_commit_keeps_the_tree_stopped(move: Move) -> None:
    """It is tried again, for the tree may neither run on here nor be killed before it is written down."""
    move.journal.fails_at = Phase.CONFIRMED
    task = move.start()
    await move.until(lambda: move.journal.is_full)
    await asyncio.sleep(0.2)
    assert move.tree.is_silent
    assert move.tree.has_stop_pending
    assert move.journal.phases[-1] is Phase.COMMITTED
    assert move.remote.phase is SessionPhase.RUNNING
    move.journal.fails_at, move.journal.is_full = None, False
    await task
    move.assert_moved()


async def test_the_tree_is_held_back_until_there_is_nothing_left_to_do_before_its_freeze(move: Move) -> None:
    """What is written down, started and looked at before takes time in which a free tree would write."""
    told: list[object] = []

    async def throttle(percent: int) -> None:
        assert move.criu.swrk is not None
        told.extend((percent, move.journal.phases[-1], *move.criu.notified))

    local = move.make()
    await local.fire(Event.PREFLIGHT_PASSED)
    await local.fire(Event.SESSION_OPENED)
    config = Config(move.tree.root, move.remote.page_socket.fileno(), move.directory)
    await Client(local, move.remote, config, criu=move.criu, policy=StopCopyPolicy(), throttle=throttle).migrate()
    assert told == [0, Phase.FREEZING]
    move.assert_moved()


@pytest.mark.parametrize("lets_go", [False, True])
async def test_the_tree_is_held_back_no_more_when_its_memory_follows_it(move: Move, lets_go: bool) -> None:
    """Post-copy has no round of its own for the last dump, but the throttle ends before it all the same."""
    told: list[object] = []

    async def throttle(percent: int) -> None:
        told.append(percent)

    class Serves:
        async def dump_copy_restore(self, criu: object, config: Config, last: Path | None) -> None: ...

        async def dump_copy_serve(self, criu: object, config: Config, last: Path | None) -> None:
            if isinstance(self, LetsGo):
                await self.let_go()
            told.append("serve")

    local = Serves()
    if lets_go:
        local.let_go = for_ever  # type: ignore[attr-defined]
    config = Config(move.tree.root, move.remote.page_socket.fileno(), move.directory)
    await Client(local, move.remote, config, criu=move.criu, policy=PostCopyPolicy(), throttle=throttle).migrate()
    assert told == [0, "serve"]
