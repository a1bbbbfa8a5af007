"""The destination's half of the commit protocol: which phase follows which, and what to do on the way. Pure.

Rule 1: this file owns every transition of a session; the shell feeds calls and happenings in, runs the actions in
their order and decides nothing. It takes one event at a time, questions included: the next one waits until the actions
are done (an action that ends in an event of its own may go on beside). A question answered in between could tell of an
abort before the copy is dead. Rule 2: this file knows nothing of the source but its calls (`phaul_client/commit.py` is
the other half).

  OPEN ⇄ RECEIVING → RECEIVED → RESTORING → PREPARED → COMMITTING → RUNNING
  any of those before COMMITTING → ABORTED, by Abort, the lease, a failure, or a restart of phauld
  COMMITTING → ABORTED when the tree was let go but never ran

What this half promises, and its journal keeps:

- No instruction of the tree runs before COMMITTING is in the journal. So everything journaled before it is safe to
  abort, and a restarted phauld does: its held tree died with criu's connection, or is stuck for good and gets killed.
- RUNNING and ABORTED are final and are in the journal before anybody is told. A call that comes again, late or twice,
  is answered with what was recorded; Abort leaves ABORTED even for an id that was never seen, so that a late
  OpenSession cannot revive it; how a session ended is never dropped.
- The lease ends with COMMITTING. Before, its end is an abort like any other, durable, so that a late Commit is answered
  "never ran" and the source runs on.
- ABORTED out of COMMITTING is recorded *after* the kill. The tree may have been let go: so that "never will" is true,
  criu is gone and no task is left before the source is told. This way the verdict cannot be wrong in the direction that
  doubles: whatever the evidence, ABORTED means dead.

What decides "running or never ran" after a crash: see `Do.LOOK_AT_TREE` and docs/adr/0001-commit-protocol.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from phauld.errors import PhaseError


class Phase(StrEnum):
    """Where a session stands."""

    #: This id is not in the journal.
    ABSENT = "ABSENT"
    #: Reserved; waits for the first round or for the next. Journaled: from here on there is something to clean.
    OPEN = "OPEN"
    #: A page server receives a round.
    RECEIVING = "RECEIVING"
    #: The pages of the final round are in.
    RECEIVED = "RECEIVED"
    #: criu builds the tree; none of it has run.
    RESTORING = "RESTORING"
    #: Journaled. criu holds the complete tree at `post-restore`; none of it has run.
    PREPARED = "PREPARED"
    #: Journaled. criu is told to let the tree go: it may run from here on.
    COMMITTING = "COMMITTING"
    #: Journaled, final: the tree ran here.
    RUNNING = "RUNNING"
    #: Journaled, final: the tree never ran here and never will.
    ABORTED = "ABORTED"


class Event(StrEnum):
    """A call of the source, or something that happens here."""

    #: OpenSession.
    OPEN_SESSION = "OPEN_SESSION"
    #: StartIter.
    START_ITER = "START_ITER"
    #: StopIter, of any round but the final one: its pages are complete.
    ROUND_ENDED = "ROUND_ENDED"
    #: StopIter of the final round: its pages are complete.
    FINAL_ROUND_ENDED = "FINAL_ROUND_ENDED"
    #: StopIter: the stream ended early.
    ROUND_FAILED = "ROUND_FAILED"
    #: Restore.
    RESTORE = "RESTORE"
    #: Commit.
    COMMIT = "COMMIT"
    #: Abort.
    ABORT = "ABORT"
    #: GetSession.
    GET_SESSION = "GET_SESSION"

    #: criu notified `post-restore`: the tree is complete and held.
    TREE_HELD = "TREE_HELD"
    #: criu failed, refused or died; in COMMITTING that does not say whether it had let the tree go.
    TREE_LOST = "TREE_LOST"
    #: criu let go of every task: the tree ran, whether or not it still does.
    TREE_RUNS = "TREE_RUNS"
    #: criu is gone and did not let go of the tree; or the node was booted since, so that the tree is certainly gone.
    TREE_NEVER_RAN = "TREE_NEVER_RAN"
    #: The source did not renew its lease.
    LEASE_EXPIRED = "LEASE_EXPIRED"
    #: phauld was started and found this phase in its journal.
    RESTARTED = "RESTARTED"


class Do(StrEnum):
    """An act of the shell. Every one can be repeated: a restart may run it a second time."""

    #: Answer the call that this event is, with the phase that follows.
    ANSWER = "ANSWER"
    #: Answer every Restore or Commit that waits, with the phase that follows.
    ANSWER_WAITING = "ANSWER_WAITING"
    #: Start the page server of a round.
    START_PAGE_SERVER = "START_PAGE_SERVER"
    #: Start criu's restore. Ends in TREE_HELD or TREE_LOST.
    START_RESTORE = "START_RESTORE"
    #: Answer `post-restore` with success, wait for criu to end, then as LOOK_AT_TREE. Ends in what that finds.
    RELEASE_TREE = "RELEASE_TREE"
    #: Wait for criu to end, kill it past a deadline, and only then look at the tasks, whatever criu's status was: it is
    #: 1 beside a running tree when phauld died meanwhile. A task that was never let go waits in a futex of criu's
    #: restorer, an anonymous executable mapping. TREE_RUNS if no task does, or the root has ended by itself; else
    #: TREE_NEVER_RAN.
    LOOK_AT_TREE = "LOOK_AT_TREE"
    #: Kill criu, then every task of the tree by pid and start time, and wait until none is left.
    KILL_TREE = "KILL_TREE"
    #: Remove images, carried files, page server, network lock, reservation.
    CLEAN_UP = "CLEAN_UP"


@dataclass(frozen=True, slots=True)
class Record:
    """Write the phase into the journal, durably, before the next action is begun."""

    phase: Phase


Action: TypeAlias = Record | Do


class Step(NamedTuple):
    """The phase that follows, and what to do, in this order."""

    phase: Phase
    actions: tuple[Action, ...] = ()


Transitions: TypeAlias = Mapping[tuple[Phase, Event], Step]

_BEFORE_TREE: Final = (Phase.OPEN, Phase.RECEIVING, Phase.RECEIVED)
_BEFORE_COMMIT: Final = (*_BEFORE_TREE, Phase.RESTORING, Phase.PREPARED)

#: Nothing changes any more.
FINAL: Final = frozenset({Phase.RUNNING, Phase.ABORTED})
#: The lease runs here.
LEASED: Final = frozenset(_BEFORE_COMMIT)

_ABORT: Final = Step(Phase.ABORTED, (Record(Phase.ABORTED), Do.KILL_TREE, Do.CLEAN_UP, Do.ANSWER_WAITING))
_ABORT_AND_ANSWER: Final = Step(Phase.ABORTED, (*_ABORT.actions, Do.ANSWER))
_NEVER_RAN: Final = Step(Phase.ABORTED, (Do.KILL_TREE, Record(Phase.ABORTED), Do.CLEAN_UP, Do.ANSWER_WAITING))
_RAN: Final = Step(Phase.RUNNING, (Record(Phase.RUNNING), Do.ANSWER_WAITING))


def _answer(phases: tuple[Phase, ...], events: tuple[Event, ...]) -> dict[tuple[Phase, Event], Step]:
    """Calls that change nothing in these phases: repeated, late, or questions."""
    return {(phase, event): Step(phase, (Do.ANSWER,)) for phase in phases for event in events}


#: Stop-and-copy and pre-copy.
TRANSITIONS: Final[Transitions] = MappingProxyType(
    {
        **_answer(tuple(Phase), (Event.GET_SESSION,)),
        **_answer(
            (Phase.RUNNING, Phase.ABORTED),
            (
                Event.OPEN_SESSION,
                Event.START_ITER,
                Event.ROUND_ENDED,
                Event.FINAL_ROUND_ENDED,
                Event.RESTORE,
                Event.COMMIT,
                Event.ABORT,
            ),
        ),
        (Phase.ABSENT, Event.OPEN_SESSION): Step(Phase.OPEN, (Record(Phase.OPEN), Do.ANSWER)),
        (Phase.ABSENT, Event.ABORT): Step(Phase.ABORTED, (Record(Phase.ABORTED), Do.ANSWER)),
        (Phase.OPEN, Event.OPEN_SESSION): Step(Phase.OPEN, (Do.ANSWER,)),
        (Phase.OPEN, Event.START_ITER): Step(Phase.RECEIVING, (Do.START_PAGE_SERVER, Do.ANSWER)),
        (Phase.OPEN, Event.ROUND_ENDED): Step(Phase.OPEN, (Do.ANSWER,)),
        (Phase.RECEIVING, Event.START_ITER): Step(Phase.RECEIVING, (Do.ANSWER,)),
        (Phase.RECEIVING, Event.ROUND_ENDED): Step(Phase.OPEN, (Do.ANSWER,)),
        (Phase.RECEIVING, Event.ROUND_FAILED): Step(Phase.OPEN, (Do.ANSWER,)),
        (Phase.RECEIVING, Event.FINAL_ROUND_ENDED): Step(Phase.RECEIVED, (Do.ANSWER,)),
        (Phase.RECEIVED, Event.FINAL_ROUND_ENDED): Step(Phase.RECEIVED, (Do.ANSWER,)),
        (Phase.RECEIVED, Event.RESTORE): Step(Phase.RESTORING, (Do.START_RESTORE,)),
        (Phase.RESTORING, Event.RESTORE): Step(Phase.RESTORING),
        (Phase.RESTORING, Event.TREE_HELD): Step(Phase.PREPARED, (Record(Phase.PREPARED), Do.ANSWER_WAITING)),
        (Phase.RESTORING, Event.TREE_LOST): _ABORT,
        (Phase.PREPARED, Event.RESTORE): Step(Phase.PREPARED, (Do.ANSWER,)),
        (Phase.PREPARED, Event.TREE_LOST): _ABORT,
        (Phase.PREPARED, Event.COMMIT): Step(Phase.COMMITTING, (Record(Phase.COMMITTING), Do.RELEASE_TREE)),
        (Phase.COMMITTING, Event.COMMIT): Step(Phase.COMMITTING),
        (Phase.COMMITTING, Event.RESTORE): Step(Phase.COMMITTING, (Do.ANSWER,)),
        # Too late for both, and neither is an error: the commit came first.
        (Phase.COMMITTING, Event.ABORT): Step(Phase.COMMITTING, (Do.ANSWER,)),
        (Phase.COMMITTING, Event.LEASE_EXPIRED): Step(Phase.COMMITTING),
        # criu failed after it was told to let the tree go: it may have done so, or not.
        (Phase.COMMITTING, Event.TREE_LOST): Step(Phase.COMMITTING, (Do.LOOK_AT_TREE,)),
        (Phase.COMMITTING, Event.TREE_RUNS): _RAN,
        (Phase.COMMITTING, Event.TREE_NEVER_RAN): _NEVER_RAN,
        (Phase.COMMITTING, Event.RESTARTED): Step(Phase.COMMITTING, (Do.LOOK_AT_TREE,)),
        **{(phase, Event.ABORT): _ABORT_AND_ANSWER for phase in _BEFORE_COMMIT},
        **{(phase, Event.LEASE_EXPIRED): _ABORT for phase in _BEFORE_COMMIT},
        (Phase.OPEN, Event.RESTARTED): _ABORT,
        (Phase.PREPARED, Event.RESTARTED): _ABORT,
        (Phase.RUNNING, Event.RESTARTED): Step(Phase.RUNNING),
        (Phase.ABORTED, Event.RESTARTED): Step(Phase.ABORTED, (Do.KILL_TREE, Do.CLEAN_UP)),
    }
)

#: Post-copy: there is no final round; the pages come while the tree is built and runs.
POSTCOPY_TRANSITIONS: Final[Transitions] = MappingProxyType(
    {**TRANSITIONS, (Phase.OPEN, Event.RESTORE): Step(Phase.RESTORING, (Do.START_RESTORE,))}
)


def advance(phase: Phase, event: Event, transitions: Transitions = TRANSITIONS) -> Step:
    """What follows from a call or a happening.

    Raises:
        PhaseError: it does not fit the phase; the caller's phase stays what it is.
    """
    try:
        return transitions[phase, event]
    except KeyError:
        raise PhaseError(phase, event) from None


def recover(journaled: Phase, transitions: Transitions = TRANSITIONS) -> Step:
    """What a restarted phauld does about a session that its journal holds in this phase.

    Raises:
        PhaseError: this phase is never journaled.
    """
    return advance(journaled, Event.RESTARTED, transitions)
