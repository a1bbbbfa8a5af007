"""The source's table: complete, recoverable at every point, and in the only order that is safe."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest

from phaul_client.commit import (
    CANCELLABLE,
    FINAL,
    IN_DOUBT,
    POSTCOPY_TRANSITIONS,
    TRANSITIONS,
    Action,
    Do,
    Event,
    Phase,
    Record,
    Step,
    Transitions,
    advance,
    recover,
)
from phaul_client.errors import PhaseError

TABLES = pytest.mark.parametrize("table", [TRANSITIONS, POSTCOPY_TRANSITIONS], ids=["eager", "post-copy"])

HAPPY = (
    Event.PREFLIGHT_PASSED,
    Event.SESSION_OPENED,
    Event.LAST_ROUND,
    Event.TREE_FROZEN,
    Event.IMAGES_COPIED,
    Event.DESTINATION_PREPARED,
    Event.TREE_STOPPED,
    Event.DESTINATION_RUNNING,
    Event.TREE_KILLED,
)
HAPPY_POSTCOPY = (
    *HAPPY[:5],
    Event.PAGES_READY,
    *HAPPY[5:8],
    Event.PAGES_FILLED,
    Event.TREE_KILLED,
)
PATHS = pytest.mark.parametrize(
    ("table", "path"),
    [(TRANSITIONS, HAPPY), (POSTCOPY_TRANSITIONS, HAPPY_POSTCOPY)],
    ids=["eager", "post-copy"],
)


def journaled(table: Transitions) -> set[Phase]:
    return {action.phase for step in table.values() for action in step.actions if isinstance(action, Record)}


def walk(table: Transitions, path: tuple[Event, ...]) -> Iterator[tuple[Phase, Event, Step]]:
    phase = Phase.PREFLIGHT
    for event in path:
        step = advance(phase, event, table)
        yield phase, event, step
        phase = step.phase


def interruptions(table: Transitions, path: tuple[Event, ...]) -> Iterator[tuple[Phase | None, tuple[Action, ...]]]:
    """What the journal holds, and what was done, when phauld dies after every single action of the path."""
    in_journal: Phase | None = None
    done: tuple[Action, ...] = ()
    yield in_journal, done
    for _, _, step in walk(table, path):
        for action in step.actions:
            in_journal = action.phase if isinstance(action, Record) else in_journal
            done = (*done, action)
            yield in_journal, done


@TABLES
@pytest.mark.parametrize("phase", Phase)
def test_every_event_is_in_the_table_or_refused(table: Transitions, phase: Phase) -> None:
    for event in Event:
        if (phase, event) in table:
            assert advance(phase, event, table) == table[phase, event]
            continue
        with pytest.raises(PhaseError) as refused:
            advance(phase, event, table)
        assert (refused.value.seen, refused.value.event) == (phase, event)
        assert refused.value.reason == "WRONG_PHASE"


def test_a_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[Phase.DONE, Event.CANCELLED] = Step(Phase.DONE)  # type: ignore[index]


@PATHS
def test_the_happy_path_ends_in_done(table: Transitions, path: tuple[Event, ...]) -> None:
    *_, (_, _, last) = walk(table, path)
    assert last == Step(Phase.DONE, (Do.CLEAN_UP, Record(Phase.DONE)))


@PATHS
def test_every_interrupted_prefix_recovers(table: Transitions, path: tuple[Event, ...]) -> None:
    seen = set()
    for in_journal, done in interruptions(table, path):
        if in_journal is None:
            assert not done  # nothing was begun, so nothing is left
            continue
        step = recover(in_journal, table)
        seen.add(in_journal)
        if Do.SEND_COMMIT not in done and in_journal not in IN_DOUBT:
            assert step == Step(Phase.ROLLING_BACK, (Record(Phase.ROLLING_BACK), Do.RESUME_TREE, Do.ABORT_DESTINATION))
        else:
            assert Do.RESUME_TREE not in step.actions
        # a restart that is interrupted in its turn recovers as well
        for action in step.actions:
            if isinstance(action, Record):
                assert recover(action.phase, table).phase is step.phase
    assert {Phase.OPENING, Phase.FREEZING, Phase.COMMITTED, Phase.CONFIRMED, Phase.DONE} <= seen


@TABLES
def test_what_is_journaled_can_be_recovered_and_nothing_else(table: Transitions) -> None:
    assert {phase for phase, event in table if event is Event.RESTARTED} == journaled(table)
    for phase in set(Phase) - journaled(table):
        with pytest.raises(PhaseError):
            recover(phase, table)


@TABLES
def test_commit_is_sent_only_when_committed_is_in_the_journal(table: Transitions) -> None:
    for (phase, _), step in table.items():
        if Do.SEND_COMMIT in step.actions and phase not in IN_DOUBT:
            assert phase is Phase.PREPARED
            assert step.actions.index(Record(Phase.COMMITTED)) < step.actions.index(Do.SEND_COMMIT)


@TABLES
def test_commit_follows_the_stop(table: Transitions) -> None:
    into_committed = {key for key, step in table.items() if Record(Phase.COMMITTED) in step.actions}
    assert into_committed == {(Phase.PREPARED, Event.TREE_STOPPED)}
    into_prepared = [step for key, step in table.items() if step.phase is Phase.PREPARED]
    assert into_prepared == [Step(Phase.PREPARED, (Do.STOP_TREE,))]


@TABLES
def test_only_an_answer_or_a_person_ends_the_doubt(table: Transitions) -> None:
    leaving = {event for (phase, event), step in table.items() if phase in IN_DOUBT and step.phase not in IN_DOUBT}
    assert leaving == {
        Event.DESTINATION_RUNNING,
        Event.DESTINATION_ABORTED,
        Event.RESOLVED_RESUME,
        Event.RESOLVED_KILL,
    }
    resuming = {key for key, step in table.items() if key[0] in IN_DOUBT and Do.RESUME_TREE in step.actions}
    assert resuming == set(product(IN_DOUBT, (Event.DESTINATION_ABORTED, Event.RESOLVED_RESUME)))


@TABLES
def test_the_tree_is_killed_only_when_confirmed(table: Transitions) -> None:
    for (phase, _), step in table.items():
        if Do.KILL_TREE in step.actions:
            assert step.phase is Phase.CONFIRMED
            assert phase is Phase.CONFIRMED or step.actions[0] == Record(Phase.CONFIRMED)


@TABLES
def test_every_failure_before_the_commit_rolls_back(table: Transitions) -> None:
    before = CANCELLABLE if table is POSTCOPY_TRANSITIONS else CANCELLABLE - {Phase.SERVING}
    for phase, event in product(before, (Event.CANCELLED, Event.FAILED, Event.DEADLINE_PASSED, Event.CRIU_LOST)):
        assert advance(phase, event, table).phase is Phase.ROLLING_BACK
    for phase in (Phase.COMMITTED, Phase.HELD, Phase.CONFIRMED):
        with pytest.raises(PhaseError):
            advance(phase, Event.CANCELLED, table)


@TABLES
def test_a_final_phase_is_left_by_nothing_and_recorded_last(table: Transitions) -> None:
    for (phase, _), step in table.items():
        if phase in FINAL:
            assert step == Step(phase)
        elif step.phase in FINAL:
            assert step.actions[-1] == Record(step.phase)


def test_not_found_holds() -> None:
    assert advance(Phase.COMMITTED, Event.DESTINATION_NOT_FOUND).phase is Phase.HELD
    assert advance(Phase.HELD, Event.DESTINATION_NOT_FOUND).phase is Phase.HELD


def test_postcopy_keeps_the_source_until_every_page_has_left() -> None:
    for phase in IN_DOUBT:
        step = advance(phase, Event.DESTINATION_RUNNING, POSTCOPY_TRANSITIONS)
        assert step == Step(Phase.FILLING, (Record(Phase.FILLING), Do.SERVE_PAGES))
    assert advance(Phase.FILLING, Event.PAGES_FILLED, POSTCOPY_TRANSITIONS).phase is Phase.CONFIRMED
