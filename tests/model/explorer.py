"""Walks every interleaving of the commit protocol, breadth first, and says where it breaks.

In every state:
  1. at most one copy of the tree can run;
  2. the tree never runs on here *and* from its images there: not even one after the other.
In every settled state (both phaulds have nothing more to do):
  3. exactly one copy runs, unless a node that it needed was struck;
  4. the source is not HELD, unless the destination cannot answer ever again, or post-copy's pages were lost;
  5. nothing is left behind: no criu, no stuck or held copy.
And from every state a settled one can be reached without another fault.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from phaul_client import commit
from phauld import session
from tests.model import destination_node, source_node
from tests.model.world import Copy, Faults, NodeState, Rules, World

Move = tuple[str, World]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the walk found.

    Attributes:
        states: how many different states were seen.
        settled: how many of them were settled.
        broken: which promise broke; empty if none did.
        trace: the shortest way there, one line a step.
    """

    states: int
    settled: int
    broken: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.states} states, {self.settled} settled"
        steps = [f"  {number:2}. {step}" for number, step in enumerate(self.trace, 1)]
        return "\n".join([f"{head}: {self.broken}", *steps]) if self.broken else f"{head}, every promise kept"


def phauld_moves(world: World, rules: Rules) -> Iterator[Move]:
    """What either phauld may do next."""
    yield from source_node.daemon_moves(world, rules)
    yield from destination_node.daemon_moves(world, rules)


def criu_moves(world: World) -> Iterator[Move]:
    """What either criu may do next."""
    yield from source_node.criu_moves(world)
    yield from destination_node.criu_moves(world)


def strikes(world: World, rules: Rules, moves: list[Move]) -> Iterator[Move]:
    """The faults that may strike next; a message may come twice in any of these moves of a phauld."""
    crashes, messages, disasters = world.faults
    if crashes:
        paid = world._replace(faults=Faults(crashes - 1, messages, disasters))
        yield from source_node.crashes(paid, rules)
        yield from destination_node.crashes(paid)
    if disasters:
        paid = world._replace(faults=Faults(crashes, messages, disasters - 1))
        yield from source_node.disasters(paid)
        yield from destination_node.disasters(paid)
    if messages:
        yield from _message_faults(world, Faults(crashes, messages - 1, disasters), moves)


def _message_faults(world: World, left: Faults, moves: list[Move]) -> Iterator[Move]:
    requests, replies = world.requests, world.replies
    for call in requests:
        yield f"{call} is lost", world._replace(requests=requests - {call}, faults=left)
    for reply in replies:
        yield f"answer {reply.phase} to {reply.call} is lost", world._replace(replies=replies - {reply}, faults=left)
    for label, after in moves:
        if not (requests <= after.requests and replies <= after.replies):
            again = after._replace(requests=after.requests | requests, replies=after.replies | replies, faults=left)
            yield f"{label}, and will come again", again


def settled(world: World) -> bool:
    """Neither phauld will do anything more, whatever messages are still under way."""
    source_done = (
        world.source_node is NodeState.GONE
        or (world.source is None and world.source_journal is None)
        or world.source in commit.FINAL
        or (world.source is commit.Phase.HELD and (not world.asking or world.destination_cannot_answer))
    )
    destination_done = world.destination_node is NodeState.GONE or (
        world.destination in session.FINAL or world.destination is session.Phase.ABSENT
    )
    quiet = not (world.source_todo or world.destination_todo or world.requests or world.replies or world.waiting)
    return source_done and destination_done and quiet


def breach_always(world: World) -> str:
    """The promise that this state breaks."""
    if world.source_runs and world.copy is Copy.RUNS:
        return "two copies run"
    if world.ran_on and world.copy_ran and not world.destination_struck:
        return "the tree ran on at both nodes, one after the other"
    return ""


def breach_settled(world: World) -> str:
    """The promise that this settled state breaks."""
    running = world.source_runs + (world.copy is Copy.RUNS)
    held = world.source is commit.Phase.HELD
    pages_lost = world.pages_lost and world.copy_ran
    struck = world.source_struck or world.destination_struck or pages_lost
    if held and not (world.destination_cannot_answer or pages_lost):
        return "held, though the destination is there"
    if not held and running == 0 and not struck:
        return "the tree is lost"
    if world.copy in (Copy.HELD, Copy.STUCK) and not world.destination_struck:
        return "a copy that never runs is left behind"
    if (
        world.source_criu not in source_node.NO_CRIU and not held
    ) or world.destination_criu not in destination_node.NO_CRIU:
        return "a criu is left behind"
    return ""


def _normal(world: World) -> World:
    """Remember that the tree ran on, and drop calls to a node that is gone and answers that nobody waits for."""
    if world.imaged and world.source_runs and not world.ran_on:
        world = world._replace(ran_on=True)
    if world.destination_node is NodeState.GONE and world.requests:
        world = world._replace(requests=frozenset())
    heard = frozenset(reply for reply in world.replies if world.source in source_node.WAITS_FOR[reply.call])
    return world if heard == world.replies else world._replace(replies=heard)


class Explorer:
    """One walk: from the start, with these rules and so many faults."""

    def __init__(self, rules: Rules | None = None, faults: Faults | None = None) -> None:
        self.rules = rules or Rules()
        self._start = World(faults=faults or Faults())
        self._number: dict[World, int] = {self._start: 0}
        self._came_from: list[tuple[int, str]] = [(0, "")]
        self._edges = array("I")  # pairs (from, to) without faults, for the way back from settled states
        self._settled: list[int] = []

    def run(self) -> Verdict:
        """Walk until a promise breaks or every state was seen."""
        queue = deque([self._start])
        while queue:
            world = queue.popleft()
            here = self._number[world]
            if broken := breach_always(world):
                return self._verdict(broken, here)
            moves, criu = list(phauld_moves(world, self.rules)), list(criu_moves(world))
            if settled(world) and not criu:
                self._settled.append(here)
                if broken := breach_settled(world):
                    return self._verdict(broken, here)
            for label, after in (*moves, *criu):
                self._edges.extend((here, self._visit(label, after, here, queue)))
            for label, after in strikes(world, self.rules, moves):
                self._visit(label, after, here, queue)
        lost = self._without_end()
        return self._verdict("no end can be reached", lost) if lost is not None else self._verdict()

    def _visit(self, label: str, world: World, came_from: int, queue: deque[World]) -> int:
        world = _normal(world)
        number = self._number.setdefault(world, len(self._number))
        if number == len(self._came_from):
            self._came_from.append((came_from, label))
            queue.append(world)
        return number

    def _without_end(self) -> int | None:
        """The first state from which no settled state can be reached."""
        before: list[list[int]] = [[] for _ in self._number]
        for index in range(0, len(self._edges), 2):
            before[self._edges[index + 1]].append(self._edges[index])
        ends = set(self._settled)
        queue = deque(ends)
        while queue:
            for number in before[queue.popleft()]:
                if number not in ends:
                    ends.add(number)
                    queue.append(number)
        return next((number for number in range(len(before)) if number not in ends), None)

    def _verdict(self, broken: str = "", at: int = 0) -> Verdict:
        trace: list[str] = []
        while at:
            at, label = self._came_from[at]
            trace.append(label)
        return Verdict(len(self._number), len(self._settled), broken, tuple(reversed(trace)))


def explore(rules: Rules | None = None, *, crashes: int = 0, messages: int = 0, disasters: int = 0) -> Verdict:
    """Walk every interleaving with at most so many faults of each kind."""
    return Explorer(rules, Faults(crashes, messages, disasters)).run()
