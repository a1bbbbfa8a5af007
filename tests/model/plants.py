"""One step of the protocol out of order, or one promise of a shell broken: bugs that the explorer must find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from phaul_client import commit
from phaul_client.commit import Do, Event, Phase
from phauld import session
from tests.model.world import Faults, Rules

SourceChange = dict[tuple[Phase, Event], commit.Step]
DestinationChange = dict[tuple[session.Phase, session.Event], session.Step]

RESUME: Final = (Do.RESUME_TREE, Do.ABORT_DESTINATION)


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug, the faults under which it shows, and what it breaks."""

    name: str
    rules: Rules
    faults: Faults
    breaks: str


def source(change: SourceChange) -> Rules:
    return Rules(source={**commit.TRANSITIONS, **change})


def destination(change: DestinationChange) -> Rules:
    return Rules(destination={**session.TRANSITIONS, **change})


TWO: Final = "two copies run"
FORK: Final = "the tree ran on at both nodes, one after the other"
LOST: Final = "the tree is lost"
HELD: Final = "held, though the destination is there"
STUCK: Final = "a copy that never runs is left behind"
ENDLESS: Final = "no end can be reached"
NONE: Final = Faults()
CRASH: Final = Faults(crashes=1)
DISASTER: Final = Faults(disasters=1)

COMMITTED: Final = commit.Record(Phase.COMMITTED)
ROLLING_BACK: Final = commit.Record(Phase.ROLLING_BACK)
ROLL_BACK: Final = commit.Step(Phase.ROLLING_BACK, (ROLLING_BACK, *RESUME))

PLANTS: Final = (
    Plant(
        "Commit is sent before it is journaled",
        source({(Phase.PREPARED, Event.TREE_STOPPED): commit.Step(Phase.COMMITTED, (Do.SEND_COMMIT, COMMITTED))}),
        CRASH,
        TWO,
    ),
    Plant(
        "no SIGSTOP before Commit",
        source(
            {(Phase.RESTORING, Event.DESTINATION_PREPARED): commit.Step(Phase.COMMITTED, (COMMITTED, Do.SEND_COMMIT))}
        ),
        CRASH,
        TWO,
    ),
    Plant(
        "the source resumes when the answer to Commit is lost",
        source({(Phase.COMMITTED, Event.NO_ANSWER): ROLL_BACK}),
        NONE,
        TWO,
    ),
    Plant(
        "a restarted source takes an open commit for a failed one",
        source({(Phase.COMMITTED, Event.RESTARTED): ROLL_BACK}),
        CRASH,
        TWO,
    ),
    Plant(
        "the source kills its copy once the destination's is prepared",
        source({(Phase.COMMITTED, Event.DESTINATION_PREPARED): commit.Step(Phase.CONFIRMED, (Do.KILL_TREE,))}),
        NONE,
        LOST,
    ),
    Plant(
        "NOT_FOUND is taken for: never ran",
        source({(Phase.COMMITTED, Event.DESTINATION_NOT_FOUND): ROLL_BACK}),
        DISASTER,
        TWO,
    ),
    Plant(
        "the source gives up asking",
        source({(Phase.HELD, Event.RESTARTED): commit.Step(Phase.HELD)}),
        CRASH,
        HELD,
    ),
    Plant(
        "criu is not looked at after SIGSTOP",
        Rules(looks_after_stop=False),
        CRASH,
        FORK,
    ),
    Plant(
        "the destination lets go before it journals",
        destination(
            {
                (session.Phase.PREPARED, session.Event.COMMIT): session.Step(
                    session.Phase.COMMITTING, (session.Do.RELEASE_TREE, session.Record(session.Phase.COMMITTING))
                )
            }
        ),
        CRASH,
        FORK,
    ),
    Plant(
        "the lease goes on after the commit",
        destination(
            {
                (session.Phase.COMMITTING, session.Event.LEASE_EXPIRED): session.TRANSITIONS[
                    session.Phase.PREPARED, session.Event.LEASE_EXPIRED
                ]
            }
        ),
        NONE,
        FORK,
    ),
    Plant(
        "a session whose lease ran out is forgotten",
        destination(
            {
                (session.Phase.PREPARED, session.Event.LEASE_EXPIRED): session.Step(
                    session.Phase.ABSENT, (session.Do.KILL_TREE, session.Record(session.Phase.ABSENT))
                )
            }
        ),
        NONE,
        ENDLESS,
    ),
    Plant(
        "a restarted destination takes an open commit for done",
        destination(
            {
                (session.Phase.COMMITTING, session.Event.RESTARTED): session.Step(
                    session.Phase.RUNNING, (session.Record(session.Phase.RUNNING),)
                )
            }
        ),
        CRASH,
        LOST,
    ),
    Plant(
        "never ran is told before the copy is killed, and questions are answered in between",
        Rules(
            looks_after_criu=False,
            serial=False,
            destination={
                **session.TRANSITIONS,
                (session.Phase.COMMITTING, session.Event.TREE_NEVER_RAN): session.TRANSITIONS[
                    session.Phase.PREPARED, session.Event.TREE_LOST
                ],
            },
        ),
        NONE,
        TWO,
    ),
    Plant(
        "the destination looks at the tree before criu is gone",
        Rules(looks_after_criu=False),
        NONE,
        FORK,
    ),
    Plant(
        "an aborted copy whose criu was killed is not killed",
        destination(
            {
                (session.Phase.PREPARED, session.Event.TREE_LOST): session.Step(
                    session.Phase.ABORTED, (session.Record(session.Phase.ABORTED), session.Do.ANSWER_WAITING)
                )
            }
        ),
        CRASH,
        STUCK,
    ),
    Plant(
        "post-copy: the page connection ends with phauld",
        Rules(commit.POSTCOPY_TRANSITIONS, session.POSTCOPY_TRANSITIONS, page_relay_outlives_phauld=False),
        CRASH,
        LOST,
    ),
    Plant(
        "post-copy: the source's copy is killed before every page has left",
        Rules(
            {
                **commit.POSTCOPY_TRANSITIONS,
                (Phase.COMMITTED, Event.DESTINATION_RUNNING): commit.TRANSITIONS[
                    Phase.COMMITTED, Event.DESTINATION_RUNNING
                ],
            },
            session.POSTCOPY_TRANSITIONS,
        ),
        NONE,
        LOST,
    ),
)
