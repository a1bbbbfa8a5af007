"""Everything that matters about two nodes and the network between them, as one immutable value.

What criu and the kernel do is modelled as it was measured:

- At the source the tree is frozen while criu lives. criu unwinds (the tree is let go) when its connection closes or
  `post-dump` is refused; kill -9 lets the tree go at once. A task that is let go runs, unless SIGSTOP is pending.
- At the destination nothing runs until criu is told to let go. A connection that closes before kills the tree. Once
  told, criu lets go even if phauld is dead. kill -9 before that leaves tasks that never run until they are killed.
- Messages may be lost, come twice, come late and in any order. A node that boots again keeps its journal only.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Final, NamedTuple

from phaul_client import commit
from phauld import session


class Call(StrEnum):
    """A request of the source. IMAGES stands for StartIter, the pages, StopIter and PutImages."""

    OPEN = "OPEN"
    IMAGES = "IMAGES"
    RESTORE = "RESTORE"
    COMMIT = "COMMIT"
    GET = "GET"
    ABORT = "ABORT"


class Reply(NamedTuple):
    """An answer of the destination: the phase, or None for a refused call."""

    call: Call
    phase: session.Phase | None


class SourceCriu(StrEnum):
    NONE = "NONE"
    DUMPING = "DUMPING"
    HOLDING = "HOLDING"  # waits for the answer to post-dump
    SERVING = "SERVING"  # post-copy: waits on its page connection
    UNWINDING = "UNWINDING"  # is about to let the tree go
    KILLING = "KILLING"  # is about to kill the tree
    GONE = "GONE"


class DestinationCriu(StrEnum):
    NONE = "NONE"
    RESTORING = "RESTORING"
    HOLDING = "HOLDING"  # waits for the answer to post-restore
    RELEASING = "RELEASING"  # told to let the tree go, has not yet
    UNWINDING = "UNWINDING"  # is about to kill the tree
    GONE = "GONE"


class Copy(StrEnum):
    """The destination's copy of the tree."""

    NONE = "NONE"
    HELD = "HELD"
    STUCK = "STUCK"  # its criu was killed: never runs, never ends
    RUNS = "RUNS"
    DEAD = "DEAD"


class Micro(StrEnum):
    """A part of an action during which phauld can die."""

    STOP_ONE_TASK = "STOP_ONE_TASK"
    LOOK_AT_CRIU = "LOOK_AT_CRIU"
    RELEASE_CRIU = "RELEASE_CRIU"
    CONTINUE_TASKS = "CONTINUE_TASKS"
    TELL_CRIU_TO_KILL = "TELL_CRIU_TO_KILL"
    KILL_TASKS = "KILL_TASKS"
    KILL_CRIU = "KILL_CRIU"


class NodeState(Enum):
    UP = "UP"
    GONE = "GONE"  # for good


SourceTodo = commit.Action | commit.Event | Micro
DestinationTodo = session.Action | Micro | tuple[str, Call]

TASKS: Final = 2  #: of the tree: enough to stop one and not the other
FROZEN: Final = frozenset(
    {SourceCriu.DUMPING, SourceCriu.HOLDING, SourceCriu.SERVING, SourceCriu.UNWINDING, SourceCriu.KILLING}
)


class Faults(NamedTuple):
    """How many more of each kind may strike."""

    crashes: int = 0  # of either phauld or either criu, with kill -9
    messages: int = 0  # lost, or delivered twice
    disasters: int = 0  # a node boots again, is gone for good, or loses its journal


class World(NamedTuple):
    """One state. A phauld that is down has phase None."""

    source: commit.Phase | None = commit.Phase.PREFLIGHT
    source_journal: commit.Phase | None = None
    source_todo: tuple[SourceTodo, ...] = ()
    asking: bool = False  # a Commit or a GetSession waits for its answer
    source_criu: SourceCriu = SourceCriu.NONE
    source_alive: bool = True  # the tree exists here
    stopped: int = 0  # tasks with SIGSTOP pending or in force
    imaged: bool = False  # the images are complete
    ran_on: bool = False  # the tree ran here after its images were complete
    source_node: NodeState = NodeState.UP

    destination: session.Phase | None = session.Phase.ABSENT
    destination_journal: session.Phase = session.Phase.ABSENT
    destination_todo: tuple[DestinationTodo, ...] = ()
    waiting: frozenset[Call] = frozenset()  # calls that wait for their answer
    destination_criu: DestinationCriu = DestinationCriu.NONE
    copy: Copy = Copy.NONE
    copy_ran: bool = False
    filled: bool = False  # post-copy: the copy has every page
    destination_node: NodeState = NodeState.UP

    requests: frozenset[Call] = frozenset()
    replies: frozenset[Reply] = frozenset()

    faults: Faults = Faults()
    source_struck: bool = False  # its node booted again or is gone
    destination_struck: bool = False  # its node booted again or is gone, or its journal was lost
    pages_lost: bool = False  # post-copy: the source's criu died before every page was out

    @property
    def source_runs(self) -> bool:
        return self.source_alive and self.stopped < TASKS and self.source_criu not in FROZEN

    @property
    def destination_cannot_answer(self) -> bool:
        """It is gone for good, or has lost its journal."""
        forgot = self.destination is session.Phase.ABSENT and self.destination_struck
        return forgot or self.destination_node is NodeState.GONE


class Rules(NamedTuple):
    """What is explored: the real tables, or a planted bug; and what the shells promise."""

    source: commit.Transitions = commit.TRANSITIONS
    destination: session.Transitions = session.TRANSITIONS
    looks_after_stop: bool = True  # STOP_TREE ends with a look whether criu still holds the tree
    looks_after_criu: bool = True  # LOOK_AT_TREE waits for criu to be gone
    serial: bool = True  # questions wait until the actions of the event before are done
    page_relay_outlives_phauld: bool = True  # post-copy
