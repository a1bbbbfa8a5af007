"""The source's half of the commit protocol: which phase follows which, and what to do on the way. Pure.

Rule 1: this file owns every transition of a migration's source; the shell feeds events in, runs the actions in their
order and decides nothing. It takes one event at a time: the next one waits until the actions are done. An action that
ends in an event of its own may go on beside; a step that does something ends it first (cancelled and awaited: no
SIGSTOP after the SIGCONT), and its late event is dropped. Rule 2: this file knows nothing of the destination but its
answers (`phauld/session.py` is the other half).

The invariant, kept by both halves together: never two runnable copies, and in the end exactly one.

  PREFLIGHT → OPENING → ITERATING → FREEZING → COPYING_IMAGES → RESTORING → PREPARED → COMMITTED → CONFIRMED → DONE
  any of those before COMMITTED → ROLLING_BACK → ROLLED_BACK
  COMMITTED → ROLLING_BACK only when the destination has answered that its copy never ran and never will
  COMMITTED → HELD when it cannot be asked; HELD is left by an answer, or by a Resolve

How the invariant is kept:

- Up to PREPARED the source decides alone, because the destination lets nothing run before Commit, and Commit is sent
  from COMMITTED only. So a rollback needs nobody's consent, and a cancel works.
- SIGSTOP is sent to every task while criu still holds the tree, and COMMITTED is in the journal, before Commit is
  sent. From then on no death of phauld or criu can let the source's copy run: it is stopped, and a restarted phauld
  knows why.
- From COMMITTED on the destination decides, and its journal is the one place where that is written. The source asks
  until it knows. Only RUNNING kills the source's copy, only ABORTED lets it run on; a lost answer does neither.
- NOT_FOUND is not an answer there: *prepared* was in the destination's journal, so this journal was lost or is another
  node's, and the copy may be running. It leads to HELD.

What is journaled: a phase that a restarted phauld must know of, and no other, for every record inside the freeze is
an fsync in the pause. `Record` always precedes the act that it announces; a final phase is recorded when all is cleaned
up. After a restart the journaled phase goes through `Event.RESTARTED` of the same table.

With FREEZING the shell records the root task (pid, start time), with COMMITTED every task of the tree and which of them
were stopped before (those get no SIGCONT). In post-copy (`POSTCOPY_TRANSITIONS`) `post-dump` is answered before the
restore, because the restore needs pages; the tree is then held by its page connection, and the source's copy is needed
until the last page has left (FILLING). That connection must outlive phauld: its end of file kills the tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from phaul_client.errors import PhaseError


class Phase(StrEnum):
    """Where a migration stands at its source."""

    #: Both nodes are asked whether the tree can move. Nothing is in the journal.
    PREFLIGHT = "PREFLIGHT"
    #: The destination reserves. Journaled: from here on there is something to clean.
    OPENING = "OPENING"
    #: Pre-copy rounds; the tree runs.
    ITERATING = "ITERATING"
    #: The final dump. Journaled: from here on the tree may be found frozen, its network locked.
    FREEZING = "FREEZING"
    #: criu holds the tree at `post-dump`: frozen and complete. The small images go over.
    COPYING_IMAGES = "COPYING_IMAGES"
    #: Post-copy only: `post-dump` is answered, criu is about to serve pages; its page connection holds the tree.
    SERVING = "SERVING"
    #: The destination builds its copy.
    RESTORING = "RESTORING"
    #: The destination holds a complete copy; SIGSTOP goes to every task here.
    PREPARED = "PREPARED"
    #: Journaled. The destination decides; in doubt until it has answered.
    COMMITTED = "COMMITTED"
    #: Journaled. In doubt, and the destination cannot be asked. The tree stays stopped; asking goes on.
    HELD = "HELD"
    #: Post-copy only, journaled: the tree runs at the destination and still needs pages from here.
    FILLING = "FILLING"
    #: Journaled. The tree runs at the destination and needs nothing from here: this copy is being killed.
    CONFIRMED = "CONFIRMED"
    #: Journaled, final: the tree runs at the destination; nothing is left here.
    DONE = "DONE"
    #: Journaled. This copy is being let run on, the destination's is being aborted.
    ROLLING_BACK = "ROLLING_BACK"
    #: Journaled, final: the tree runs on here. The wire tells REFUSED and CANCELLED apart, by the cause.
    ROLLED_BACK = "ROLLED_BACK"


class Event(StrEnum):
    """What can happen to a migration at its source."""

    #: Both nodes say that the tree can move.
    PREFLIGHT_PASSED = "PREFLIGHT_PASSED"
    #: The destination has a session and the data connection.
    SESSION_OPENED = "SESSION_OPENED"
    #: The policy wants no further round.
    LAST_ROUND = "LAST_ROUND"
    #: criu notified `post-dump`: the tree is frozen, its images are complete.
    TREE_FROZEN = "TREE_FROZEN"
    #: Every small image and carried file is at the destination.
    IMAGES_COPIED = "IMAGES_COPIED"
    #: Post-copy: criu notified `status-ready`, and its page connection is made.
    PAGES_READY = "PAGES_READY"
    #: Every task has SIGSTOP pending, *and afterwards* criu was seen to hold every one of them still.
    TREE_STOPPED = "TREE_STOPPED"
    #: Post-copy: the destination needs no more pages: it has confirmed every one, or its copy has ended.
    PAGES_FILLED = "PAGES_FILLED"
    #: No task of the tree is left here.
    TREE_KILLED = "TREE_KILLED"
    #: Every task runs on here (or the tree ended by itself, or with its node).
    TREE_RESUMED = "TREE_RESUMED"

    #: The destination answers: held, complete, none of it has run.
    DESTINATION_PREPARED = "DESTINATION_PREPARED"
    #: The destination answers: the tree is being let go, ask again.
    DESTINATION_COMMITTING = "DESTINATION_COMMITTING"
    #: The destination answers, from its journal: the tree ran here.
    DESTINATION_RUNNING = "DESTINATION_RUNNING"
    #: The destination answers, from its journal: the tree never ran here and never will.
    DESTINATION_ABORTED = "DESTINATION_ABORTED"
    #: The destination answers that it has never heard of the migration, or another node answers in its place.
    DESTINATION_NOT_FOUND = "DESTINATION_NOT_FOUND"
    #: Commit, or the question, ended without an answer: lost, timed out, refused by something in between.
    NO_ANSWER = "NO_ANSWER"

    #: A step before the commit failed: the dump, a call, the peer, the disk.
    FAILED = "FAILED"
    #: criu died with the tree in its hands.
    CRIU_LOST = "CRIU_LOST"
    #: The migration's deadline, or the freeze budget, has passed.
    DEADLINE_PASSED = "DEADLINE_PASSED"
    #: Somebody wants it stopped.
    CANCELLED = "CANCELLED"
    #: The destination has not answered for as long as the policy waits. A policy other than `hold` resolves next.
    DOUBT_EXPIRED = "DOUBT_EXPIRED"
    #: An operator, or the policy, declares the destination gone for good: run on here.
    RESOLVED_RESUME = "RESOLVED_RESUME"
    #: An operator, or the policy, declares that the tree runs at the destination, or shall run nowhere.
    RESOLVED_KILL = "RESOLVED_KILL"
    #: phauld was started and found this phase in its journal.
    RESTARTED = "RESTARTED"


class Do(StrEnum):
    """An act of the shell. Every one can be repeated: a restart may run it a second time."""

    #: OpenSession, then the data connection. Ends in SESSION_OPENED or FAILED.
    OPEN_SESSION = "OPEN_SESSION"
    #: Start the final dump. Ends in TREE_FROZEN, FAILED or CRIU_LOST.
    START_DUMP = "START_DUMP"
    #: PutImages. Ends in IMAGES_COPIED or FAILED.
    COPY_IMAGES = "COPY_IMAGES"
    #: Post-copy: answer `post-dump` with success; criu goes on to serve pages. Ends in PAGES_READY or CRIU_LOST.
    ANSWER_POST_DUMP = "ANSWER_POST_DUMP"
    #: Restore. Ends in DESTINATION_PREPARED or FAILED.
    SEND_RESTORE = "SEND_RESTORE"
    #: SIGSTOP to every task of the tree, then look that criu is alive and still traces every one: if it died in
    #: between, the tree has run past its images and the copy is of the past. Ends in TREE_STOPPED, CRIU_LOST or FAILED.
    STOP_TREE = "STOP_TREE"
    #: Commit. Ends in one of DESTINATION_* or NO_ANSWER.
    SEND_COMMIT = "SEND_COMMIT"
    #: GetSession, after a back-off. Ends in one of DESTINATION_* or NO_ANSWER.
    ASK_DESTINATION = "ASK_DESTINATION"
    #: Post-copy: keep the page connection open. Ends in PAGES_FILLED or CRIU_LOST.
    SERVE_PAGES = "SERVE_PAGES"
    #: Answer `post-dump` with success (post-copy: close the page connection): criu kills the tree. Then SIGKILL what is
    #: left of it by pid and start time, for criu may be gone. Ends in TREE_KILLED.
    KILL_TREE = "KILL_TREE"
    #: Let go of the tree: end the dump, refuse `post-dump`, or, where pages are served, send the unknown command, never
    #: an end of file. When criu is gone, SIGCONT to every task that phaul stopped. Ends in TREE_RESUMED.
    RESUME_TREE = "RESUME_TREE"
    #: Abort, once, without waiting for an answer: the lease does the same.
    ABORT_DESTINATION = "ABORT_DESTINATION"
    #: Undo the network lock, remove images, sockets and children.
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

_RUNS_ON: Final = (Phase.PREFLIGHT, Phase.OPENING, Phase.ITERATING)
_FROZEN: Final = (Phase.FREEZING, Phase.COPYING_IMAGES, Phase.RESTORING, Phase.PREPARED)
_FAILURES: Final = (Event.FAILED, Event.CRIU_LOST, Event.DEADLINE_PASSED, Event.CANCELLED)

#: A cancel works here. PREFLIGHT has nothing to undo but goes the same way.
CANCELLABLE: Final = frozenset({*_RUNS_ON, *_FROZEN, Phase.SERVING})
#: The tree is stopped here and the destination decides.
IN_DOUBT: Final = frozenset({Phase.COMMITTED, Phase.HELD})
#: Nothing is left to do.
FINAL: Final = frozenset({Phase.DONE, Phase.ROLLED_BACK})

_ROLL_BACK: Final = Step(Phase.ROLLING_BACK, (Record(Phase.ROLLING_BACK), Do.RESUME_TREE, Do.ABORT_DESTINATION))
_COMMIT: Final = Step(Phase.COMMITTED, (Record(Phase.COMMITTED), Do.SEND_COMMIT))
_CONFIRM: Final = Step(Phase.CONFIRMED, (Record(Phase.CONFIRMED), Do.KILL_TREE))
_HOLD: Final = Step(Phase.HELD, (Record(Phase.HELD), Do.ASK_DESTINATION))
_FILL: Final = Step(Phase.FILLING, (Record(Phase.FILLING), Do.SERVE_PAGES))


def _in_doubt(phase: Phase) -> dict[tuple[Phase, Event], Step]:
    """What an answer, or none, means in COMMITTED and in HELD: the same."""
    ask_again = Step(phase, (Do.ASK_DESTINATION,))
    return {
        (phase, Event.DESTINATION_RUNNING): _CONFIRM,
        (phase, Event.DESTINATION_ABORTED): _ROLL_BACK,
        (phase, Event.DESTINATION_PREPARED): Step(phase, (Do.SEND_COMMIT,)),
        (phase, Event.DESTINATION_COMMITTING): ask_again,
        (phase, Event.DESTINATION_NOT_FOUND): _HOLD if phase is not Phase.HELD else ask_again,
        (phase, Event.NO_ANSWER): ask_again,
        (phase, Event.RESTARTED): ask_again,
        (phase, Event.CRIU_LOST): Step(phase),
        (phase, Event.RESOLVED_RESUME): _ROLL_BACK,
        (phase, Event.RESOLVED_KILL): _CONFIRM,
    }


#: Stop-and-copy and pre-copy, eager and lazy restore alike.
TRANSITIONS: Final[Transitions] = MappingProxyType(
    {
        (Phase.PREFLIGHT, Event.PREFLIGHT_PASSED): Step(Phase.OPENING, (Record(Phase.OPENING), Do.OPEN_SESSION)),
        (Phase.OPENING, Event.SESSION_OPENED): Step(Phase.ITERATING),
        (Phase.ITERATING, Event.LAST_ROUND): Step(Phase.FREEZING, (Record(Phase.FREEZING), Do.START_DUMP)),
        (Phase.FREEZING, Event.TREE_FROZEN): Step(Phase.COPYING_IMAGES, (Do.COPY_IMAGES,)),
        (Phase.COPYING_IMAGES, Event.IMAGES_COPIED): Step(Phase.RESTORING, (Do.SEND_RESTORE,)),
        (Phase.RESTORING, Event.DESTINATION_PREPARED): Step(Phase.PREPARED, (Do.STOP_TREE,)),
        (Phase.PREPARED, Event.TREE_STOPPED): _COMMIT,
        **_in_doubt(Phase.COMMITTED),
        (Phase.COMMITTED, Event.DOUBT_EXPIRED): _HOLD,
        **_in_doubt(Phase.HELD),
        (Phase.CONFIRMED, Event.TREE_KILLED): Step(Phase.DONE, (Do.CLEAN_UP, Record(Phase.DONE))),
        (Phase.CONFIRMED, Event.CRIU_LOST): Step(Phase.CONFIRMED),
        (Phase.CONFIRMED, Event.RESTARTED): Step(Phase.CONFIRMED, (Do.KILL_TREE,)),
        (Phase.ROLLING_BACK, Event.TREE_RESUMED): Step(Phase.ROLLED_BACK, (Do.CLEAN_UP, Record(Phase.ROLLED_BACK))),
        (Phase.ROLLING_BACK, Event.CRIU_LOST): Step(Phase.ROLLING_BACK),
        (Phase.ROLLING_BACK, Event.CANCELLED): Step(Phase.ROLLING_BACK),
        (Phase.ROLLING_BACK, Event.RESTARTED): Step(Phase.ROLLING_BACK, (Do.RESUME_TREE, Do.ABORT_DESTINATION)),
        (Phase.DONE, Event.RESTARTED): Step(Phase.DONE),
        (Phase.ROLLED_BACK, Event.RESTARTED): Step(Phase.ROLLED_BACK),
        **{(phase, event): _ROLL_BACK for phase in (*_RUNS_ON, *_FROZEN) for event in _FAILURES},
        (Phase.OPENING, Event.RESTARTED): _ROLL_BACK,
        (Phase.FREEZING, Event.RESTARTED): _ROLL_BACK,
    }
)

#: Post-copy and the last part of hybrid: where it differs.
POSTCOPY_TRANSITIONS: Final[Transitions] = MappingProxyType(
    {
        **TRANSITIONS,
        (Phase.COPYING_IMAGES, Event.IMAGES_COPIED): Step(Phase.SERVING, (Do.ANSWER_POST_DUMP,)),
        (Phase.SERVING, Event.PAGES_READY): Step(Phase.RESTORING, (Do.SEND_RESTORE,)),
        **{(Phase.SERVING, event): _ROLL_BACK for event in _FAILURES},
        (Phase.COMMITTED, Event.DESTINATION_RUNNING): _FILL,
        (Phase.HELD, Event.DESTINATION_RUNNING): _FILL,
        (Phase.FILLING, Event.PAGES_FILLED): _CONFIRM,
        (Phase.FILLING, Event.DOUBT_EXPIRED): _HOLD,
        (Phase.FILLING, Event.RESTARTED): Step(Phase.FILLING, (Do.SERVE_PAGES,)),
        # The destination's copy lost its missing pages with criu, and it has run: only a person can choose.
        (Phase.FILLING, Event.CRIU_LOST): Step(Phase.HELD, (Record(Phase.HELD),)),
    }
)


def advance(phase: Phase, event: Event, transitions: Transitions = TRANSITIONS) -> Step:
    """What follows from an event.

    Raises:
        PhaseError: the event does not fit the phase; the caller's phase stays what it is.
    """
    try:
        return transitions[phase, event]
    except KeyError:
        raise PhaseError(phase, event) from None


def recover(journaled: Phase, transitions: Transitions = TRANSITIONS) -> Step:
    """What a restarted phauld does about a migration that its journal holds in this phase.

    Raises:
        PhaseError: this phase is never journaled.
    """
    return advance(journaled, Event.RESTARTED, transitions)
