"""`CriuLocal` up to the commit: whatever fails at whichever step, the tree runs on here; and of its own, as it was."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul_client import pieces
from phaul_client.cargo import Cargo
from phaul_client.commit import Event, Phase
from phaul_client.doubt import Doubt
from phaul_client.errors import RolledBack
from phaul_client.timeline import Step
from phaul_client.tree import identity
from tests.contract.local_move import (
    Move,
    doing,
    state,
)
from tests.fakes.criu import IMAGES
from tests.fakes.remote import Act, refused, unavailable


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


async def test_what_begins_during_the_dump_does_not_cut_it_short(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last pass of --sync."""

    async def finish(cargo: Cargo) -> list[Step]:
        return [Step("sync files", 1.0, 2.0)]  # long before this dump

    monkeypatch.setattr(Cargo, "finish", finish)
    await move.run()
    by_name = {step.name: step for step in move.local.steps}
    assert by_name["freeze and dump"].start <= by_name["freeze and dump"].end


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
    def broken(path: Path, index: int, **_names: object) -> Iterator[object]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("phaul_client.last_step.image_pieces", broken)
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
    monkeypatch.setattr("phaul_client.last_step.is_alive", lambda _: next(answers))
    move.root = identity(move.tree.root)
    with pytest.raises(RolledBack) as ended:
        await move.run()
    assert ended.value.reason == "PID_NOT_FOUND"
    assert move.tree.runs
    assert not move.remote.ever_ran
    assert move.local.phase is Phase.ROLLED_BACK


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
