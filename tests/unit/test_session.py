"""The destination's table: complete, recoverable at every point, and the same answer however often it is asked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from phauld.errors import PhaseError
from phauld.session import (
    FINAL,
    LEASED,
    POSTCOPY_TRANSITIONS,
    TRANSITIONS,
    Do,
    Event,
    Phase,
    Record,
    Step,
    Transitions,
    advance,
    recover,
)

TABLES = pytest.mark.parametrize("table", [TRANSITIONS, POSTCOPY_TRANSITIONS], ids=["eager", "post-copy"])

CALLS = (
    Event.OPEN_SESSION,
    Event.START_ITER,
    Event.ROUND_ENDED,
    Event.FINAL_ROUND_ENDED,
    Event.RESTORE,
    Event.COMMIT,
    Event.ABORT,
    Event.GET_SESSION,
)
HAPPY = (
    Event.OPEN_SESSION,
    Event.START_ITER,
    Event.ROUND_ENDED,
    Event.START_ITER,
    Event.FINAL_ROUND_ENDED,
    Event.RESTORE,
    Event.TREE_HELD,
    Event.COMMIT,
    Event.TREE_RUNS,
)
COMMITTING_TO_ABORTED = (Phase.COMMITTING, Phase.ABORTED)
KILLED_FIRST = (Do.KILL_TREE, Record(Phase.ABORTED), Do.CLEAN_UP, Do.ANSWER_WAITING)


def journaled(table: Transitions) -> set[Phase]:
    return {action.phase for step in table.values() for action in step.actions if isinstance(action, Record)}


def walk(path: tuple[Event, ...]) -> Iterator[tuple[Phase, Event, Step]]:
    phase = Phase.ABSENT
    for event in path:
        step = advance(phase, event)
        yield phase, event, step
        phase = step.phase


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


def test_the_happy_path_ends_in_running() -> None:
    *_, (_, _, last) = walk(HAPPY)
    assert last == Step(Phase.RUNNING, (Record(Phase.RUNNING), Do.ANSWER_WAITING))


def test_every_interrupted_prefix_recovers() -> None:
    in_journal, released = Phase.ABSENT, False
    for _, _, step in walk(HAPPY):
        for action in step.actions:
            in_journal = action.phase if isinstance(action, Record) else in_journal
            released = released or action is Do.RELEASE_TREE
            recovered = recover(in_journal)
            if in_journal is Phase.COMMITTING:
                assert recovered == Step(Phase.COMMITTING, (Do.LOOK_AT_TREE,))
                assert advance(Phase.COMMITTING, Event.TREE_RUNS).phase is Phase.RUNNING
                assert advance(Phase.COMMITTING, Event.TREE_NEVER_RAN) == Step(Phase.ABORTED, KILLED_FIRST)
            elif in_journal is Phase.RUNNING:
                assert recovered == Step(Phase.RUNNING)
            else:
                assert not released
                assert recovered.phase is Phase.ABORTED
                assert recovered.actions[:2] == (Record(Phase.ABORTED), Do.KILL_TREE)
    assert in_journal is Phase.RUNNING


@TABLES
def test_what_is_journaled_can_be_recovered_and_nothing_else(table: Transitions) -> None:
    assert {phase for phase, event in table if event is Event.RESTARTED} == journaled(table)
    for phase in set(Phase) - journaled(table):
        with pytest.raises(PhaseError):
            recover(phase, table)


@TABLES
def test_the_tree_is_let_go_only_when_committing_is_in_the_journal(table: Transitions) -> None:
    releasing = {key: step for key, step in table.items() if Do.RELEASE_TREE in step.actions}
    assert releasing == {
        (Phase.PREPARED, Event.COMMIT): Step(Phase.COMMITTING, (Record(Phase.COMMITTING), Do.RELEASE_TREE))
    }


@TABLES
def test_nobody_is_told_an_outcome_before_it_is_in_the_journal(table: Transitions) -> None:
    for (phase, _), step in table.items():
        if step.phase in FINAL and phase is not step.phase:
            record = step.actions.index(Record(step.phase))
            answers = [step.actions.index(do) for do in (Do.ANSWER, Do.ANSWER_WAITING) if do in step.actions]
            assert all(record < answer for answer in answers)


@TABLES
def test_a_tree_that_may_have_been_let_go_is_dead_before_it_is_called_aborted(table: Transitions) -> None:
    into_aborted = {event for (phase, event), step in table.items() if (phase, step.phase) == COMMITTING_TO_ABORTED}
    assert into_aborted == {Event.TREE_NEVER_RAN}
    assert advance(Phase.COMMITTING, Event.TREE_NEVER_RAN, table).actions == KILLED_FIRST


@TABLES
def test_a_final_phase_answers_every_call_and_changes_by_nothing(table: Transitions) -> None:
    for phase in FINAL:
        for call in CALLS:
            assert advance(phase, call, table) == Step(phase, (Do.ANSWER,))
        assert recover(phase, table).phase is phase


@TABLES
def test_a_call_that_comes_twice_changes_nothing_the_second_time(table: Transitions) -> None:
    for (_, event), step in table.items():
        if event in CALLS and (step.phase, event) in table:
            again = table[step.phase, event]
            assert again.phase is step.phase
            assert set(again.actions) <= {Do.ANSWER}


@TABLES
def test_the_lease_ends_with_the_commit(table: Transitions) -> None:
    for phase in LEASED:
        step = advance(phase, Event.LEASE_EXPIRED, table)
        assert step.phase is Phase.ABORTED
        assert step.actions[:2] == (Record(Phase.ABORTED), Do.KILL_TREE)
    assert advance(Phase.COMMITTING, Event.LEASE_EXPIRED, table) == Step(Phase.COMMITTING)


def test_an_abort_of_something_unknown_is_remembered() -> None:
    assert advance(Phase.ABSENT, Event.ABORT) == Step(Phase.ABORTED, (Record(Phase.ABORTED), Do.ANSWER))
    assert advance(Phase.ABORTED, Event.OPEN_SESSION) == Step(Phase.ABORTED, (Do.ANSWER,))


def test_postcopy_restores_without_a_final_round() -> None:
    assert advance(Phase.OPEN, Event.RESTORE, POSTCOPY_TRANSITIONS).phase is Phase.RESTORING
    with pytest.raises(PhaseError):
        advance(Phase.OPEN, Event.RESTORE)
