"""`CriuLocal` with a real process tree that is really held and really signalled, and a scripted destination.

Whatever fails at whichever step: the tree runs exactly where it should.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from phaul.v1 import types_pb2
from phaul_client import coordinator, pieces
from phaul_client.client import Client
from phaul_client.commit import Event, Phase
from phaul_client.config import Config
from phaul_client.doubt import LAST_WORD_SECONDS, Doubt
from phaul_client.errors import MigrationCancelled, PhaulError, RolledBack
from phaul_client.local import CriuLocal, Settings
from phaul_client.policy import PostCopyPolicy
from phaul_client.recovery import Recovery
from phaul_client.tree import Tree as ProcessTree
from phaul_client.tree import identity
from phaul_criu.requests import DumpOptions
from phauld.session import Phase as SessionPhase
from tests.fakes.criu import IMAGES, FakeCriu
from tests.fakes.remote import Act, ScriptedRemote, refused, unavailable
from tests.node.criu_victims import Victim, alive, no_leaks, start_victim
from tests.nodes import until

SIGSTOP_BIT = 1 << (signal.SIGSTOP - 1)


@dataclass
class FakeJournal:
    """`fails_at`: the disk is full from this phase on."""

    fails_at: Phase | None = None
    is_full: bool = False
    failures: int = 0
    phases: list[Phase] = field(default_factory=list)
    noted: dict[str, object] = field(default_factory=dict)
    meanwhile: Callable[[Phase], None] = lambda _: None

    def note(self, **detail: object) -> None:
        self.noted |= detail

    async def record(self, phase: Phase) -> None:
        self.meanwhile(phase)
        await asyncio.sleep(0)
        self.is_full |= phase is self.fails_at
        if self.is_full:
            self.failures += 1
            raise OSError(28, "No space left on device")
        self.phases.append(phase)


class Tree:
    """The victim: a root and a worker, both of which beat."""

    def __init__(self, victim: Victim) -> None:
        self.root = victim.pid
        self._victim = victim
        (self.worker,) = children(victim.pid)

    def reap(self) -> None:
        self._victim.popen.wait()

    @property
    def pids(self) -> tuple[int, int]:
        return self.root, self.worker

    @property
    def runs(self) -> bool:
        return self._victim.is_beating() and self._victim.is_beating(0)

    @property
    def is_silent(self) -> bool:
        return self._victim.is_silent()

    @property
    def is_gone(self) -> bool:
        return not any(map(alive, self.pids))

    @property
    def is_stopped(self) -> bool:
        """By a signal, not by a tracer: so it stays, whoever dies."""
        time.sleep(0.05)  # the signal takes effect when its tracer is gone
        return [state(pid) for pid in self.pids] == ["T", "T"] and self.is_silent

    @property
    def has_stop_pending(self) -> bool:
        return all(int(status(pid, "ShdPnd"), 16) & SIGSTOP_BIT for pid in self.pids)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status(pid: int, key: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return value.strip()
    raise KeyError(key)


def state(pid: int) -> str:
    return status(pid, "State")[:1]


@dataclass
class Move:
    """One last step of a migration, ready to begin."""

    tree: Tree
    remote: ScriptedRemote
    directory: Path
    journal: FakeJournal = field(default_factory=FakeJournal)
    criu: FakeCriu = field(default_factory=lambda: FakeCriu("/nonexistent"))
    freeze_budget_seconds: float = 30.0
    doubt: Doubt = field(default_factory=Doubt)
    phases: list[Phase] = field(default_factory=list)
    cleaned: int = 0
    carried: tuple[Path, ...] = ()
    root: Mapping[str, object] | None = None

    def script(self, **acts: list[Act]) -> None:
        self.remote.script |= acts

    async def _clean_up(self) -> None:
        self.cleaned += 1

    def make(self) -> CriuLocal:
        self.local = CriuLocal(
            "move",
            self.remote,
            self.journal,
            Settings(
                dump=DumpOptions(images_dir_fd=-1, pid=0),
                root=self.root,
                carried=self.carried,
                freeze_budget_seconds=self.freeze_budget_seconds,
                doubt=self.doubt,
            ),
            on_phase=self.phases.append,
            clean_up=self._clean_up,
        )
        return self.local

    async def run(self) -> None:
        """Raises what the last step raises; it has 10 s."""
        local = self.make()
        await local.fire(Event.PREFLIGHT_PASSED)
        await local.fire(Event.SESSION_OPENED)
        config = Config(self.tree.root, self.remote.page_socket.fileno(), self.directory)
        async with asyncio.timeout(10):
            await local.dump_copy_restore(self.criu, config, None)

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.run())

    async def until(self, condition: Callable[[], bool]) -> None:
        await until(condition, timeout_seconds=10)

    def assert_moved(self) -> None:
        assert self.tree.is_gone
        assert self.remote.phase is SessionPhase.RUNNING
        assert self.local.phase is Phase.DONE
        assert self.journal.phases[-2:] == [Phase.CONFIRMED, Phase.DONE]
        assert self.cleaned == 1

    def assert_rolled_back(self) -> None:
        assert self.tree.runs
        assert not self.remote.ever_ran
        assert self.local.phase is Phase.ROLLED_BACK
        assert self.journal.phases[-2:] == [Phase.ROLLING_BACK, Phase.ROLLED_BACK]
        assert self.remote.calls.count("abort") == 1
        assert self.cleaned == 1


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    victim = start_victim(tmp_path, workers=1, own_pid_namespace=False)
    yield Tree(victim)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(victim.popen.pid, signal.SIGKILL)
    victim.popen.wait()


@pytest.fixture
async def move(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Move]:
    monkeypatch.setattr(coordinator, "LAST_PATIENCE_SECONDS", 0.1)
    (tmp_path / "images").mkdir()
    with no_leaks():
        remote = ScriptedRemote()
        yield Move(tree, remote, tmp_path / "images")
        remote.close()


def doing(act: Callable[[], object]) -> Callable[[], Awaitable[None]]:
    async def behaviour() -> None:
        act()

    return behaviour


async def for_ever() -> None:
    await asyncio.Event().wait()


async def test_all_is_well(move: Move) -> None:
    seen: list[tuple[bool, bool, Phase]] = []
    look = doing(lambda: seen.append((move.tree.has_stop_pending, move.tree.is_silent, move.journal.phases[-1])))
    move.script(commit=[Act(before=look)])
    await move.run()
    move.assert_moved()
    assert seen == [(True, True, Phase.COMMITTED)]  # nothing that dies now can let the tree run on
    assert sorted(move.remote.images) == sorted(IMAGES)
    assert move.remote.calls == ["put_images", "restore", "commit"]
    assert move.journal.phases == [Phase.OPENING, Phase.FREEZING, Phase.COMMITTED, Phase.CONFIRMED, Phase.DONE]
    assert move.local.destination_pid == 77
    assert move.local.pause_seconds is not None
    assert [step.name for step in move.local.steps] == ["freeze and dump", "copy images", "restore", "commit"]


BEFORE_COMMIT: dict[str, tuple[str, Act, str]] = {
    "images not accepted": ("put_images", Act(before=refused("IMAGE_CORRUPT")), "IMAGE_CORRUPT"),
    "destination full": ("put_images", Act(before=refused("NO_SPACE")), "NO_SPACE"),
    "destination gone": ("put_images", Act(before=unavailable()), "PEER_UNREACHABLE"),
    "answer to images lost": ("put_images", Act(after=unavailable()), "PEER_UNREACHABLE"),
    "restore refused": ("restore", Act(before=refused("RESTORE_FAILED")), "RESTORE_FAILED"),
    "lease ended": ("restore", Act(before=refused("WRONG_PHASE")), "WRONG_PHASE"),
    "destination gone before restore": ("restore", Act(before=unavailable()), "PEER_UNREACHABLE"),
    "prepared, but the answer was lost": ("restore", Act(after=unavailable()), "PEER_UNREACHABLE"),
}


@pytest.mark.parametrize(("method", "act", "reason"), BEFORE_COMMIT.values(), ids=BEFORE_COMMIT.keys())
@pytest.mark.parametrize("abort", [Act(), Act(before=unavailable()), Act(after=unavailable())])
async def test_a_failure_before_the_commit_rolls_back(
    move: Move, method: str, act: Act, reason: str, abort: Act
) -> None:
    move.script(**{method: [act], "abort": [abort]})
    with pytest.raises(RolledBack) as ended:
        await move.run()
    move.assert_rolled_back()
    assert ended.value.reason == reason
    assert "commit" not in move.remote.calls
    if reason not in ("PEER_UNREACHABLE",):
        assert ended.value.remedy == "do"


async def test_images_that_cannot_be_read_roll_back(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, index: int) -> Iterator[object]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("phaul_client.local.image_pieces", broken)
    with pytest.raises(RolledBack, match="Input/output error"):
        await move.run()
    move.assert_rolled_back()
    assert pieces.PIECE_BYTES  # the module is as it was


async def test_a_carried_file_that_is_gone_rolls_back(move: Move, tmp_path: Path) -> None:
    move.carried = (tmp_path / "app.log",)
    with pytest.raises(RolledBack, match=r"app\.log"):
        await move.run()
    move.assert_rolled_back()


async def test_a_dump_that_is_refused_rolls_back(move: Move) -> None:
    move.criu.fails_at = "start"
    with pytest.raises(RolledBack, match="a thing that cannot be dumped") as ended:
        await move.run()
    move.assert_rolled_back()
    assert ended.value.reason == "DUMP_FAILED"
    assert move.remote.calls == ["abort"]


@pytest.mark.parametrize("method", ["put_images", "restore"])
async def test_a_criu_that_dies_before_the_commit_rolls_back(move: Move, method: str) -> None:
    """The tree runs already: its copy is of the past."""
    move.script(**{method: [Act(before=doing(lambda: move.criu.die()))]})
    with pytest.raises(RolledBack) as ended:
        await move.run()
    move.assert_rolled_back()
    assert "commit" not in move.remote.calls
    assert ended.value.reason == "DUMP_FAILED"


async def test_a_process_that_has_ended_before_the_dump_is_told_so(move: Move) -> None:
    os.kill(move.tree.root, signal.SIGKILL)
    move.tree.reap()
    with pytest.raises(RolledBack) as ended:
        await move.run()
    assert ended.value.reason == "PID_NOT_FOUND"
    assert move.local.phase is Phase.ROLLED_BACK


@pytest.mark.parametrize("looks", [0, 1], ids=["before the dump", "while the dump waited for its turn"])
async def test_a_process_that_got_the_pid_later_is_not_moved(
    move: Move, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    answers = iter([True] * looks + [False])
    monkeypatch.setattr("phaul_client.local.is_alive", lambda _: next(answers))
    move.root = identity(move.tree.root)
    with pytest.raises(RolledBack) as ended:
        await move.run()
    assert ended.value.reason == "PID_NOT_FOUND"
    assert move.tree.runs
    assert not move.remote.ever_ran
    assert move.local.phase is Phase.ROLLED_BACK


# The commit


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
    move.freeze_budget_seconds = 0.2

    async def slow() -> None:
        await asyncio.sleep(0.5)

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
    recovery = Recovery(
        "move",
        move.remote,
        move.journal,
        phase=Phase.COMMITTED,
        tree=ProcessTree.below(move.tree.root),
        doubt=Doubt(),
    )
    async with asyncio.timeout(10):
        assert await recovery.run() is Phase.ROLLED_BACK
    assert "commit" not in move.remote.calls
    assert not move.remote.ever_ran
    assert move.tree.runs


async def test_a_recovery_commits_a_tree_that_is_stopped(move: Move) -> None:
    move.remote.phase = SessionPhase.PREPARED
    held = ProcessTree.below(move.tree.root)
    held.stop(frozenset())
    recovery = Recovery("move", move.remote, move.journal, phase=Phase.COMMITTED, tree=held, doubt=Doubt())
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
    doubt = Doubt(seconds=0.1, event=Event.RESOLVED_RESUME, has_expired=has_expired)
    recovery = Recovery("move", move.remote, move.journal, phase=Phase.HELD, tree=held, doubt=doubt)
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


async def test_the_tree_is_held_back_no_more_when_its_memory_follows_it(move: Move) -> None:
    """Post-copy has no round of its own for the last dump, but the throttle ends before it all the same."""
    told: list[object] = []

    async def throttle(percent: int) -> None:
        told.append(percent)

    class Serves(CriuLocal):
        async def dump_copy_serve(self, criu: object, config: Config, last: Path | None) -> None:
            told.append("serve")

    local = move.make()
    local.__class__ = Serves
    config = Config(move.tree.root, move.remote.page_socket.fileno(), move.directory)
    await Client(local, move.remote, config, criu=move.criu, policy=PostCopyPolicy(), throttle=throttle).migrate()
    assert told == [0, "serve"]


# What was stopped, or dead, before


@pytest.mark.parametrize("late", [False, True])
async def test_a_task_that_was_stopped_before_stays_so(move: Move, late: bool) -> None:
    """`late`: while the dump waits for its turn."""

    async def stop() -> None:
        os.kill(move.tree.worker, signal.SIGSTOP)
        await move.until(lambda: state(move.tree.worker) == "T")

    if late:
        move.criu.before_dump = stop
    else:
        await stop()
    move.doubt = Doubt(seconds=0.1, event=Event.RESOLVED_RESUME)
    move.script(**{name: [Act(before=unavailable())] for name in ("commit", "get_session")})
    with pytest.raises(RolledBack):
        await move.run()
    await move.until(lambda: not move.tree.is_silent)
    await move.until(lambda: state(move.tree.worker) == "T")  # for a moment its pending SIGSTOP makes it runnable
    await asyncio.sleep(0.1)
    assert state(move.tree.worker) == "T"
    os.kill(move.tree.worker, signal.SIGCONT)
    assert move.tree.runs


@pytest.mark.parametrize("moves", [True, False])
async def test_a_zombie_in_the_tree_is_no_hindrance(move: Move, moves: bool) -> None:
    os.kill(move.tree.worker, signal.SIGKILL)
    await move.until(lambda: state(move.tree.worker) == "Z")
    if not moves:
        move.script(restore=[Act(before=unavailable())])
        with pytest.raises(RolledBack):
            await move.run()
        assert not move.tree.is_silent
        return
    await move.run()
    move.assert_moved()
